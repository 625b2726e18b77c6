"""In-place operations in a captured graph: where they are, what they may alias, and their out-of-place forms."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnrestructure.graph.activations import FUNCTIONS, MODULES
from bnrestructure.graph.boundaries import boundary_reason
from bnrestructure.graph.layers import input_of, module_of
from bnrestructure.graph.provenance import provenance, remember

__all__ = ["functionalise", "inplace_target"]

_OPERATORS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
}
#: Operations whose output never shares memory with an input. Everything else might.
_FRESH_MODULES = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.Linear,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
)
_FRESH_FUNCTIONS = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, torch.add, torch.mul, torch.cat, torch.relu,
    torch.sigmoid, torch.tanh, torch.matmul, torch.conv1d, torch.conv2d, torch.conv3d, nn.functional.batch_norm,
    nn.functional.linear, nn.functional.max_pool2d, nn.functional.avg_pool2d, nn.functional.adaptive_avg_pool2d,
    nn.functional.sigmoid, nn.functional.interpolate, torch.stack, torch.mean, torch.sum,
}  # fmt: skip
_FRESH_METHODS = {"add", "sub", "mul", "div", "relu", "sigmoid", "tanh", "mean", "sum", "matmul", "neg", "exp", "pow"}
_METHODS_NOT_IN_PLACE = {"requires_grad_", "retain_grad_"}


def inplace_target(node: fx.Node) -> fx.Node | None:
    """The node whose tensor this node overwrites, or None."""
    argument = input_of(node)
    if argument is None:
        return None
    if node.op == "call_module":
        return argument if getattr(module_of(node), "inplace", False) is True else None
    if node.op == "call_method":
        name = str(node.target)
        own = name.endswith("_") and not name.startswith("_") and name not in _METHODS_NOT_IN_PLACE
        return argument if own or name == "__setitem__" else None
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        if node.target in _OPERATORS or node.target is operator.setitem:
            return argument
        if _inplace_argument(node) or (name.endswith("_") and not name.startswith("_")):
            return argument
    return None


def _inplace_argument(node: fx.Node) -> bool:
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is True
    position = _inplace_position(node)
    return position < len(node.args) and node.args[position] is True


def _inplace_position(node: fx.Node) -> int:
    """Where the function takes ``inplace`` by position; behind all arguments if it does not."""
    parameters = _parameters(node.target) if callable(node.target) else ()
    return parameters.index("inplace") if "inplace" in parameters else len(node.args)


@cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a function's parameters; none where Python cannot tell."""
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def _is_fresh(node: fx.Node) -> bool:
    """Whether this node's output certainly has memory of its own."""
    if provenance(node).functionalised:
        return True
    if inplace_target(node) is not None:
        return False
    if node.op == "call_module":
        module = module_of(node)
        return isinstance(module, _FRESH_MODULES) or type(module) in MODULES
    if node.op == "call_method":
        return node.target in _FRESH_METHODS
    return node.op == "call_function" and (node.target in _FRESH_FUNCTIONS or node.target in FUNCTIONS)


def functionalise(graph: fx.Graph) -> None:
    """Replace in-place operations by their out-of-place forms, with their results where the overwritten tensors were read later.

    Values stay the same. An in-place operation on a tensor that something else may share memory with is left alone, and every node of that
    group remembers it as ``changed_by``: patterns must keep away from those.
    """
    for node in graph.nodes:
        target = inplace_target(node)
        if target is None:
            continue
        group = _sharing(target, exclude=node)
        alone = group == {target} and _is_fresh(target)
        if not alone or not _make_out_of_place(node):
            for member in (*group, node):
                remember(member, changed_by=node.name)
            continue
        for user in list(target.users):
            if node < user:
                user.replace_input_with(target, node)


def _sharing(node: fx.Node, exclude: fx.Node) -> set[fx.Node]:
    """Every node whose tensor may share memory with ``node``'s, through views and passed-on inputs."""
    group, stack = {node}, [node]
    while stack:
        current = stack.pop()
        up = [] if _is_fresh(current) or current.op in ("placeholder", "get_attr") else current.all_input_nodes
        down = [u for u in current.users if u is not exclude and u.op != "output" and not _is_fresh(u)]
        for other in [*up, *down]:
            if other not in group:
                group.add(other)
                stack.append(other)
    return group


def _make_out_of_place(node: fx.Node) -> bool:
    """Turn one in-place node into its out-of-place form; False when it has none."""
    if node.op == "call_module":
        module = module_of(node)
        if module is None or type(module) not in MODULES or boundary_reason(module) is not None:
            return False
        spelling = MODULES[type(module)]
        remember(node, module=str(node.target))
        node.op, node.target = "call_function", spelling.function
        node.kwargs = {**node.kwargs, **{name: getattr(module, name) for name in spelling.parameters}}
    elif node.op == "call_method":
        name = str(node.target).rstrip("_")
        if not hasattr(Tensor, name):
            return False
        node.target = name
    elif node.target in _OPERATORS:
        node.target = _OPERATORS[node.target]
    elif "inplace" in node.kwargs:
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}
    elif _inplace_argument(node):
        position = _inplace_position(node)
        node.args = tuple(False if i == position else a for i, a in enumerate(node.args))
    else:
        out_of_place = getattr(torch, getattr(node.target, "__name__", "").rstrip("_"), None)
        if out_of_place is None or node.target is operator.setitem:
            return False
        node.target = out_of_place
    remember(node, functionalised=True)
    return True
