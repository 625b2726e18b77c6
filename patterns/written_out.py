"""Activations that a model writes out as a product with their input: ``x * sigmoid(x)`` is SiLU, ``x * relu6(x + 3) / 6`` Hardswish.

``x * hardsigmoid(x)`` stays: PyTorch's gradient of hardsigmoid is off by 1e-8 in float64, and nothing else has the same numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from bnrestructure.graph.activations import activation_of
from bnrestructure.graph.boundaries import boundary_reason
from bnrestructure.graph.layers import BatchNormLayer, arguments_of, input_of, module_of
from bnrestructure.graph.operations import product_of
from bnrestructure.graph.provenance import known_tensor, provenance
from bnrestructure.patterns.batch_norm import batch_norm

__all__ = ["WrittenOut", "written_out"]

_SIGMOIDS = (nn.Sigmoid, torch.sigmoid, F.sigmoid, torch.special.expit, "sigmoid")
_SUMS = (operator.add, torch.add, "add")
_PRODUCTS = (operator.mul, torch.mul, "mul")
_QUOTIENTS = (operator.truediv, torch.div, torch.true_divide, "div")
_CLAMPS = (torch.clamp, torch.clip, "clamp", "clip")


@dataclass(frozen=True)
class WrittenOut:
    """The last node of an activation that is written out, its input, a batch norm's result, the nodes between them in graph order, and the
    function that it is.
    """

    node: fx.Node
    input: fx.Node
    inside: tuple[fx.Node, ...]
    function: Callable[..., Any]


def written_out(node: fx.Node) -> WrittenOut | None:
    """Such an activation, all of whose other nodes nobody else reads, and whose input nobody else does."""
    x, function = _found(node) or (None, None)
    if x is None or function is None or not isinstance(batch_norm(x), BatchNormLayer):
        return None
    inside = _between(node, x)
    alone = all(set(n.users) <= {*inside, node} for n in (x, *inside))
    kept = all(provenance(n).changed_by is None for n in (node, x, *inside))
    kinds = {None if known is None else known.dtype for known in map(known_tensor, (node, x))}
    return WrittenOut(node, x, inside, function) if alone and kept and len(kinds) == 1 and None not in kinds else None


def _found(node: fx.Node) -> tuple[fx.Node, Callable[..., Any]] | None:
    """(the input, the function)."""
    factors = product_of(node)
    for x, gate in (factors, factors[::-1]) if factors is not None else ():
        if _called(gate) in _SIGMOIDS and input_of(gate) is x:
            return x, F.silu
        sixfold = _sixth_of(gate)
        if sixfold is not None and _shifted_input(sixfold) is x:
            return x, F.hardswish
    sixfold = _sixth_of(node)
    factors = None if sixfold is None else product_of(sixfold)
    for x, gate in (factors, factors[::-1]) if factors is not None else ():
        if _shifted_input(gate) is x:
            return x, F.hardswish
    return None


def _between(node: fx.Node, x: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes that lead from x to this one, in graph order."""
    inside: set[fx.Node] = set()
    left = [node]
    while left:
        for n in left.pop().all_input_nodes:
            if n is not x and n not in inside:
                inside.add(n)
                left.append(n)
    return tuple(sorted(inside))


def _called(node: fx.Node) -> Any:
    """What a node calls: a function, a method's name, or the class of a layer."""
    if node.op != "call_module":
        return node.target if node.op in ("call_function", "call_method") else None
    module = module_of(node)
    return None if module is None or boundary_reason(module) is not None else type(module)


def _with_number(node: fx.Node, targets: tuple[Any, ...], number: float, *, either: bool) -> fx.Node | None:
    """The tensor that this node adds the number to, or multiplies or divides by it; ``either``: the number may come first."""
    if node.op not in ("call_function", "call_method") or node.target not in targets or node.kwargs or len(node.args) != 2:
        return None
    x, value = node.args
    if either and not isinstance(x, fx.Node):
        x, value = value, x
    return x if isinstance(x, fx.Node) and isinstance(value, int | float) and value == number else None


def _sixth_of(node: fx.Node) -> fx.Node | None:
    quotient = _with_number(node, _QUOTIENTS, 6, either=False)
    return quotient if quotient is not None else _with_number(node, _PRODUCTS, 1 / 6, either=True)


def _shifted_input(node: fx.Node) -> fx.Node | None:
    """x of ``relu6(x + 3)``."""
    activation = activation_of(node)
    shifted = activation.input if activation is not None and activation.name == "relu6" else _clamped(node)
    return None if shifted is None else _with_number(shifted, _SUMS, 3, either=True)


def _clamped(node: fx.Node) -> fx.Node | None:
    """x of ``clamp(x, 0, 6)`` and of ``hardtanh(x, 0, 6)``."""
    if node.op in ("call_function", "call_method") and node.target in _CLAMPS:
        values = arguments_of(node, ("input", "min", "max"), {"min": None, "max": None})
        return values["input"] if (values["min"], values["max"]) == (0, 6) and isinstance(values["input"], fx.Node) else None
    if node.target is F.hardtanh:
        values = arguments_of(node, ("input", "min_val", "max_val"), {"min_val": -1.0, "max_val": 1.0})
        return values["input"] if (values["min_val"], values["max_val"]) == (0, 6) else None
    module = module_of(node)
    if type(module) is nn.Hardtanh and boundary_reason(module) is None and (module.min_val, module.max_val) == (0, 6):
        return input_of(node)
    return None
