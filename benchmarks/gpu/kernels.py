"""The kernels of benchmarks/gpu, timed by the GPU's own clock; those that are no convolution are checked here, too."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.nodes import Node, compared, draw, implementation, implementations, poisoned
from bnrestructure.core.activation import activate
from bnrestructure.core.edges import Join, PoolGeometry, Transform
from bnrestructure.core.shortage import is_out_of_memory
from bnrestructure.kernels import tuning
from bnrestructure.kernels.calls import (
    FinalizeBackward,
    FinalizeForward,
    JoinBackward,
    JoinForward,
    MaxPoolBackward,
    MaxPoolForward,
    NormaliseBackward,
    NormaliseForward,
    SqueezeBackward,
    SqueezeForward,
    StatisticsBackward,
    StatisticsForward,
)
from bnrestructure.kernels.choice import Node as ChoiceNode
from bnrestructure.kernels.cuda import KERNELS
from bnrestructure.kernels.cuda.rule import rule
from bnrestructure.kernels.reference import REFERENCE

__all__ = [
    "Clock", "bounds", "check_sweeps", "convolutions_chosen", "is_out_of_memory", "no_convolution_found", "release_memory", "time_node",
    "time_sweeps",
]  # fmt: skip


#: What PyTorch says when cuDNN's plans all failed, be it for their workspaces.
_NO_CONVOLUTION = ("unable to find an engine to execute", "Unable to find a valid cuDNN algorithm")


def no_convolution_found(error: BaseException) -> bool:
    """Whether no convolution could run: for sizes that run in smaller batches that, too, is for want of memory."""
    return any(words in str(error) for words in _NO_CONVOLUTION)


def release_memory() -> None:
    """Give what the last unit needed back to the GPU, which other workers may share."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


#: Written before each run: more than any second-level cache holds, several times over, so that the host gets ahead meanwhile.
_FLUSHED_BYTES, _FLUSHES = 2**28, 2
_RUNS = 25


class Clock:
    """Times work on a stream of its own. What autograd is to run backward must have been run forward within :meth:`stream`.

    ``not_captured`` says of each piece of work whose launches could not be captured why: its time is that of its launches, too.
    """

    def __init__(self) -> None:
        self.not_captured: dict[str, str] = {}
        self._stream = torch.cuda.Stream()
        self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device="cuda")

    def stream(self) -> AbstractContextManager[Any]:
        """Where to prepare what is timed; all other streams' work is done."""
        torch.cuda.synchronize()
        return torch.cuda.stream(self._stream)

    def milliseconds(self, name: str, work: Callable[[], object]) -> float:
        """Median of some replays of a CUDA graph of the work, between events, the caches flushed before each."""
        with self.stream():
            for _ in range(3):  # compiles, and lets cuDNN choose
                work()
            torch.cuda.synchronize()
            try:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=self._stream):
                    kept = work()
                run: Callable[[], object] = graph.replay
            except Exception as error:  # whatever a capture forbids: the same work is timed launch by launch, and says so
                if is_out_of_memory(error):
                    raise
                torch.cuda.synchronize()  # an error that stays would come up here
                kept, run = None, work
                self.not_captured[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
            run()
            pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(_RUNS)]
            for start, end in pairs:
                for _ in range(_FLUSHES):
                    self._flushed.zero_()
                start.record()
                run()
                end.record()
            torch.cuda.synchronize()
            del kept  # the graph writes to it
        return median(start.elapsed_time(end) for start, end in pairs)


class _HostClock:
    """The same for a dry run on the CPU: a single run, by the host's clock."""

    def __init__(self) -> None:
        self.not_captured: dict[str, str] = {}

    def stream(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def milliseconds(self, name: str, work: Callable[[], object]) -> float:
        return tuning.wall_clock(work)


def clock_for(device: str) -> Clock | _HostClock:
    """The clock of a device."""
    return _HostClock() if device == "cpu" else Clock()


@contextmanager
def convolutions_chosen() -> Iterator[None]:
    """cuDNN picks its algorithms by timing some: for every variant, as a user who wants speed would have it."""
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit
    torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, 4
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = before


def time_node(node: Node, ceilings: dict[str, float], batch: int = 256, device: str = "cuda") -> dict[str, Any]:
    """Milliseconds of each implementation forward and backward, of the unfused sequence with cuDNN, and of their roofline; bf16.

    ``forward_rule`` and ``backward_rule`` are what the rule of kernels/cuda/rule.py picks; check_node says whether they are right.
    ``not_captured``: the times that hold their launches from Python, and why.
    """
    clock = clock_for(device)
    a = draw(node, batch, torch.bfloat16, device)
    c, geometry = node.channels, node.geometry
    zeros, ones = torch.zeros(c, device=device), torch.ones(c, device=device)

    def unfused(x: Tensor, weight: Tensor) -> Tensor:
        z = F.batch_norm(x, None, None, ones, zeros, training=True)
        z = activate(z + a.r if node.joined else z, node.act)
        z = z if a.transform.gate is None else z * a.transform.gate.to(z.dtype).view(batch, c, 1, 1)
        return F.conv2d(z, weight, None, geometry.stride, geometry.padding, geometry.dilation, node.groups)

    found: dict[str, Any] = {"ok": True, **bounds(node, batch, ceilings)}

    def time(name: str, work: Any) -> None:
        found[name] = clock.milliseconds(name, work)

    for name in implementations(node):
        kernels = implementation(node, name)
        with convolutions_chosen():
            time(f"{name}_forward", lambda k=kernels: a.forward(k, node, torch.bfloat16))
            time(f"{name}_backward", lambda k=kernels: a.backward(k, node, torch.bfloat16, a.before))
    x, weight = a.x.detach().requires_grad_(), a.weight.detach().requires_grad_()
    with convolutions_chosen():
        with clock.stream():
            y = unfused(x, weight)
        time("unfused_forward", lambda: unfused(x, weight))
        time("unfused_backward", lambda: torch.autograd.grad(y, (x, weight), a.dy, retain_graph=True))
        time("cudnn_forward", lambda: F.conv2d(a.x, a.weight, None, *geometry))
    of = ChoiceNode(tuple(a.x.shape), tuple(a.weight.shape), geometry, torch.bfloat16, not node.joined, node.gated, node.joined)
    for way in ("forward", "backward"):
        found[f"{way}_rule"] = rule(of, way).implementation
        found[f"{way}_share"] = found[f"{way}_bound"] / found[f"fused_{way}"]
    return found | ({"not_captured": clock.not_captured} if clock.not_captured else {})


def bounds(node: Node, batch: int, ceilings: dict[str, float]) -> dict[str, float]:
    """Milliseconds that no implementation can beat, at these bytes and operations a second, in bf16.

    ``backward_two_pass_bound`` is for one that reads everything twice, for dgrad and for wgrad, as ours do.
    """
    x = 2 * batch * node.channels * node.size**2
    y = 2 * batch * node.out * node.out_size**2
    flops = y * node.channels // node.groups * node.kernel**2  # two for each value of y, as there are bytes
    # Forward reads x and writes y. Backward reads P, y and x, and reads and writes dx. A join's forward reads r and writes the sum, too,
    # and its backward reads both of its operands.
    forward = (3 if node.joined else 1) * x + y
    backward = 2 * y + (4 if node.joined else 3) * x
    two_passes = 2 * (2 * y + x) + (3 if node.joined else 2) * x

    def milliseconds(moved: int, operations: int) -> float:
        return max(moved / ceilings["bytes"], operations / ceilings["flops"]) * 1e3

    return {
        "forward_bound": milliseconds(forward, flops),
        "backward_bound": milliseconds(backward, 2 * flops),
        "backward_two_pass_bound": milliseconds(two_passes, 2 * flops),
    }


RAGGED_SHAPE = (3, 70, 13, 9)
_WINDOW = PoolGeometry((3, 3), (2, 2), (1, 1), False)


class Operands(NamedTuple):
    """What the kernels take: four tensors [N, C, H, W], one of the pool's size with the maxima's places, [N, C] and four vectors [C]."""

    full: list[Tensor]
    pooled: Tensor
    index: Tensor
    squeezed: Tensor
    vectors: list[Tensor]

    def double(self) -> Operands:
        full, vectors = ([t.double() for t in tensors] for tensors in (self.full, self.vectors))
        return Operands(full, self.pooled.double(), self.index, self.squeezed.double(), vectors)


class Sweep(NamedTuple):
    """A kernel's call, and the tensors that it reads."""

    run: Callable[[], tuple[Tensor | None, ...]]
    reads: list[Tensor]

    def bytes(self) -> int:
        """What the call reads and writes, each once."""
        return sum(t.nbytes for t in (*self.reads, *self.run()) if t is not None)


def draw_sweeps(act: str, dtype: torch.dtype, device: str, shape: tuple[int, ...]) -> Operands:
    """Fresh operands, their means away from zero. The maxima's places are the reference's: on a tie any is right."""
    full = [(torch.randn(shape, device=device) + 2).to(dtype, memory_format=torch.channels_last) for _ in range(4)]
    vectors = [torch.rand(shape[1], device=device) + 0.5 for _ in range(4)]
    pooled, index = REFERENCE.run(MaxPoolForward(full[0], Transform(*vectors[:3], act), _WINDOW, dtype))
    drawn = torch.randn_like(pooled).contiguous(memory_format=torch.channels_last)
    squeezed = torch.randn(shape[:2], device=device).to(dtype)
    return Operands(full, drawn, index.contiguous(memory_format=torch.channels_last), squeezed, vectors)


def sweeps(kernels: Any, of: Operands, act: str, dtype: torch.dtype, target: Callable[[Tensor], Tensor]) -> dict[str, Sweep]:
    """Every kernel that is no convolution, by name, computing in ``dtype``. ``target`` gives the tensor to add to from one like it."""
    (x, y, dz, dout), (mean, scale, beta, a) = of.full, of.vectors
    t, own = Transform(mean, scale, beta, act), Transform(mean, scale, beta)
    run, join = kernels.run, Join(x, own, y, Transform(), act)
    z = run(JoinForward(join, dtype, True)).z
    both = Join(x, own, y, own, act)
    return {
        "statistics_forward": Sweep(lambda: run(StatisticsForward(x)), [x]),
        "statistics_backward": Sweep(lambda: (run(StatisticsBackward(x, mean, scale, beta, target(y))),), [x, y]),
        "normalise_forward": Sweep(lambda: (run(NormaliseForward(x, t, dtype)),), [x]),
        "normalise_backward": Sweep(lambda: run(NormaliseBackward(dz, x, t, target(y))), [dz, x, y]),
        "residual_forward": Sweep(lambda: run(JoinForward(join, dtype, True)), [x, y]),
        "residual_backward": Sweep(lambda: run(JoinBackward(dout, (a, beta, mean), both, z)), [dout, x, y, z]),
        # The places themselves are not compared: on a tie another one may be as right.
        "max_pool_forward": Sweep(lambda: run(MaxPoolForward(x, t, _WINDOW, dtype)), [x]),
        "max_pool_backward": Sweep(lambda: run(MaxPoolBackward(of.pooled, of.index, x, t, _WINDOW)), [of.pooled, of.index, x]),
        "squeeze_forward": Sweep(lambda: (run(SqueezeForward(x, t, dtype)),), [x]),
        "squeeze_backward": Sweep(lambda: run(SqueezeBackward(of.squeezed, dz, x, t)), [of.squeezed, dz, x]),
        "finalize_forward": Sweep(
            lambda: run(FinalizeForward(mean, scale, 100, beta, a, None, None, 0.1, 1e-5)), [mean, scale, beta, a]
        ),
        "finalize_backward": Sweep(lambda: run(FinalizeBackward(mean, a, scale, beta)), [mean, a, scale, beta]),
    }


def check_sweeps(
    act: str, dtype: torch.dtype, device: str = "cuda", shape: tuple[int, ...] = RAGGED_SHAPE
) -> dict[str, Any]:
    """Every kernel that is no convolution, as nodes.check_node checks those."""
    drawn = draw_sweeps(act, dtype, device, shape)

    def results(kernels: Any, of: Operands, compute: torch.dtype) -> list[Tensor]:
        made = {name: sweep.run() for name, sweep in sweeps(kernels, of, act, compute, Tensor.clone).items()}
        made["max_pool_forward"] = made["max_pool_forward"][:1]
        return [tensor for group in made.values() for tensor in group if tensor is not None]

    truth, theirs = results(REFERENCE, drawn.double(), torch.float64), results(REFERENCE, drawn, dtype)
    with poisoned():
        ours = results(KERNELS, drawn, dtype)
    return compared(ours, theirs, truth, torch.finfo(dtype).eps)


def time_sweeps(act: str, shape: tuple[int, ...], ceilings: dict[str, float], device: str = "cuda") -> dict[str, Any]:
    """Milliseconds of each of them in bf16, and of its roofline where it moves more than a few vectors."""
    clock = clock_for(device)
    drawn = draw_sweeps(act, torch.bfloat16, device, shape)
    times, bounds = {}, {}
    for name, sweep in sweeps(KERNELS, drawn, act, torch.bfloat16, lambda like: like).items():
        times[name] = clock.milliseconds(name, sweep.run)
        if not name.startswith("finalize"):
            bounds[name] = sweep.bytes() / ceilings["bytes"] * 1e3
    found = {"ok": True, "times": times, "bounds": bounds}
    return found | ({"not_captured": clock.not_captured} if clock.not_captured else {})
