"""The sweeps that ride on no convolution: statistics, normalise, residual join, max pooling, squeeze (global average).

Same functions, arguments and results as kernels/reference; 4-D tensors in fp32 or bf16 (``supports`` says what is
not). Inputs of any strides are accepted, those that are not channels_last at the price of a copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnrestructure.core.activation import unsupported_activation
from bnrestructure.core.edges import PoolGeometry, Transform
from bnrestructure.core.kept import kept_activation
from bnrestructure.kernels.cpu.layout import ELEMENT_CODES, activation_code, addressable, destination, empty_like, unsupported_tensor
from bnrestructure.kernels.cpu.library import declare, threads
from bnrestructure.kernels.cpu.memory import of_pixels, of_vector
from bnrestructure.kernels.layout import pitch_of, vector

__all__ = [
    "max_pool_backward",
    "max_pool_forward",
    "normalise_backward",
    "normalise_forward",
    "residual_backward",
    "residual_forward",
    "squeeze_backward",
    "squeeze_forward",
    "statistics_backward",
    "statistics_forward",
    "supports",
]

Sums = tuple[Tensor, Tensor | None, Tensor | None]

# element type and activation as "i if"; a tensor as "pi" (pointer, pitch); an edge's affine part as "ppp"
_statistics_forward = declare("bnr_statistics_forward", "i pi ii pp i")
_statistics_backward = declare("bnr_statistics_backward", "i pi ii ppp pi i i")
_normalise_forward = declare("bnr_normalise_forward", "i if pi ii ppp pi i")
_normalise_backward = declare("bnr_normalise_backward", "i if pi pi ii ppp pi i pp i")
_squeeze_forward = declare("bnr_squeeze_forward", "i if pi iii ppp p i")
_squeeze_backward = declare("bnr_squeeze_backward", "i if p pi pi iii ppp pi i pp i")
_residual_forward = declare("bnr_residual_forward", "i if pi ppp pi ppp ii p pp i")
_residual_backward = declare("bnr_residual_backward", "i if pi ppp pi pi ppp pi ppp ii p ppp i")
_max_pool_forward = declare("bnr_max_pool_forward", "i if pi iiii ppp iiiiiiii pp i")
_max_pool_backward = declare("bnr_max_pool_backward", "i if pi pi pi iiii ppp iiiiiiii pi i pp i")


def statistics_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of x [N, C, H, W], each [C] in fp32."""
    x, pitch = addressable(x)
    channels = x.shape[1]
    mean, var = torch.empty(2, channels).unbind()
    pixels = x.numel() // channels
    _statistics_forward(
        ELEMENT_CODES[x.dtype], of_pixels(x, pitch, x.shape, x.dtype), pitch, pixels, channels,
        mean.data_ptr(), var.data_ptr(), threads(),
    )  # fmt: skip
    return mean, var


def statistics_backward(x: Tensor, mean: Tensor, a: Tensor, b: Tensor, accumulate: Tensor | None) -> Tensor:
    """``a * (x - mean) + b`` in x's dtype, or added in place to ``accumulate``."""
    x, pitch = addressable(x)
    channels = x.shape[1]
    mean, a, b = vector(mean), vector(a), vector(b)
    out = destination(x, accumulate)
    _statistics_backward(
        ELEMENT_CODES[x.dtype], of_pixels(x, pitch, x.shape, x.dtype), pitch, x.numel() // channels, channels,
        of_vector(mean, channels), of_vector(a, channels), of_vector(b, channels),
        *_place(out, x), out is accumulate, threads(),
    )  # fmt: skip
    return _delivered(out, accumulate)


def normalise_forward(x: Tensor, transform: Transform, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """``z = act((x - mean) * scale + beta)`` in x's dtype; written to ``out`` (any strides) when given."""
    x, pitch = addressable(x)
    channels = x.shape[1]
    edge = _Edge(transform)
    z = out if out is not None and out.dtype == x.dtype and pitch_of(out) else kept_activation(x.shape, x.dtype, x.device)
    _normalise_forward(
        ELEMENT_CODES[x.dtype], *edge.activation, of_pixels(x, pitch, x.shape, x.dtype), pitch, x.numel() // channels, channels,
        *edge.pointers(channels), *_place(z, x), threads(),
    )  # fmt: skip
    return z if out is None or z is out else out.copy_(z)


def normalise_backward(dz: Tensor, x: Tensor, transform: Transform, *, accumulate: Tensor | None = None) -> Sums:
    """(dx, SP, SPX) from the gradient at z; dx is added in place to ``accumulate`` when given."""
    x, pitch = addressable(x)
    dz, dz_pitch = addressable(dz)
    channels = x.shape[1]
    edge = _Edge(transform)
    out = destination(x, accumulate)
    sum_p, sum_px = edge.sums(channels)
    _normalise_backward(
        ELEMENT_CODES[x.dtype], *edge.activation, of_pixels(dz, dz_pitch, x.shape, x.dtype), dz_pitch,
        of_pixels(x, pitch, x.shape, x.dtype), pitch, x.numel() // channels, channels, *edge.pointers(channels),
        *_place(out, x), out is accumulate, of_vector(sum_p, channels), of_vector(sum_px, channels), threads(),
    )  # fmt: skip
    return _delivered(out, accumulate), sum_p, sum_px


def squeeze_forward(x: Tensor, transform: Transform, *, dtype: torch.dtype) -> Tensor:
    """Mean of ``transform(x)`` over the spatial positions, [N, C] in x's dtype."""
    x, pitch = addressable(x)
    n, channels, height, width = x.shape
    edge = _Edge(transform)
    pooled = torch.empty(n, channels, dtype=torch.float32)
    _squeeze_forward(
        ELEMENT_CODES[x.dtype], *edge.activation, of_pixels(x, pitch, x.shape, x.dtype), pitch, n, height * width, channels,
        *edge.pointers(channels), pooled.data_ptr(), threads(),
    )  # fmt: skip
    return pooled.to(x.dtype)


def squeeze_backward(
    dpooled: Tensor, dz: Tensor | None, x: Tensor, transform: Transform, *, accumulate: Tensor | None = None
) -> Sums:
    """(dx, SP, SPX); the gradient at z is ``dpooled[n, c] / positions + dz``.

    ``accumulate`` that *is* ``dz`` is overwritten instead of added to.
    """
    overwrite = dz is not None and accumulate is not None and accumulate is dz
    x, pitch = addressable(x)
    n, channels, height, width = x.shape
    edge = _Edge(transform)
    out = destination(x, accumulate)
    dpooled = vector(dpooled)
    gradient, gradient_pitch = (None, 0) if dz is None else addressable(dz)
    sum_p, sum_px = edge.sums(channels)
    _squeeze_backward(
        ELEMENT_CODES[x.dtype], *edge.activation, of_vector(dpooled, n, channels),
        of_pixels(gradient, gradient_pitch, x.shape, x.dtype), gradient_pitch, of_pixels(x, pitch, x.shape, x.dtype), pitch,
        n, height * width, channels, *edge.pointers(channels), *_place(out, x), out is accumulate and not overwrite,
        of_vector(sum_p, channels), of_vector(sum_px, channels), threads(),
    )  # fmt: skip
    if overwrite:
        return out if accumulate is None or out is accumulate else accumulate.copy_(out), sum_p, sum_px
    return _delivered(out, accumulate), sum_p, sum_px


def residual_forward(
    y: Tensor, ty: Transform, r: Tensor, tr: Transform, act: str, *, dtype: torch.dtype, statistics: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``out = act(ty(y) + tr(r))`` in y's dtype, and its statistics if asked for."""
    y, y_pitch = addressable(y)
    r, r_pitch = addressable(r)
    channels = y.shape[1]
    y_edge, r_edge = _Edge(ty), _Edge(tr)
    out = kept_activation(y.shape, y.dtype, y.device)
    mean, var = torch.empty(2, channels).unbind() if statistics else (None, None)
    _residual_forward(
        ELEMENT_CODES[y.dtype], *activation_code(act), of_pixels(y, y_pitch, y.shape, y.dtype), y_pitch, *y_edge.pointers(channels),
        of_pixels(r, r_pitch, y.shape, y.dtype), r_pitch, *r_edge.pointers(channels), y.numel() // channels, channels,
        out.data_ptr(), of_vector(mean, channels), of_vector(var, channels), threads(),
    )  # fmt: skip
    return out, mean, var


def residual_backward(
    dout: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor] | None,
    y: Tensor,
    ty: Transform,
    r: Tensor,
    tr: Transform,
    out: Tensor,
    act: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(G, SP, SPY, SPR): the gradient at the sum and its sums, plain and against each operand's centred values."""
    dout, dout_pitch = addressable(dout)
    out, out_pitch = addressable(out)
    y, y_pitch = addressable(y)
    r, r_pitch = addressable(r)
    channels = y.shape[1]
    y_edge, r_edge = _Edge(ty), _Edge(tr)
    a, b, mean = (None, None, None) if statistics is None else map(vector, statistics)
    g = empty_like(y)
    sum_p, sum_py, sum_pr = torch.empty(3, channels).unbind()
    _residual_backward(
        ELEMENT_CODES[y.dtype], *activation_code(act), of_pixels(dout, dout_pitch, y.shape, y.dtype), dout_pitch,
        of_vector(a, channels), of_vector(b, channels), of_vector(mean, channels),
        of_pixels(out, out_pitch, y.shape, y.dtype), out_pitch, of_pixels(y, y_pitch, y.shape, y.dtype), y_pitch,
        *y_edge.pointers(channels), of_pixels(r, r_pitch, y.shape, y.dtype), r_pitch, *r_edge.pointers(channels),
        y.numel() // channels, channels, g.data_ptr(),
        sum_p.data_ptr(), sum_py.data_ptr(), sum_pr.data_ptr(), threads(),
    )  # fmt: skip
    return g, sum_p, sum_py if y_edge.is_affine else None, sum_pr if r_edge.is_affine else None


def max_pool_forward(
    x: Tensor, transform: Transform, geometry: PoolGeometry, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(max pool of transform(x) in x's dtype, uint8 position of the maximum inside its window)."""
    x, pitch = addressable(x)
    n, channels, height, width = x.shape
    size = _pooled_size(x, geometry)
    edge = _Edge(transform)
    y = kept_activation((n, channels, *size), x.dtype, x.device)
    index = kept_activation((n, channels, *size), torch.uint8, x.device)
    _max_pool_forward(
        ELEMENT_CODES[x.dtype], *edge.activation, of_pixels(x, pitch, x.shape, x.dtype), pitch, n, height, width, channels,
        *edge.pointers(channels), *geometry.kernel, *geometry.stride, *geometry.padding, *size, y.data_ptr(), index.data_ptr(), threads(),
    )  # fmt: skip
    return y, index


def max_pool_backward(
    dy: Tensor,
    index: Tensor,
    x: Tensor,
    transform: Transform,
    geometry: PoolGeometry,
    *,
    accumulate: Tensor | None = None,
) -> Sums:
    """(dx, SP, SPX) of :func:`max_pool_forward`."""
    x, pitch = addressable(x)
    dy, dy_pitch = addressable(dy)
    index, index_pitch = addressable(index)
    n, channels, height, width = x.shape
    pooled = (n, channels, *_pooled_size(x, geometry))
    edge = _Edge(transform)
    out = destination(x, accumulate)
    sum_p, sum_px = edge.sums(channels)
    _max_pool_backward(
        ELEMENT_CODES[x.dtype], *edge.activation, of_pixels(dy, dy_pitch, pooled, x.dtype), dy_pitch,
        of_pixels(index, index_pitch, pooled, torch.uint8), index_pitch, of_pixels(x, pitch, x.shape, x.dtype), pitch,
        n, height, width, channels, *edge.pointers(channels), *geometry.kernel, *geometry.stride, *geometry.padding, *pooled[2:],
        *_place(out, x), out is accumulate, of_vector(sum_p, channels), of_vector(sum_px, channels), threads(),
    )  # fmt: skip
    return _delivered(out, accumulate), sum_p, sum_px


def supports(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why kernel ``name`` cannot run these arguments, in one line, or None."""
    tensors = [value for value in args if isinstance(value, Tensor) and value.dim() > 2]
    activation = args[2] if name == "squeeze_backward" else args[0]
    if reason := unsupported_tensor(activation):
        return reason
    dtype = activation.dtype
    if any(t.dtype != dtype for t in tensors if t.dtype is not torch.uint8) or kwargs.get("dtype", dtype) != dtype:
        return "the tensors of one sweep must have one dtype"
    for value in args:
        if isinstance(value, str) and (reason := unsupported_activation(value)):
            return reason
        if isinstance(value, Transform):
            if value.gate is not None:
                return "a gate is applied by convolutions only"
            if reason := unsupported_activation(value.act):
                return reason
        if isinstance(value, PoolGeometry) and (reason := _unusable_window(value)):
            return reason
    if name == "max_pool_forward" and min(_pooled_size(args[0], args[2])) < 1:
        return "a result without pixels"
    return None


def _unusable_window(geometry: PoolGeometry) -> str | None:
    """Why the pooling kernels cannot take this window, or None."""
    if geometry.kernel[0] * geometry.kernel[1] > 255:
        return "a pooling window has at most 255 positions"
    fits = all(0 <= 2 * p <= k for p, k in zip(geometry.padding, geometry.kernel, strict=True))
    if min(*geometry.kernel, *geometry.stride) < 1 or not fits:
        return "a pooling window that PyTorch refuses"
    return None


class _Edge:
    """A transform as the kernels take it. Keeps its vectors alive while their pointers are in use."""

    __slots__ = ("_act", "_vectors", "is_affine")

    def __init__(self, t: Transform) -> None:
        self._act = t.act
        self._vectors = vector(t.mean), vector(t.scale), vector(t.beta)
        self.is_affine = t.mean is not None

    @property
    def activation(self) -> tuple[int, float]:
        return activation_code(self._act)

    def pointers(self, channels: int) -> tuple[int, int, int]:
        mean, scale, beta = self._vectors
        return of_vector(mean, channels), of_vector(scale, channels), of_vector(beta, channels)

    def sums(self, channels: int) -> tuple[Tensor | None, Tensor | None]:
        """Memory for SP and SPX, which only a transform with a mean has."""
        if not self.is_affine:
            return None, None
        sum_p, sum_px = torch.empty(2, channels).unbind()
        return sum_p, sum_px


def _place(out: Tensor, x: Tensor) -> tuple[int, int]:
    """(address, pitch) of what is written: of x's shape and dtype."""
    pitch = pitch_of(out)
    return of_pixels(out, pitch, x.shape, x.dtype), pitch


def _delivered(out: Tensor, accumulate: Tensor | None) -> Tensor:
    """``out``, added to ``accumulate`` where the kernel could not write there itself."""
    return out if accumulate is None or out is accumulate else accumulate.add_(out)


def _pooled_size(x: Tensor, geometry: PoolGeometry) -> tuple[int, int]:
    """Output size of a max pooling; in ceil_mode the last window must start inside the input or its left padding."""
    sizes = []
    for n, k, s, p in zip(x.shape[2:], geometry.kernel, geometry.stride, geometry.padding, strict=True):
        size = (n + 2 * p - k + (s - 1 if geometry.ceil_mode else 0)) // s + 1
        if geometry.ceil_mode and (size - 1) * s >= n + p:
            size -= 1
        sizes.append(size)
    return sizes[0], sizes[1]
