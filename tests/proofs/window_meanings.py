"""What PyTorch's operators between pixels mean in the algebra: convolutions, pools, and the index arithmetic of max pooling."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import sympy as sp
from algebra import Level, NotProved, expanded
from channel_runs import Meaning, Value, failed, parts, runs
from torch import Tensor

if TYPE_CHECKING:
    from symbolic import Symbolic

__all__ = ["WINDOWS"]


def _is_pool(kernel: sp.Expr, x: Tensor, groups: int) -> bool:
    """Whether a convolution does the same with each channel by itself."""
    return not kernel.free_symbols and groups == x.shape[1]


def _geometry(args: Sequence[Any], first: int, weight: Tensor) -> tuple[Any, ...]:
    """Kernel, stride, padding, dilation, groups."""
    stride, padding, dilation, transposed, _, groups = args[first : first + 6]
    if transposed:
        raise NotProved("a transposed convolution")
    return (*map(tuple, (weight.shape[2:], stride, padding, dilation)), groups)


def _convolution(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
    x, weight, bias = args[:3]
    for value in values[:3]:
        failed(value)
    geometry, space = _geometry(args, 3, weight), s.space(result.shape)
    kernel = values[1][0][1]
    if _is_pool(kernel, x, geometry[-1]) and bias is None:
        return [tuple((n, s.algebra.convolution(kernel, e, "each", geometry, space)) for n, e in values[0])]
    total = sum(s.algebra.convolution(kernel, e, part, geometry, space) for part, e in parts(values[0], x.shape[1]))
    if bias is not None:
        total += values[2][0][1]
    return [s.uniform(result, total)]


def _convolution_backward(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
    d, x, weight = args[:3]
    geometry = _geometry(args, 4, weight)
    need_input, need_weight, need_bias = args[10]
    for value in (values[0], values[2], *([values[1]] if need_weight else [])):
        failed(value)
    kernel, space = values[2][0][1], s.space(x.shape)
    if _is_pool(kernel, x, geometry[-1]) and not need_weight and not need_bias:
        return [tuple((n, s.algebra.convolution_transposed(kernel, e, "each", geometry, space)) for n, e in values[0]), None, None]
    if len(values[0]) != 1:
        raise NotProved("a convolution whose output has several runs of channels")
    gradient = values[0][0][1]
    runs_of_x: Value = ((0, sp.Integer(0)),) if isinstance(values[1], Exception) else values[1]
    dx = dw = db = None
    if need_input:
        ranges = [part for part, _ in parts(runs_of_x, x.shape[1])]
        dx = tuple((b - a, s.algebra.convolution_transposed(kernel, gradient, (a, b), geometry, space)) for a, b in ranges)
    if need_weight:
        dw = ((0, sum(s.algebra.weight_gradient(gradient, e, part, geometry) for part, e in parts(runs_of_x, x.shape[1]))),)
    if need_bias:
        db = s.uniform(result[2], s.algebra.sum_batch(gradient, s.space(d.shape)))
    return [dx, dw, db]


def _average_geometry(x: Tensor, args: Sequence[Any]) -> tuple[Any, ...]:
    """That of the depthwise convolution with ones, which an average pool that counts its padding is, but for a number."""
    kernel, stride, padding, rounds_up, counts_padding, divisor = [*args, *[None] * 6][:6]
    if rounds_up or counts_padding is False or divisor is not None:
        raise NotProved("an average pool that rounds up, leaves its padding out or divides otherwise")
    return (*map(tuple, (kernel, stride or kernel, padding or (0, 0), (1, 1))), x.shape[1])


def _average(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
    failed(values[0])
    geometry, space = _average_geometry(args[0], args[1:]), s.space(result.shape)
    return [tuple((n, s.algebra.convolution(sp.Integer(1), e, "each", geometry, space) / prod(geometry[0])) for n, e in values[0])]


def _average_backward(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
    failed(values[0])
    geometry, space = _average_geometry(args[1], args[2:]), s.space(args[1].shape)
    each = [(n, s.algebra.convolution_transposed(sp.Integer(1), e, "each", geometry, space)) for n, e in values[0]]
    return [tuple((n, e / prod(geometry[0])) for n, e in each)]


def _arange(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
    """The position along a dimension of this length."""
    if len(args) != 1:
        raise NotProved(f"arange{tuple(args)}")
    return [((0, s.algebra.leaf(f"position{args[0]}", Level.NUMBER)),)]


def _quotient(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> tuple[sp.Expr, sp.Expr]:
    """(quotient, remainder) of an integer expression that is a multiple of the divisor and a number known to be less."""
    failed(values[0])
    divisor, dividend = int(args[1]), values[0][0][1]
    for remainder in s.remainders[divisor]:
        quotient = expanded((dividend - remainder) / divisor)
        if all(term.as_coeff_Mul()[0].is_Integer for term in sp.Add.make_args(quotient)):
            return quotient, remainder
    raise NotProved(f"nothing is known of {dividend} divided by {divisor}")


def _floor_divide(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
    return [((0, _quotient(s, args, kwargs, values, result)[0]),)]


def _remainder(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
    return [((0, _quotient(s, args, kwargs, values, result)[1]),)]


def _window(args: Sequence[Any]) -> tuple[Any, ...]:
    """Kernel, stride and padding of a max pool's arguments; with dilation and rounding up it is another."""
    kernel, stride, padding, dilation = ([*args, *[None] * 5][i] for i in range(1, 5))
    if dilation not in (None, 1, [1, 1], (1, 1)):
        raise NotProved("a dilated max pool")
    return tuple(kernel), tuple(stride or kernel), tuple(padding or (0, 0)), bool(args[5]) if len(args) > 5 else False


def _max_pool(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
    """The maxima, and where each lies in its image: in row ``row`` and column ``column``, inside its window."""
    failed(values[0])
    x, window = args[0], _window(args)
    pooled = tuple((n, s.algebra.maximum(e, window, s.space(result[0].shape))) for n, e in values[0])
    width = x.shape[3]
    row, column = (s.algebra.leaf(f"{name}_{pooled[0][1]}", Level.NUMBER) for name in ("row", "column"))
    left = s.algebra.leaf(f"position{result[0].shape[3]}", Level.NUMBER) * window[1][1] - window[2][1]
    s.remainders[width].append(column)
    s.remainders[window[0][1]].append(expanded(column - left))
    place = row * width + column
    s.places[place] = values[0], window
    return [pooled, ((0, place),)]


def _scattered(s: Symbolic, place: sp.Expr, gradient: Value) -> Value:
    if place not in s.places:
        raise NotProved(f"{place} is no place of a maximum")
    value, window = s.places[place]
    return tuple((n, s.algebra.scattered(e, g, window, s.algebra.space(e))) for n, (e, g) in runs([value, gradient]))


def _max_pool_backward(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
    return [_scattered(s, values[7][0][1], values[0])]


def _scatter_add(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
    before = {e for _, e in values[0]}
    if before != {sp.Integer(0)} or args[1] != 2:
        raise NotProved("scatter_add to what is not zero, or along another dimension than the pixels")
    return [_scattered(s, values[2][0][1], values[3])]


WINDOWS: dict[str, Meaning] = {
    "arange": _arange,
    "floor_divide": _floor_divide,
    "remainder": _remainder,
    "max_pool2d_with_indices": _max_pool,
    "max_pool2d_with_indices_backward": _max_pool_backward,
    "scatter_add": _scatter_add,
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "avg_pool2d": _average,
    "avg_pool2d_backward": _average_backward,
}
