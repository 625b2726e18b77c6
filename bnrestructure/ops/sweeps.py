"""Nodes for what reads a normalised tensor and is no convolution: a plain sweep, a max pool, a global average (squeeze)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnrestructure.core.aliases import alias
from bnrestructure.core.edges import PoolGeometry, Transform, accumulation_dtype
from bnrestructure.kernels import registry
from bnrestructure.kernels.calls import (
    MaxPoolBackward,
    MaxPoolForward,
    NormaliseBackward,
    NormaliseForward,
    SqueezeBackward,
    SqueezeForward,
    SweepGradients,
)
from bnrestructure.kernels.operands import readable
from bnrestructure.ops import library
from bnrestructure.ops.concat import concat_buffer
from bnrestructure.ops.dispatch import compute_dtype, guard_second_derivative, in_format_of, passed_on
from bnrestructure.ops.gate import with_gate
from bnrestructure.ops.slots import Slot, incoming_gradient, opened

__all__ = ["NormaliseOutputs", "PoolOutputs", "SqueezeOutputs", "max_pool", "normalise", "squeeze"]


class NormaliseOutputs(NamedTuple):
    """z, the normalised and activated x, multiplied and added to where that is asked for; passed is x for its next reader when chained.

    z has x's shape and dtype, or those of PyTorch's product and sum where a factor or what is added has others. ``buffer`` is the buffer of
    a concat that z was written into; z is then a slice of it, with a gradient of its own.
    """

    z: Tensor
    passed: Tensor | None
    buffer: Tensor | None


class PoolOutputs(NamedTuple):
    """z [N, C, *spatial_out], the pooled, normalised and activated x; passed is x for its next reader when chained."""

    z: Tensor
    passed: Tensor | None


class SqueezeOutputs(NamedTuple):
    """pooled [N, C], the mean of z over the spatial positions; deferred is x standing for z, for a reader with a gate."""

    pooled: Tensor
    deferred: Tensor | None


def _gradients(ctx: Any, x: Tensor, scale: Tensor | None, found: SweepGradients) -> tuple[Any, ...]:
    """Gradients of (x, mean, scale, beta), a function's first inputs, from a sweep's."""
    dx, sum_p, sum_px, _ = found
    if scale is None or sum_p is None:
        return in_format_of(x, dx), None, None, None
    return in_format_of(x, dx), -scale * sum_p if ctx.needs_input_grad[1] else None, sum_px, sum_p


def normalise(
    x: Tensor,
    transform: Transform,
    r: Tensor | None = None,
    *,
    factor: Tensor | None = None,
    slot: Slot | None = None,
    chain: bool = False,
    backend: str = "auto",
) -> NormaliseOutputs:
    """(``act((x - mean) * scale + beta) * gate * factor + r`` in x's dtype, x passed through when chained), in one sweep over memory.

    With a gate x is what :func:`squeeze` deferred, and gets the gradient at what the gate multiplies. ``factor`` is one number for each
    image, as stochastic depth draws it. Gate, factor and r may have any shape that PyTorch's product and sum take; what kernels do not know
    is multiplied or added in a step of its own. r gets the gradient of the result, the very tensor, as from PyTorch's sum. ``slot`` is a
    place for the result in a concat's buffer.
    """
    in_a_step_of_its_own = transform.gate is not None or torch.compiler.is_compiling()
    if factor is not None and (in_a_step_of_its_own or not _is_of_images(factor, x)):
        z, passed, _ = normalise(x, transform, chain=chain, backend=backend)
        product = z * readable(factor)
        return _in_slot(product if r is None else product + readable(r), passed, slot)
    if transform.gate is not None:
        x, transform = with_gate(x, transform, backend)
        if transform.gate is None:
            return _in_slot(x if r is None else x + readable(r), None, slot)
    mean, scale, beta, act, gate = transform
    plain = not chain and gate is None and slot is None
    if torch.compiler.is_compiling() and plain and mean is not None and scale is not None and beta is not None:
        z = library.normalise(x, mean, scale, beta, act, backend)
        return NormaliseOutputs(z if r is None else z + r, None, None)
    if r is not None and (r.shape != x.shape or r.dtype is not x.dtype):
        z, passed, _ = _Normalise.apply(x, mean, scale, beta, gate, factor, None, None, act, None, chain, backend)
        return _in_slot(z + readable(r), passed, slot)
    into, placed = (None, None) if slot is None else (slot.into, slot._replace(into=None))
    return NormaliseOutputs(*_Normalise.apply(x, mean, scale, beta, gate, factor, r, into, act, placed, chain, backend))


def _is_of_images(factor: Tensor, x: Tensor) -> bool:
    """Whether a factor is a constant number for each image, or for all, that leaves the dtype of x as it is."""
    shape = (factor.shape[0] if factor.dim() else 1, *[1] * (x.dim() - 1))
    fits = factor.dim() in (0, x.dim()) and factor.numel() in (1, x.shape[0]) and (factor.dim() == 0 or factor.shape == shape)
    return fits and not factor.requires_grad and torch.result_type(x, factor) is x.dtype and factor.device == x.device


def _in_slot(z: Tensor, passed: Tensor | None, slot: Slot | None) -> NormaliseOutputs:
    """The outputs where z is in memory already: it is copied to its place."""
    if slot is None:
        return NormaliseOutputs(z, passed, None)
    assert slot.offset is not None
    buffer = concat_buffer(z, into=slot.into, offset=slot.offset, channels=slot.channels or 0, visible=slot.visible)
    return NormaliseOutputs(z, passed, buffer)


class _Normalise(torch.autograd.Function):
    """:func:`normalise` says what the arguments mean; ``placed`` is the slot without its buffer, which is ``into``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Any,
        mean: Any,
        scale: Any,
        beta: Any,
        gate: Any,
        factor: Any,
        r: Any,
        into: Any,
        act: str,
        placed: Slot | None,
        chain: bool,
        backend: str,
    ) -> Any:
        ctx.act, ctx.backend = act, backend
        factors = None if factor is None else _by_channel(factor, x)
        ctx.save_for_backward(x, mean, scale, beta, gate, factors)
        ctx.set_materialize_grads(False)
        buffer = out = ctx.written = None
        if placed is not None:
            buffer, out, ctx.written = opened(placed._replace(into=into), x.shape, x.dtype, x.device)
        transform = Transform(mean, scale, beta, act, gate if factors is None else factors)
        z = registry.run(backend, NormaliseForward(x, transform, x.dtype, out, r))
        passed = passed_on(ctx, x) if chain else None
        if into is not None and True not in ctx.needs_input_grad[:7]:  # the rest of the buffer is no reason for a gradient at z
            ctx.mark_non_differentiable(*(t for t in (z, passed) if t is not None))
        return z, passed, buffer

    @staticmethod
    def backward(ctx: Any, dz: Any, dpassed: Any, dbuffer: Any) -> Any:
        x, mean, scale, beta, gate, factors = ctx.saved_tensors
        dinto = None
        if dbuffer is not None:
            dslice, dinto = incoming_gradient(ctx.written, dbuffer)
            dz = dslice if dz is None else dz + dslice
        if dz is None or True not in ctx.needs_input_grad[:7]:
            return guard_second_derivative((dpassed, *[None] * 6, dinto, *[None] * 4))
        transform = Transform(mean, scale, beta, ctx.act, gate)
        found = registry.run(ctx.backend, NormaliseBackward(dz, x, transform, dpassed, factors=factors))
        dr = dz if ctx.needs_input_grad[6] else None
        return guard_second_derivative((*_gradients(ctx, x, scale, found), found.gate, None, dr, dinto, *[None] * 4))


def _by_channel(factor: Tensor, x: Tensor) -> Tensor:
    """A factor of each image as kernels take one, [N, C] in the accumulation dtype."""
    wide = readable(factor).detach().to(accumulation_dtype(x.dtype)).expand(*x.shape[:2], *[1] * (x.dim() - 2))
    return wide.reshape(x.shape[:2])


def max_pool(
    x: Tensor, transform: Transform, geometry: PoolGeometry, *, chain: bool = False, backend: str = "auto"
) -> PoolOutputs:
    """(max pool of ``act((x - mean) * scale + beta)``, x passed through when chained). 2-D, dilation 1, at most 255 positions."""
    return PoolOutputs(*_MaxPool.apply(x, *transform[:4], geometry, chain, backend))


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Any, mean: Any, scale: Any, beta: Any, act: str, geometry: PoolGeometry, chain: bool, backend: str
    ) -> Any:
        y, index = registry.run(backend, MaxPoolForward(x, Transform(mean, scale, beta, act), geometry, x.dtype))
        ctx.act, ctx.geometry, ctx.backend = act, geometry, backend
        ctx.save_for_backward(x, mean, scale, beta, index)
        ctx.set_materialize_grads(False)
        return y, passed_on(ctx, x) if chain else None

    @staticmethod
    def backward(ctx: Any, dy: Any, dpassed: Any) -> Any:
        x, mean, scale, beta, index = ctx.saved_tensors
        if dy is None:
            return guard_second_derivative((dpassed, *[None] * 7))
        call = MaxPoolBackward(dy, index, x, Transform(mean, scale, beta, ctx.act), ctx.geometry, dpassed)
        return guard_second_derivative((*_gradients(ctx, x, scale, registry.run(ctx.backend, call)), None, None, None, None))


def squeeze(
    x: Tensor, transform: Transform, *, excite: bool = False, backend: str = "auto"
) -> SqueezeOutputs:
    """(mean over the spatial positions of ``z = act((x - mean) * scale + beta)``, [N, C]; the deferred z when ``excite``).

    The second output is x again, standing for z: a reader with a ``gate`` applies the transform itself and sends back the gradient
    *at z*. This node's backward adds the average's share, applies the mask and takes the sums, in one sweep, in place.
    """
    return SqueezeOutputs(*_Squeeze.apply(x, *transform[:4], excite, backend))


class _Squeeze(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, mean: Any, scale: Any, beta: Any, act: str, excite: bool, backend: str) -> Any:
        ctx.act, ctx.backend = act, backend
        ctx.save_for_backward(x, mean, scale, beta)
        ctx.set_materialize_grads(False)
        dtype = compute_dtype(x) if excite else x.dtype
        pooled = registry.run(backend, SqueezeForward(x, Transform(mean, scale, beta, act), dtype))
        return pooled, alias(x) if excite else None

    @staticmethod
    def backward(ctx: Any, dpooled: Any, dz: Any) -> Any:
        x, mean, scale, beta = ctx.saved_tensors
        transform = Transform(mean, scale, beta, ctx.act)
        if dpooled is None and dz is None:
            return (None,) * 7
        if dpooled is None:
            found = registry.run(ctx.backend, NormaliseBackward(dz, x, transform))
        else:
            found = registry.run(ctx.backend, SqueezeBackward(dpooled, dz, x, transform, dz))
        return guard_second_derivative((*_gradients(ctx, x, scale, found), None, None, None))
