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
from channel_runs import Meaning, failed, runs
from torch import Tensor
from window_meanings import WINDOWS

if TYPE_CHECKING:
    from symbolic import Symbolic

__all__ = ["MEANINGS", "VIEWS"]

#: Operators whose result shares its argument's storage, and with it what it holds; and those that leave memory unwritten.
VIEWS = frozenset({
    "view", "_unsafe_view", "reshape", "expand", "permute", "unsqueeze", "squeeze", "slice", "narrow", "split", "split_with_sizes",
    "alias", "detach", "as_strided", "as_strided_", "set_", "t", "transpose", "movedim", "view_as", "chunk", "unbind", "select",
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided",
})  # fmt: skip


def _pointwise(function: Callable[..., sp.Expr]) -> Meaning:
    """An operator of each value for itself, its result multiplied out; numbers among the arguments take part."""

    def meaning(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
        operands = [values[i] if isinstance(a, Tensor) else ((0, s.number(a)),) for i, a in enumerate(args) if _is_operand(a)]
        return [tuple((n, function(s, *row, **kwargs)) for n, row in runs(operands))]

    return meaning


def _is_operand(argument: Any) -> bool:
    return isinstance(argument, (Tensor, int, float)) and not isinstance(argument, bool)


def _same(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
    failed(values[0])
    return [values[0]]


def _copy(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
    failed(values[1])
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
    failed(values[0])
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
    failed(values[0])
    correction = kwargs.get("correction")
    found = [(n, *_mean_and_variance(s, args[0], _dims(args[0], args), 1 if correction is None else correction, e)) for n, e in values[0]]
    return [tuple((n, var) for n, _, var in found), tuple((n, mean) for n, mean, _ in found)]


def _cat(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
    dim = (args[1] if len(args) > 1 else 0) % args[0][0].dim()
    if any(s.channel_dim(x) not in (dim, None) for x in args[0]):
        raise NotProved(f"a concat along dimension {dim}")
    joined: list[tuple[int, sp.Expr]] = []
    for x, value in zip(args[0], values[0], strict=True):
        failed(value)
        joined += [(n or x.shape[dim], e) for n, e in value]
    return [tuple(joined)]


def _foreach_div(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
    """Each tensor by the number at its place."""
    for value in values[0]:
        failed(value)
    pairs = zip(values[0], args[1], strict=True)
    return [tuple((n, expanded(e / s.number(number))) for n, e in value) for value, number in pairs]


def _stack(s: Symbolic, args: Any, kwargs: Any, values: Any, result: Any) -> Sequence[Any]:
    """Rows that each have the same to say of their own image (or rank)."""
    if any(value != values[0][0] for value in values[0]) or len(args[0]) != s.images or (args[1:] and args[1] != 0):
        raise NotProved("a stack of different rows")
    return [values[0][0]]


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
    """The derivative of batch norm's definition (shown by test_nodes.py to be reverse.py's)."""
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
        failed(values[0])
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


def _add(s: Symbolic, a: sp.Expr, b: sp.Expr, alpha: float = 1) -> sp.Expr:
    return a + s.number(alpha) * b


MEANINGS: dict[str, Meaning] = {
    **WINDOWS,
    "add": _pointwise(_add),
    "sub": _pointwise(lambda s, a, b, alpha=1: a - s.number(alpha) * b),
    "rsub": _pointwise(lambda s, a, b, alpha=1: b - s.number(alpha) * a),
    "mul": _pointwise(lambda s, a, b: expanded(a * b)),
    "_foreach_div": _foreach_div,
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
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit": _batch_norm,
    "_batch_norm_with_update": _batch_norm,
    "cudnn_batch_norm": _batch_norm,
    "native_batch_norm_backward": _batch_norm_backward,
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
