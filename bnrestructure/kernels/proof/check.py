"""Whether kernels answer a kind of call rightly: against float64, twice, in poisoned memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bnrestructure.core.errors import UnsupportedCallError, first_line
from bnrestructure.kernels.calls import Call, ConvBackward, ConvForward, Kernels
from bnrestructure.kernels.proof.draw import Drawn
from bnrestructure.kernels.proof.kinds import mapped, precision
from bnrestructure.kernels.reference import REFERENCE
from bnrestructure.kernels.unmerged import Unmerged, merged

__all__ = ["FACTOR", "KernelRaisedError", "NotJudgedError", "distance", "fault", "poisoned"]

#: How much further from float64 than PyTorch's own operators in the same dtype a result may be: at its worst value, and all in all.
FACTOR, RMS_FACTOR = 4.0, 2.0


class KernelRaisedError(Exception):
    """The kernels raised an error on a call that they support."""


class NotJudgedError(Exception):
    """There is nothing to hold the results against."""


def fault(kernels: Kernels, blanks: Call[Any], device: torch.device) -> str | None:
    """What is wrong with the kernels' answer to calls of this kind, in a line; None where all of it is right, or they do not answer.

    The call runs twice on the same numbers. Its results must be about as near to float64 as those of the reference in the same dtype (see
    :func:`_difference`), the same bit for bit in both runs, and none of its other arguments' memory may have been written to. Raises
    KernelRaisedError where the kernels raise, and NotJudgedError where the reference gives no numbers to hold theirs against.
    """
    truth = _truth(blanks, device)
    right = Drawn(blanks, device)
    theirs = _results(REFERENCE, right.call) | right.outputs()
    pixels = _pixels(right.call)
    runs = []
    for _ in range(2):
        drawn = Drawn(blanks, device)
        with poisoned():
            try:
                found = _results(kernels, drawn.call)
                if device.type != "cpu":
                    torch.accelerator.synchronize(device)  # an error on the device comes up here
            except UnsupportedCallError:
                return None
            except Exception as error:  # of a compiler, a driver, or the kernels themselves
                raise KernelRaisedError(f"{type(error).__name__}: {first_line(error)[:300]}") from error
        runs.append({name: x.clone() for name, x in (found | drawn.outputs()).items()})
        if (field := drawn.stray_write()) is not None:
            return f"it writes to the memory of {field}, beside its outputs"
    ours, again = runs
    for name, x in theirs.items():
        unit = _unit(right.call, name, x, pixels) if x.is_floating_point() else 0.0
        if (wrong := _difference(ours.get(name), x, truth[name], unit)) is not None:
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
    named = found._asdict()
    if isinstance(left := named.get("mean"), Unmerged):
        named["mean"], named["var"] = merged(left)
    return {name: x for name, x in named.items() if isinstance(x, Tensor)}


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


def _pixels(call: Any) -> int:
    """How many values of each channel the call adds up."""
    x = call.operand
    return x.numel() // max(x.shape[1], 1) if x.dim() > 1 else 1


def _unit(call: Any, name: str, result: Tensor, pixels: int) -> float:
    """One rounding of a result; of a sum what rounding may leave of it, as its terms are added in any order."""
    unit = torch.finfo(result.dtype).eps
    if isinstance(call, ConvForward | ConvBackward) and call.dtype is torch.float32 and precision() == "tf32":
        unit = max(unit, 2.0**-10)
    return max(unit, torch.finfo(torch.float32).eps * math.sqrt(pixels)) if result.dim() <= 2 or name == "weight" else unit


def _difference(ours: Tensor | None, theirs: Tensor, truth: Tensor, unit: float) -> str | None:
    """What is wrong with a result, or None.

    Its largest error must be within :data:`FACTOR` of the reference's, or of one rounding, and, so that one unlucky value of the reference
    excuses no other, an activation's root-mean-square error within :data:`RMS_FACTOR`, or half a rounding.
    """
    if ours is None or ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"is {_shown(ours)} and should be {_shown(theirs)}"
    if not ours.is_floating_point():
        apart = int((ours != theirs).sum())
        return None if apart <= _ties(ours) else f"differs from the reference's in {apart} places"
    own, other = (distance(x, truth, leave_out=_ties(x)) for x in (ours, theirs))
    if not math.isfinite(other):
        raise NotJudgedError("PyTorch's own operators give no numbers")
    if own > FACTOR * max(other, unit):
        return f"is {own:.2g} from float64 (of its largest value), PyTorch's own operators {other:.2g}"
    if ours.dim() > 2:
        own, other = _spread(ours, truth), _spread(theirs, truth)
        if own > RMS_FACTOR * max(other, unit / 4):
            return f"is {own:.2g} from float64 (root mean square), PyTorch's own operators {other:.2g}"
    return None


def _shown(x: Tensor | None) -> str:
    return "missing" if x is None else f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def distance(value: Tensor, truth: Tensor, leave_out: int = 0) -> float:
    """Largest absolute difference, but for ``leave_out`` ones, over the truth's largest magnitude; infinite where a value is no number."""
    if not value.numel():
        return 0.0
    if not torch.isfinite(value).all():
        return float("inf")
    apart = (value.double() - truth).abs().flatten()
    return float(apart.topk(1 + leave_out).values[-1] / truth.abs().max().clamp_min(1e-300))


def _spread(value: Tensor, truth: Tensor) -> float:
    """Root-mean-square difference over the truth's root mean square."""
    if not value.numel():
        return 0.0
    return float((value.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt().clamp_min(1e-300))


def _ties(x: Tensor) -> int:
    """One of every million values: where an activation has a kink, rounding decides on which side of it a value is."""
    return x.numel() // 1_000_000


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is full of NaN: what a kernel should have written and did not is seen.

    PyTorch has that for deterministic algorithms alone, so cuDNN's part of a hybrid is proved with those: two of its others may differ.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
