"""The kernels of benchmarks/gpu.py that are no convolution: checked against fp64, and timed at the shapes of real networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from gpu_clock import clock_for
from gpu_nodes import compared, poisoned
from torch import Tensor

from bnrestructure.core.edges import Join, PoolGeometry, Transform
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
from bnrestructure.kernels.cuda import KERNELS
from bnrestructure.kernels.reference import REFERENCE

__all__ = ["RAGGED_SHAPE", "Sweep", "check_sweeps", "draw_sweeps", "sweeps", "time_sweeps"]

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
        "finalize_backward": Sweep(lambda: run(FinalizeBackward(mean, scale, beta)), [mean, scale, beta]),
    }


def check_sweeps(
    act: str, dtype: torch.dtype, device: str = "cuda", shape: tuple[int, ...] = RAGGED_SHAPE
) -> dict[str, Any]:
    """Every kernel that is no convolution, as gpu_nodes.check_node checks those."""
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
