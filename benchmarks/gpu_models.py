"""The models of benchmarks/gpu.py: whole training steps, checked against fp64, timed, and their memory measured."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_nodes import distance
from torch import Tensor, nn
from torch.nn import functional as F

import bnrestructure
from bnrestructure.kernels import cuda, tuning
from bnrestructure.kernels.cuda.convolution_choice import choose

__all__ = ["VARIANTS", "check_step", "largest_batch", "time_model"]

#: What is timed against each other, CUDA graphs on both sides.
VARIANTS = (
    "eager", "eager graphed", "compile", "compile graphed",
    "restructured", "restructured graphed", "restructured tuned graphed",
)  # fmt: skip


def make_model(name: str, device: str = "cuda") -> nn.Module:
    """A torchvision model in training mode, channels_last, without its dropout and stochastic depth; "tiny" is for dry runs."""
    torch.manual_seed(0)
    if name == "tiny":
        return _tiny().to(device, memory_format=torch.channels_last).train()
    from torchvision import models
    from torchvision.ops import StochasticDepth

    model = models.get_model(name)
    for module in model.modules():
        if isinstance(module, (nn.Dropout, StochasticDepth)):
            module.p = 0.0
    return model.to(device, memory_format=torch.channels_last).train()


def _tiny() -> nn.Module:
    """Two convolutions with a batch norm and a ReLU between them, for ten classes."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip


def _restructured(model: nn.Module, device: str) -> nn.Module:
    """Restructured for the GPU; in a dry run, where the tensors are on the CPU, our kernels stand in for the CPU's."""
    if device == "cpu":
        from bnrestructure.kernels import registry

        registry._DEVICE_MODULES["cpu"] = "bnrestructure.kernels.cuda"
        cuda.unavailable_reason = lambda: None
        registry.implementation.cache_clear()
        registry.unavailable_reason.cache_clear()
    return bnrestructure.restructure(model, backend="auto" if device == "cpu" else "cuda")


def check_step(name: str, device: str = "cuda", batch: int = 8, size: int = 96) -> dict[str, Any]:
    """One training step in bf16 autocast against eager fp64: the restructured model's distance beside eager's."""
    model = make_model(name, device)
    x = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    target = torch.arange(batch, device=device)

    def step(own: nn.Module, inputs: Tensor, autocast: bool) -> list[Tensor]:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=autocast):
            output = own(inputs)
        F.cross_entropy(output.to(torch.promote_types(output.dtype, torch.float32)), target).backward()
        return [output.detach(), *(p.grad for p in own.parameters())]

    truth = step(copy.deepcopy(model).double(), x.double(), False)
    eager = [distance(t, true) for t, true in zip(step(copy.deepcopy(model), x, True), truth, strict=True)]
    restructured = _restructured(copy.deepcopy(model), device)
    ours = [distance(t, true) for t, true in zip(step(restructured, x, True), truth, strict=True)]
    found = {
        "output": ours[0],
        "eager_output": eager[0],
        "gradients": median(ours[1:]),
        "eager_gradients": median(eager[1:]),
    }
    fine = found["output"] <= 2 * found["eager_output"] and found["gradients"] <= 2 * found["eager_gradients"]
    return {"ok": fine, **found}


def time_model(
    name: str, batch: int, variant: str, rounds: int = 20, device: str = "cuda", choices: Path | None = None
) -> dict[str, Any]:
    """Milliseconds of a training step (bf16 autocast, channels_last, SGD) and its peak memory in bytes.

    A captured graph holds on to its memory: there ``reserved`` is what counts. ``choices`` is the folder that the tuned
    variant keeps its measurements in; the others choose by rule.
    """
    if device == "cpu" and ("graphed" in variant or variant.startswith("compile")):
        variant = variant.removesuffix(" graphed").replace("compile", "eager")  # the rest of the path is the same
    # Only the tuned variant may know of measurements, and it must not fill the user's own file with them.
    os.environ["BNRESTRUCTURE_CACHE"] = str(choices) if "tuned" in variant and choices is not None else "off"
    tuning.forget()
    choose.cache_clear()
    gc.collect()
    torch.cuda.empty_cache()
    try:
        step = _prepared(name, batch, variant, device)
        timer = tuning.wall_clock if device == "cpu" else _event_clock
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        losses: list[Tensor] = []
        times = [timer(lambda: losses.append(step())) for _ in range(rounds)]
        ok = bool(torch.isfinite(losses[-1]))
        allocated, reserved = (0, 0) if device == "cpu" else (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
        found = {"ok": ok, "step": median(times), "fastest": min(times), "allocated": allocated, "reserved": reserved}
        return found if ok else {**found, "reason": "the loss is not finite"}
    except torch.OutOfMemoryError:
        return {"ok": True, "step": None, "reason": "out of memory"}
    finally:
        torch.compiler.reset()


def _event_clock(work: Callable[[], object]) -> float:
    """Milliseconds between two events around one run."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _prepared(name: str, batch: int, variant: str, device: str) -> Callable[[], Tensor]:
    """A warmed-up training step of a variant of the model."""
    model = make_model(name, device)
    size, classes = (16, 10) if name == "tiny" else (224, 1000)
    x = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    target = torch.randint(classes, (batch,), device=device)
    compiled = variant.startswith("compile")
    if variant.startswith("restructured"):
        _restructured(model, device)
        if "tuned" in variant and device != "cpu":
            with torch.autocast(device, torch.bfloat16):
                bnrestructure.tune(model, x)
    elif compiled:
        model.compile(mode="reduce-overhead" if variant.endswith("graphed") else None)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> Tensor:
        if compiled:
            torch.compiler.cudagraph_mark_step_begin()
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimiser.step()
        return loss.detach()

    for _ in range(1 if device == "cpu" else 5):
        step()
    return _captured(step) if variant.endswith("graphed") and not compiled else step


def _captured(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step as a CUDA graph: what a training loop with inputs of one size can do with any of the models."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> Tensor:
        graph.replay()
        return loss

    replay()
    return replay


def largest_batch(name: str, variant: str, device: str = "cuda", most: int = 2**14) -> dict[str, Any]:
    """The largest batch, in steps of a quarter of a power of two, whose training step fits in the device's memory.

    From the smallest power of two that does not fit, back: a step at each is all that it takes.
    """

    def fits(batch: int) -> bool:
        return time_model(name, batch, variant, rounds=1, device=device)["step"] is not None

    power = 2 if device == "cpu" else 64
    if not fits(power):
        return {"ok": False, "reason": f"a batch of {power} does not fit"}
    while 2 * power <= most and fits(2 * power):
        power *= 2
    quarter = max(power // 4, 1)
    batch = next((b for b in (power + 3 * quarter, power + 2 * quarter, power + quarter) if b <= most and fits(b)), power)
    return {"ok": True, "batch": batch}
