"""The fused nodes as registered operators, ``torch.ops.bnrestructure.*``: schema, fake function and autograd.

They are the functional forms, without chains, shared buffers and gains: each returns fresh tensors, so torch.compile and torch.export can
see, reorder and differentiate them. The nodes of ``ops`` become these while torch.compile traces; eager regions call kernels directly.
Activations come back channels_last; statistics that were not asked for come back empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bnrestructure.core.edges import (
    BackwardEdge,
    ConvGeometry,
    Transform,
    accumulation_dtype,
    statistics_factors,
)
from bnrestructure.core.memory_format import in_channels_last
from bnrestructure.kernels import registry
from bnrestructure.kernels.calls import (
    ConvBackward,
    ConvForward,
    NormaliseBackward,
    NormaliseForward,
    StatisticsBackward,
    StatisticsForward,
)

__all__ = ["conv", "conv_backward", "normalise", "normalise_backward", "statistics", "statistics_backward"]

_custom_op = torch.library.custom_op


def _last(x: Tensor) -> Tensor:
    """x with the strides that the fake functions promise."""
    return in_channels_last(x) if x.dim() in (4, 5) else x.contiguous()


def _fake(x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return _last(x.new_empty(shape, dtype=dtype))


def _vector(x: Tensor, size: int) -> Tensor:
    return x.new_empty((size,), dtype=accumulation_dtype(x.dtype))


def _given(x: Tensor | None, like: Tensor) -> Tensor:
    """Outputs may not be None."""
    return like.new_empty((0,)) if x is None else x


def _apart(*outputs: Tensor, of: Tensor) -> tuple[Tensor, ...]:
    """The outputs, without memory in common with each other or with the input ``of``: kernels hand out sums as parts of one tensor."""
    taken = {of.untyped_storage().data_ptr()}
    found = []
    for output in outputs:
        storage = output.untyped_storage().data_ptr()
        found.append(output.clone() if storage in taken and output.numel() else output)
        taken.add(storage)
    return tuple(found)


@_custom_op("bnrestructure::conv", mutates_args=())
def conv(
    x: Tensor,
    mean: Tensor | None,
    scale: Tensor | None,
    beta: Tensor | None,
    act: str,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Sequence[int],
    statistics: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, var) of ``ops.conv``; ``geometry`` is ``ConvGeometry.flat``."""
    transform = Transform(mean, scale, beta, act, gate)
    call = ConvForward(x, transform, weight, bias, ConvGeometry.of_flat(geometry), dtype, statistics)
    y, ymean, yvar = registry.run(backend, call)
    y, ymean, yvar = _apart(_last(y), _given(ymean, weight), _given(yvar, weight), of=x)
    return y, ymean, yvar


@conv.register_fake
def _(x, mean, scale, beta, act, gate, weight, bias, geometry, statistics, dtype, backend):  # type: ignore[no-untyped-def]
    size = ConvGeometry.of_flat(geometry).output_size(tuple(x.shape[2:]), tuple(weight.shape[2:]))
    y = _fake(x, (x.shape[0], weight.shape[0], *size), dtype)
    if not statistics:
        return y, weight.new_empty((0,)), weight.new_empty((0,))
    return y, _vector(y, weight.shape[0]), _vector(y, weight.shape[0])


@_custom_op("bnrestructure::conv_backward", mutates_args=())
def conv_backward(
    dy: Tensor,
    of_statistics: Sequence[Tensor],
    x: Tensor,
    vectors: Sequence[Tensor],
    act: str,
    gate: Tensor | None,
    weight: Tensor,
    geometry: Sequence[int],
    dtype: torch.dtype,
    needs_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, SP, SPX, dgate, dweight, dbias) of ``ops.conv``; those that do not apply are empty.

    ``of_statistics`` is (dmean, dvar, y, y's mean), ``vectors`` (mean, scale, beta) of the transform: all of them or none.
    """
    edge = BackwardEdge()
    if of_statistics:
        dmean, dvar, y, y_mean = of_statistics
        edge = BackwardEdge(None, *statistics_factors(y, y_mean, dmean, dvar), y, y_mean)
    mean, scale, beta = vectors or (None, None, None)
    transform, needs = Transform(mean, scale, beta, act, gate), (True, True, needs_bias)
    g = registry.run(backend, ConvBackward(dy, edge, x, transform, weight, ConvGeometry.of_flat(geometry), dtype, needs))
    assert g.dx is not None
    assert g.weight is not None
    sum_p, sum_px, gate_gradient, bias = (_given(t, weight) for t in (g.sum_p, g.sum_px, g.gate, g.bias))
    dx, sum_p, sum_px, gate_gradient, dweight, bias = _apart(_last(g.dx), sum_p, sum_px, gate_gradient, g.weight.contiguous(), bias, of=dy)
    return dx, sum_p, sum_px, gate_gradient, dweight, bias


@conv_backward.register_fake
def _(dy, of_statistics, x, vectors, act, gate, weight, geometry, dtype, needs_bias, backend):  # type: ignore[no-untyped-def]
    none = weight.new_empty((0,))
    sums = (none, none) if not vectors or gate is not None else (_vector(x, x.shape[1]), _vector(x, x.shape[1]))
    dgate = weight.new_empty((0,)) if gate is None else torch.empty_like(gate)
    dbias = weight.new_empty((weight.shape[0],), dtype=dtype) if needs_bias else weight.new_empty((0,))
    return _fake(x, x.shape, x.dtype), sums[0].clone(), sums[1].clone(), dgate, torch.empty_like(weight).contiguous(), dbias


def _conv_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, mean, scale, beta, act, gate, weight, bias, geometry, statistics, dtype, backend = inputs
    y, y_mean, _ = output
    ctx.plain = (act, geometry, dtype, backend, bias is not None, statistics)
    ctx.save_for_backward(x, mean, scale, beta, gate, weight, y, y_mean)


def _conv_gradient(ctx: Any, dy: Tensor, dmean: Tensor, dvar: Tensor) -> tuple[Any, ...]:
    act, geometry, dtype, backend, has_bias, statistics = ctx.plain
    x, mean, scale, beta, gate, weight, y, y_mean = ctx.saved_tensors
    of_statistics = [dmean, dvar, y, y_mean] if statistics else []
    vectors = [] if mean is None else [mean, scale, beta]
    dx, sum_p, sum_px, dgate, dweight, dbias = conv_backward(
        dy, of_statistics, x, vectors, act, gate, weight, geometry, dtype, has_bias, backend
    )
    gradients = (None, None, None) if mean is None or gate is not None else (-scale * sum_p, sum_px, sum_p)
    return (dx, *gradients, None, None if gate is None else dgate, dweight, dbias if has_bias else None, *[None] * 4)


conv.register_autograd(_conv_gradient, setup_context=_conv_context)


@_custom_op("bnrestructure::statistics", mutates_args=())
def statistics(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """(mean, biased var) of ``ops.statistics``."""
    mean, var = _apart(*registry.run(backend, StatisticsForward(x)), of=x)
    return mean, var


@statistics.register_fake
def _(x, backend):  # type: ignore[no-untyped-def]
    return _vector(x, x.shape[1]), _vector(x, x.shape[1])


@_custom_op("bnrestructure::statistics_backward", mutates_args=())
def statistics_backward(x: Tensor, mean: Tensor, dmean: Tensor, dvar: Tensor, backend: str) -> Tensor:
    """``2 dvar / M * (x - mean) + dmean / M`` in x's dtype."""
    return _last(registry.run(backend, StatisticsBackward(x, mean, *statistics_factors(x, mean, dmean, dvar))))


@statistics_backward.register_fake
def _(x, mean, dmean, dvar, backend):  # type: ignore[no-untyped-def]
    return _fake(x, x.shape, x.dtype)


def _statistics_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.backend = inputs[1]
    ctx.save_for_backward(inputs[0], output[0])


def _statistics_gradient(ctx: Any, dmean: Tensor, dvar: Tensor) -> tuple[Any, ...]:
    x, mean = ctx.saved_tensors
    return statistics_backward(x, mean, dmean, dvar, ctx.backend), None


statistics.register_autograd(_statistics_gradient, setup_context=_statistics_context)


@_custom_op("bnrestructure::normalise", mutates_args=())
def normalise(x: Tensor, mean: Tensor, scale: Tensor, beta: Tensor, act: str, backend: str) -> Tensor:
    """z of ``ops.normalise``."""
    z = registry.run(backend, NormaliseForward(x, Transform(mean, scale, beta, act), x.dtype))
    return _apart(_last(z), of=x)[0]


@normalise.register_fake
def _(x, mean, scale, beta, act, backend):  # type: ignore[no-untyped-def]
    return _fake(x, x.shape, x.dtype)


@_custom_op("bnrestructure::normalise_backward", mutates_args=())
def normalise_backward(
    dz: Tensor, x: Tensor, mean: Tensor, scale: Tensor, beta: Tensor, act: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, SP, SPX)."""
    found = registry.run(backend, NormaliseBackward(dz, x, Transform(mean, scale, beta, act)))
    dx, sum_p, sum_px = _apart(_last(found.dx), _given(found.sum_p, x), _given(found.sum_px, x), of=dz)
    return dx, sum_p, sum_px


@normalise_backward.register_fake
def _(dz, x, mean, scale, beta, act, backend):  # type: ignore[no-untyped-def]
    return _fake(x, x.shape, x.dtype), _vector(x, x.shape[1]), _vector(x, x.shape[1])


def _normalise_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.plain = inputs[4:]
    ctx.save_for_backward(*inputs[:4])


def _normalise_gradient(ctx: Any, dz: Tensor) -> tuple[Any, ...]:
    x, mean, scale, beta = ctx.saved_tensors
    dx, sum_p, sum_px = normalise_backward(dz, x, mean, scale, beta, *ctx.plain)
    return dx, -scale * sum_p, sum_px, sum_p, None, None


normalise.register_autograd(_normalise_gradient, setup_context=_normalise_context)
