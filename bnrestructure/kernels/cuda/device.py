"""The GPU that times are taken on and hold for: its name, what else they depend on, and its clock. Importing needs no GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from bnrestructure.core.files import digest_of
from bnrestructure.kernels import tuning

__all__ = ["event_timer", "gpu_here", "gpu_of", "graph_of", "identify_machine", "uses_tf32"]

#: Runs before one is recorded: compilers, tables of tiles and cuDNN's own search must be through.
_WARMED_BY = 3
#: Written before each timed run, several times over: more than any second-level cache holds, and the device is busy with it
#: while the host gets ahead, so that what is timed is the kernels and not Python.
_FLUSHED_BYTES, _FLUSHES = 2**28, 4


def gpu_of(device: torch.device) -> str | None:
    """The name of this GPU; on the CPU the kernels are interpreted. None for a device that is none."""
    if device.type == "cpu":
        return "Triton's interpreter"
    return _name(device.index or 0) if device.type == "cuda" else None


def gpu_here() -> str | None:
    """The name of the current GPU, or None without one."""
    return _name(torch.cuda.current_device()) if torch.cuda.is_available() else None


@cache
def _name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def uses_tf32() -> bool:
    """Whether PyTorch's convolutions multiply fp32 as TF32 now, by whichever of its switches that was said.

    ``torch.backends.cudnn.allow_tf32`` raises RuntimeError once the newer ``fp32_precision`` switches have been used.
    """
    precision: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]  # put there when torch is imported
    return precision == "tf32"


def identify_machine(gpu: str) -> None:
    """Tell kernels/tuning.py what times depend on: the GPU, the versions of the compilers and of cuDNN, and our kernels' sources."""
    cudnn = str(torch.backends.cudnn.version() if torch.cuda.is_available() else None)
    tuning.set_machine(gpu=gpu, torch=torch.__version__, triton=_triton(), cudnn=cudnn, kernels=_sources_digest())


@cache
def _triton() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"


@cache
def _sources_digest() -> str:
    here = Path(__file__).parent
    return digest_of([*sorted(here.glob("*.py")), here.parent / "hybrid.py", here.parent / "aten_convolution.py"])


def event_timer(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """A clock for kernels/tuning.py: milliseconds of one run on the device's current stream, between two events.

    The cache is flushed before each run, as in a training step nothing that a node reads was used just before. Raises
    what the run raises.
    """
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=device)

    def milliseconds(run: Callable[[], object]) -> float:
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(_FLUSHES):
                flushed.zero_()
            start.record()
            run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)

    return milliseconds


def graph_of(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A replay of the run as a CUDA graph: kernels one behind the other, however slow the host is. Raises what the run raises."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARMED_BY):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    replay: Callable[[], None] = graph.replay
    return replay
