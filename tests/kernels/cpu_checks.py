"""What the tests of the CPU kernels share: fp64 truth, tensors in every layout, and a measure of error that is fair."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

LAYOUTS = ("channels_last", "slice", "nchw")
#: Where an activation's derivative jumps.
KINKS = {"relu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0), "leaky_relu(0.2)": (0.0,)}


def in_layout(x: Tensor, layout: str) -> Tensor:
    """x's values in channels_last memory, as a channel slice of a wider buffer (NaN around it), or in NCHW memory."""
    if layout == "nchw":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    buffer = torch.full((n, c + 7, h, w), torch.nan, dtype=x.dtype).contiguous(memory_format=torch.channels_last)
    view = buffer.narrow(1, 3, c)
    return view.copy_(x)


def to_double(value: Any) -> Any:
    """Tensors, dtypes, and calls, edges and tuples of them in fp64; everything else as it is."""
    if isinstance(value, torch.dtype):
        return torch.float64
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if is_dataclass(value):
        return replace(value, **{field.name: to_double(getattr(value, field.name)) for field in fields(value)})
    if isinstance(value, tuple):
        members = [to_double(v) for v in value]
        return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
    return value


def fresh(call: Any) -> Any:
    """The call with a copy of what it writes in place, of the same strides, gaps and all; NaN between."""
    place = next((name for name in ("out", "accumulate") if getattr(call, name, None) is not None), None)
    return call if place is None else replace(call, **{place: like(getattr(call, place))})


def like(x: Tensor) -> Tensor:
    """A copy with the same strides."""
    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return torch.full((size,), torch.nan, dtype=x.dtype).as_strided(x.shape, x.stride()).copy_(x)


def largest_error(value: Tensor, truth: Tensor) -> float:
    """Largest absolute difference, relative to the truth's largest magnitude; infinite where NaNs differ."""
    value = value.double()
    if value.shape != truth.shape or not torch.equal(value.isnan(), truth.isnan()):
        return float("inf")
    scale = truth.nan_to_num().abs().max().clamp_min(1e-300)
    return float((value - truth).nan_to_num().abs().max() / scale)


def assert_as_good(name: str, value: Any, reference: Any, truth: Any, factor: float = 4.0) -> None:
    """``value`` is no further from the fp64 truth than ``factor`` times the reference's result in the same precision.

    One rounding of the result's own dtype is always granted: on a few elements the reference can be exact by luck.
    """
    if isinstance(truth, tuple):
        for i, parts in enumerate(zip(value, reference, truth, strict=True)):
            assert_as_good(f"{name}[{i}]", *parts, factor)
        return
    if truth is None:
        assert value is None, name
        return
    assert value.dtype == reference.dtype, name
    error = largest_error(value, truth)
    allowed = factor * max(largest_error(reference, truth), torch.finfo(value.dtype).eps)
    assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
