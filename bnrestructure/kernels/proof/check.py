"""Whether kernels answer a kind of call rightly: against float64, twice, in poisoned memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bnrestructure.core.errors import UnsupportedCallError
from bnrestructure.kernels.calls import Call, Kernels
from bnrestructure.kernels.proof.draw import Drawn
from bnrestructure.kernels.proof.kinds import mapped, precision
from bnrestructure.kernels.reference import REFERENCE

__all__ = ["FACTOR", "distance", "fault", "poisoned"]

#: How much further from float64 than PyTorch's own operators in the same dtype a result may be.
FACTOR = 4.0


def fault(kernels: Kernels, blanks: Call[Any], device: torch.device) -> str | None:
    """What is wrong with the kernels' answer to calls of this kind, in a line; None where all of it is right, or they do not answer.

    The call runs twice on the same numbers. Its results must be no further from float64 than :data:`FACTOR` times those of the reference
    in the same dtype (or one rounding of it), the same bit for bit in both runs, and nothing else may have been written. Raises what the
    kernels raise.
    """
    truth = _truth(blanks, device)
    right = Drawn(blanks, device)
    theirs = _results(REFERENCE, right.call) | right.outputs()
    unit, of_sums = _units(right.call)
    runs = []
    for _ in range(2):
        drawn = Drawn(blanks, device)
        with poisoned():
            try:
                found = _results(kernels, drawn.call)
            except UnsupportedCallError:
                return None
        runs.append({name: x.clone() for name, x in (found | drawn.outputs()).items()})
        if (field := drawn.stray_write()) is not None:
            return f"it writes to the memory of {field}, beside its outputs"
    ours, again = runs
    for name, x in theirs.items():
        is_sum = x.dim() <= 2 or name == "weight"
        if (wrong := _difference(ours.get(name), x, truth[name], of_sums if is_sum else unit)) is not None:
            return f"{name} {wrong}"
        if not torch.equal(_bits(ours[name]), _bits(again[name])):
            return f"two runs differ in {name}"
    return None


def _results(kernels: Kernels, call: Call[Any]) -> dict[str, Tensor]:
    """The tensors of the call's result, by name."""
    with torch.no_grad():
        found = kernels.run(call)
    if isinstance(found, Tensor):
        return {"result": found}
    return {name: x for name, x in found._asdict().items() if isinstance(x, Tensor)}


def _truth(blanks: Call[Any], device: torch.device) -> dict[str, Tensor]:
    """The reference's results in float64, and what it writes to of the call's arguments."""
    drawn = Drawn(blanks, device)
    call, written = _doubled(drawn.call), drawn.outputs().keys()
    found = _results(REFERENCE, call)
    mapped(call, Tensor, lambda name, x: found.setdefault(name, x) if name in written else None)
    return found


def _doubled(call: Any) -> Any:
    """The call in float64; tensors that were one stay one."""
    made: dict[int, Tensor] = {}

    def double(_: str, x: Tensor) -> Tensor:
        if id(x) not in made:
            made[id(x)] = x.double() if x.is_floating_point() else x
        return made[id(x)]

    wide = mapped(call, Tensor, double)
    return mapped(wide, torch.dtype, lambda _, dtype: torch.float64 if dtype.is_floating_point else dtype)


def _units(call: Any) -> tuple[float, float]:
    """(one rounding of what the call computes in, what rounding may leave of a sum over the call's pixels: they are added in any order)."""
    dtypes = [dtype for dtype in (getattr(call, "dtype", None), call.operand.dtype) if dtype is not None]
    unit = max(torch.finfo(dtype).eps for dtype in dtypes)
    if torch.float32 in dtypes and precision() == "tf32":
        unit = max(unit, 2.0**-10)
    pixels = call.operand.numel() // max(call.operand.shape[1], 1) if call.operand.dim() > 1 else 1
    return unit, max(unit, torch.finfo(torch.float32).eps * math.sqrt(pixels))


def _difference(ours: Tensor | None, theirs: Tensor, truth: Tensor, unit: float) -> str | None:
    if ours is None or ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"is {_shown(ours)} and should be {_shown(theirs)}"
    if not ours.is_floating_point():
        apart = int((ours != theirs).sum())
        return None if apart <= _ties(ours) else f"differs from the reference's in {apart} places"
    own, other = distance(ours, truth), distance(theirs, truth)
    if own <= FACTOR * max(other, unit):
        return None
    return f"is {own:.2g} from float64 (of its largest value), PyTorch's own operators {other:.2g}"


def _shown(x: Tensor | None) -> str:
    return "missing" if x is None else f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def distance(value: Tensor, truth: Tensor) -> float:
    """Largest absolute difference over the truth's largest magnitude; infinite where a value is no number.

    Of every million values one is left out: where an activation has a kink, rounding decides on which side of it a value is.
    """
    if not value.numel():
        return 0.0
    if not torch.isfinite(value).all():
        return float("inf")
    apart = (value.double() - truth).abs().flatten()
    return float(apart.topk(1 + _ties(value)).values[-1] / truth.abs().max().clamp_min(1e-300))


def _ties(x: Tensor) -> int:
    return x.numel() // 1_000_000


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is full of NaN: what a kernel should have written and did not is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
