"""What each of PyTorch's operators means in the algebra. An operator that is not here fails a proof; none is guessed.

A meaning takes (mode, args, kwargs, values of the tensors among args, result) and gives the value of each result. Conversions of
dtype are the identity: proofs are about exact arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import sympy as sp
from algebra import Level, NotProved, expanded
from torch import Tensor

if TYPE_CHECKING:
    from symbolic import Symbolic, Value

__all__ = ["MEANINGS", "VIEWS", "runs"]

Meaning = Callable[..., Sequence[Any]]

#: Operators whose result shares its argument's storage, and with it what it holds; and those that leave memory unwritten.
VIEWS = frozenset({
    "view", "_unsafe_view", "reshape", "expand", "permute", "unsqueeze", "squeeze", "slice", "narrow", "split", "split_with_sizes",
    "alias", "detach", "as_strided", "as_strided_", "set_", "t", "transpose", "movedim", "view_as", "chunk", "unbind", "select",
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided",
})  # fmt: skip


def _failed(value: Any) -> None:
    if isinstance(value, Exception):
        raise value


def runs(values: Sequence[Value]) -> list[tuple[int, list[sp.Expr]]]:
    """Values side by side: cut where any of them is cut; what is the same for all channels goes with each."""
    for value in values:
        _failed(value)
    cuts: set[int] = set()
    for value in values:
        at = 0
        for n, _ in value:
            at += n
            cuts.add(at)
    edges = sorted(cuts - {0})
    if not edges:
        return [(0, [value[0][1] for value in values])]
    found = []
    first = 0
    for edge in edges:
        row = []
        for value in values:
            at = 0
            for n, expression in value:
                if n == 0 or (at <= first and edge <= at + n):
                    if n and (at, at + n) != (first, edge) and expression.free_symbols:
                        raise NotProved(f"channels {first} to {edge} of what was made as {at} to {at + n}")
                    row.append(expression)
                    break
                at += n
            else:
                raise NotProved("tensors of different numbers of channels meet")
        found.append((edge - first, row))
        first = edge
    return found


def _pointwise(function: Callable[..., sp.Expr]) -> Meaning:
    """An operator of each value for itself, its result multiplied out; numbers among the arguments take part."""

    def meaning(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
        operands = [values[i] if isinstance(a, Tensor) else ((0, s.number(a)),) for i, a in enumerate(args) if _is_operand(a)]
        return [tuple((n, function(s, *row, **kwargs)) for n, row in runs(operands))]

    return meaning


def _is_operand(argument: Any) -> bool:
    return isinstance(argument, (Tensor, int, float)) and not isinstance(argument, bool)


def _same(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
    _failed(values[0])
    return [values[0]]


def _copy(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
    _failed(values[1])
    return [values[1]]


def _filled(number: Callable[[Any], Any]) -> Meaning:
    def meaning(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
        return [s.uniform(result, s.number(number(args)))]

    return meaning


def _power(s: Symbolic, base: sp.Expr, exponent: sp.Expr) -> sp.Expr:
    if not (exponent.is_Integer and exponent > 0):
        raise NotProved(f"a power of {exponent}")
    return expanded(base**exponent)


def _divide(s: Symbolic, a: sp.Expr, b: sp.Expr) -> sp.Expr:
    if s.algebra.level(b) > Level.CHANNEL or (b.is_Add and s.algebra.level(b) > Level.NUMBER):
        raise NotProved(f"a division by {b}")
    return expanded(a / b)


def _reduced(s: Symbolic, x: Tensor, dims: Sequence[int], expression: sp.Expr) -> sp.Expr:
    """The sum of ``expression`` over dimensions of x: all that are pixels', or the images', or both."""
    channel = s.channel_dim(x)
    over = {d % x.dim() for d in dims if x.shape[d] != 1}
    if channel is None or channel in over:
        raise NotProved(f"a sum over dimensions {list(dims)} of {tuple(x.shape)}")
    images = {0} & {d for d in range(x.dim()) if x.shape[d] == s.images}
    pixels = {d for d in range(x.dim()) if d != channel and d not in images and x.shape[d] != 1}
    if over & pixels:
        if over & pixels != pixels:
            raise NotProved(f"a sum over dimensions {list(dims)} of {tuple(x.shape)}")
        expression = s.algebra.sum_pixels(expression, s.spaces[prod(x.shape[d] for d in pixels)])
    if over & images:
        expression = s.algebra.sum_images(expression)
    return expression


def _count(s: Symbolic, x: Tensor, dims: Sequence[int]) -> sp.Expr:
    return _reduced(s, x, dims, sp.Integer(1))


def _dims(x: Tensor, args: Any) -> Sequence[int]:
    return list(range(x.dim())) if len(args) < 2 or args[1] is None else args[1] or list(range(x.dim()))


def _sum(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
    _failed(values[0])
    return [tuple((n, _reduced(s, args[0], _dims(args[0], args), e)) for n, e in values[0])]


def _mean(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
    (total,) = _sum(s, args, kwargs, values, result)
    return [tuple((n, expanded(e / _count(s, args[0], _dims(args[0], args)))) for n, e in total)]


def _mean_and_variance(s: Symbolic, x: Tensor, dims: Sequence[int], correction: int, e: sp.Expr) -> tuple[sp.Expr, sp.Expr]:
    if sorted(d % x.dim() for d in dims) != [d for d in range(x.dim()) if d != 1]:
        raise NotProved(f"a variance over dimensions {list(dims)} of {tuple(x.shape)}")
    space, count = s.space(x.shape), _count(s, x, dims)
    return s.algebra.mean(e, space), expanded(s.algebra.variance(e, space) * (count / (count - correction)))


def _var_mean(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
    _failed(values[0])
    correction = kwargs.get("correction")
    found = [(n, *_mean_and_variance(s, args[0], _dims(args[0], args), 1 if correction is None else correction, e)) for n, e in values[0]]
    return [tuple((n, var) for n, _, var in found), tuple((n, mean) for n, mean, _ in found)]


def _cat(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
    dim = (args[1] if len(args) > 1 else 0) % args[0][0].dim()
    if any(s.channel_dim(x) not in (dim, None) for x in args[0]):
        raise NotProved(f"a concat along dimension {dim}")
    joined: list[tuple[int, sp.Expr]] = []
    for x, value in zip(args[0], values[0], strict=True):
        _failed(value)
        joined += [(n or x.shape[dim], e) for n, e in value]
    return [tuple(joined)]


def _stack(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
    """Rows that each have the same to say of their own image (or rank)."""
    if any(value != values[0][0] for value in values[0]) or len(args[0]) != s.images or (args[1:] and args[1] != 0):
        raise NotProved("a stack of different rows")
    return [values[0][0]]


def _parts(value: Value, channels: int) -> list[tuple[tuple[int, int], sp.Expr]]:
    """(range of channels, expression) of each run."""
    found, at = [], 0
    for n, e in value:
        found.append(((at, at + (n or channels)), e))
        at += n
    return found


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
        _failed(value)
    geometry, space = _geometry(args, 3, weight), s.space(result.shape)
    kernel = values[1][0][1]
    if _is_pool(kernel, x, geometry[-1]) and bias is None:
        return [tuple((n, s.algebra.convolution(kernel, e, "each", geometry, space)) for n, e in values[0])]
    total = sum(s.algebra.convolution(kernel, e, part, geometry, space) for part, e in _parts(values[0], x.shape[1]))
    if bias is not None:
        total += values[2][0][1]
    return [s.uniform(result, total)]


def _convolution_backward(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
    d, x, weight = args[:3]
    geometry = _geometry(args, 4, weight)
    need_input, need_weight, need_bias = args[10]
    for value in (values[0], values[2], *([values[1]] if need_weight else [])):
        _failed(value)
    kernel, space = values[2][0][1], s.space(x.shape)
    if _is_pool(kernel, x, geometry[-1]) and not need_weight and not need_bias:
        return [tuple((n, s.algebra.convolution_transposed(kernel, e, "each", geometry, space)) for n, e in values[0]), None, None]
    if len(values[0]) != 1:
        raise NotProved("a convolution whose output has several runs of channels")
    gradient = values[0][0][1]
    runs_of_x: Value = ((0, sp.Integer(0)),) if isinstance(values[1], Exception) else values[1]
    dx = dw = db = None
    if need_input:
        parts = [(b - a, (a, b)) for (a, b), _ in _parts(runs_of_x, x.shape[1])]
        dx = tuple((n, s.algebra.convolution_transposed(kernel, gradient, part, geometry, space)) for n, part in parts)
    if need_weight:
        dw = ((0, sum(s.algebra.weight_gradient(gradient, e, part, geometry) for part, e in _parts(runs_of_x, x.shape[1]))),)
    if need_bias:
        db = s.uniform(result[2], s.algebra.sum_batch(gradient, s.space(d.shape)))
    return [dx, dw, db]


def _batch_norm(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
    """Batch norm's definition: PyTorch's training mode."""
    x, weight, bias, running_mean, running_var, training, momentum, eps = args[:8]
    if not training:
        raise NotProved("a batch norm that is not in training")
    dims = [d for d in range(x.dim()) if d != 1]
    outputs, means, roots = [], [], []
    vectors = [((0, sp.Integer(1)),) if weight is None else values[1], ((0, sp.Integer(0)),) if bias is None else values[2]]
    moved: list[list[tuple[int, sp.Expr]]] = [[], []]
    old = [((0, sp.Integer(0)),) if r is None else v for r, v in ((running_mean, values[3]), (running_var, values[4]))]
    m, count = s.number(momentum), _count(s, x, dims)
    for n, (e, gamma, beta, old_mean, old_var) in runs([values[0], *vectors, *old]):
        mean, var = _mean_and_variance(s, x, dims, 0, e)
        root = s.algebra.reciprocal_root(var + s.number(eps))
        outputs.append((n, expanded((e - mean) * root * gamma + beta)))
        means.append((n, mean))
        roots.append((n, root))
        moved[0].append((n, expanded((1 - m) * old_mean + m * mean)))
        moved[1].append((n, expanded((1 - m) * old_var + m * var * count / (count - 1))))
    for running, value in zip((running_mean, running_var), moved, strict=True):
        if running is not None:
            s.write(running, tuple(value))
    return [tuple(outputs), tuple(means), tuple(roots), *[None] * (len(result) - 3)]


def _batch_norm_backward(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
    """The derivative of batch norm's definition (shown by test_statistics.py to be reverse.py's)."""
    x, weight = args[1:3]
    if not args[7]:
        raise NotProved("a batch norm that is not in training")
    gamma = ((0, sp.Integer(1)),) if weight is None else values[2]
    space = s.space(x.shape)
    count = _count(s, x, [d for d in range(x.dim()) if d != 1])
    found: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    for n, (gradient, e, scale, mean, root) in runs([values[0], values[1], gamma, values[5], values[6]]):
        total = s.algebra.sum_batch(gradient, space)
        product = s.algebra.sum_batch(expanded(gradient * (e - mean)), space)
        dx = scale * root * (gradient - total / count - root**2 * product * (e - mean) / count)
        for results, expression in zip(found, (dx, root * product, total), strict=True):
            results.append((n, expanded(expression)))
    return [tuple(results) for results in found]


def _activation(name: str, parameters: int = 0) -> Meaning:
    def meaning(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
        _failed(values[0])
        called = _called(name, args[1:], kwargs, parameters)
        return [tuple((n, s.algebra.activation(called, e)) for n, e in values[0])]

    return meaning


def _called(name: str, parameters: Sequence[Any], kwargs: Any, count: int) -> str:
    given = [*parameters[:count], *kwargs.values()]
    return name if not given else f"{name}{tuple(float(p) if not isinstance(p, str) else p for p in given)}"


def _activation_backward(name: str, parameters: int = 0, at: Callable[[Sequence[Any]], bool] = lambda rest: True) -> Meaning:
    """``at`` says whether the further arguments are those of this activation."""

    def meaning(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
        if not at(args[2:]):
            raise NotProved(f"{name} backward with {args[2:]}")
        called = _called(name, args[2:], kwargs, parameters)
        found = []
        for n, (gradient, u) in runs(values[:2]):
            atom = s.algebra.atoms.get(u)
            if name in ("sigmoid", "tanh") and atom is not None and (atom.kind, atom.data) == ("activation", (name,)):
                u = atom.arguments[0]  # PyTorch gives the result, from which the derivative at the argument follows
            found.append((n, s.algebra.chain_rule(gradient, called, u)))
        return [tuple(found)]

    return meaning


def _average_geometry(x: Tensor, args: Sequence[Any]) -> tuple[Any, ...]:
    """That of the depthwise convolution with ones, which an average pool that counts its padding is, but for a number."""
    kernel, stride, padding, rounds_up, counts_padding, divisor = [*args, *[None] * 6][:6]
    if rounds_up or counts_padding is False or divisor is not None:
        raise NotProved("an average pool that rounds up, leaves its padding out or divides otherwise")
    return (*map(tuple, (kernel, stride or kernel, padding or (0, 0), (1, 1))), x.shape[1])


def _average(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
    _failed(values[0])
    geometry, space = _average_geometry(args[0], args[1:]), s.space(result.shape)
    return [tuple((n, s.algebra.convolution(sp.Integer(1), e, "each", geometry, space) / prod(geometry[0])) for n, e in values[0])]


def _average_backward(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
    _failed(values[0])
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
    _failed(values[0])
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
    _failed(values[0])
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


def _add(s: Symbolic, a: sp.Expr, b: sp.Expr, alpha: float = 1) -> sp.Expr:
    return a + s.number(alpha) * b


MEANINGS: dict[str, Meaning] = {
    "add": _pointwise(_add),
    "sub": _pointwise(lambda s, a, b, alpha=1: a - s.number(alpha) * b),
    "rsub": _pointwise(lambda s, a, b, alpha=1: b - s.number(alpha) * a),
    "mul": _pointwise(lambda s, a, b: expanded(a * b)),
    "div": _pointwise(_divide),
    "neg": _pointwise(lambda s, a: -a),
    "square": _pointwise(lambda s, a: expanded(a * a)),
    "pow": _pointwise(_power),
    "rsqrt": _pointwise(lambda s, a: s.algebra.reciprocal_root(a)),
    "clone": _same,
    "_to_copy": _same,
    "contiguous": _same,
    "copy_": _copy,
    "zero": _filled(lambda args: 0),
    "zeros": _filled(lambda args: 0),
    "zeros_like": _filled(lambda args: 0),
    "new_zeros": _filled(lambda args: 0),
    "ones": _filled(lambda args: 1),
    "ones_like": _filled(lambda args: 1),
    "new_ones": _filled(lambda args: 1),
    "full": _filled(lambda args: args[1]),
    "full_like": _filled(lambda args: args[1]),
    "new_full": _filled(lambda args: args[2]),
    "fill": _filled(lambda args: args[1]),
    "scalar_tensor": _filled(lambda args: args[0]),
    "sum": _sum,
    "mean": _mean,
    "var_mean": _var_mean,
    "cat": _cat,
    "stack": _stack,
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit": _batch_norm,
    "_batch_norm_with_update": _batch_norm,
    "cudnn_batch_norm": _batch_norm,
    "native_batch_norm_backward": _batch_norm_backward,
    "avg_pool2d": _average,
    "avg_pool2d_backward": _average_backward,
    "arange": _arange,
    "floor_divide": _floor_divide,
    "remainder": _remainder,
    "max_pool2d_with_indices": _max_pool,
    "max_pool2d_with_indices_backward": _max_pool_backward,
    "scatter_add": _scatter_add,
    "tanh": _activation("tanh"),
    "tanh_backward": _activation_backward("tanh"),
    "sigmoid": _activation("sigmoid"),
    "sigmoid_backward": _activation_backward("sigmoid"),
    "relu": _activation("relu"),
    "threshold_backward": _activation_backward("relu", at=lambda rest: rest[0] == 0),
    "hardtanh": _activation("hardtanh", 2),
    "hardtanh_backward": _activation_backward("hardtanh", 2),
    "silu": _activation("silu"),
    "silu_backward": _activation_backward("silu"),
    "hardswish": _activation("hardswish"),
    "hardswish_backward": _activation_backward("hardswish"),
    "gelu": _activation("gelu"),
    "gelu_backward": _activation_backward("gelu"),
    "leaky_relu": _activation("leaky_relu", 1),
    "leaky_relu_backward": _activation_backward("leaky_relu", 1, at=lambda rest: rest[1] is False),
}
