"""In-place operations in a captured graph: where they are, what they may alias, and their out-of-place forms."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from bnrestructure.graph.activations import MODULES
from bnrestructure.graph.boundaries import boundary_reason, is_library_leaf
from bnrestructure.graph.layers import input_of, module_of
from bnrestructure.graph.provenance import known_tensor, provenance, remember
from bnrestructure.graph.targets import called_name, is_custom_call

__all__ = ["functionalise", "inplace_target", "storages_of"]

_OPERATORS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
}
_METHODS_NOT_IN_PLACE = {"requires_grad_", "retain_grad_"}


#: Operations whose out-of-place form returns booleans.
_OF_ANOTHER_DTYPE = {
    "lt", "le", "gt", "ge", "eq", "ne", "less", "less_equal", "greater", "greater_equal", "not_equal", "logical_and", "logical_or",
    "logical_xor", "logical_not",
}  # fmt: skip
#: Those that draw, in the order of memory, or lay it out anew: a fresh result may be laid out otherwise.
_OF_MEMORY = {
    "bernoulli", "normal", "uniform", "random", "exponential", "geometric", "log_normal", "cauchy", "resize", "resize_as", "set",
}  # fmt: skip


def inplace_target(node: fx.Node) -> fx.Node | None:
    """The node whose tensor this node overwrites, or None."""
    overwrites = provenance(node).overwrites
    return _spelt_target(node) or (None if overwrites is None else node.all_input_nodes[overwrites])


def _spelt_target(node: fx.Node) -> fx.Node | None:
    """The one that a name or an argument tells of."""
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
        name = called_name(node) or ""
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


def functionalise(graph: fx.Graph) -> None:
    """Replace in-place operations by their out-of-place forms, with their results where the overwritten tensors were read later.

    Values stay the same. An in-place operation on memory that is somebody else's too, and is read there afterwards, is left alone, and
    every node with a part in that memory remembers it as ``changed_by``: patterns must keep away from those.
    """
    for node in graph.nodes:
        target = inplace_target(node)
        if target is None:
            continue
        members = [n for n in graph.nodes if storages_of(n) & storages_of(target)]
        owned = storages_of(target) and not any(_is_known_elsewhere(n) for n in members)
        read_elsewhere = any(n is not target and n < node and any(user > node for user in n.users) for n in members)
        if not owned or read_elsewhere or not _is_same_out_of_place(node, target) or not _make_out_of_place(node):
            for member in {*members, target, node}:
                if provenance(member).changed_by is None:
                    remember(member, changed_by=node.name)
            continue
        for user in list(target.users):
            if user > node:
                user.replace_input_with(target, node)


def _is_same_out_of_place(node: fx.Node, target: fx.Node) -> bool:
    """Whether the out-of-place form gives what is written in place: the same dtype, and of random numbers the same for the same pixel."""
    name = (called_name(node) or "").strip("_")
    if name in _OF_ANOTHER_DTYPE or name in _OF_MEMORY:
        return False
    written = getattr(known_tensor(target), "dtype", None)
    read = [getattr(known_tensor(n), "dtype", None) for n in node.all_input_nodes]
    return written is None or all(dtype is None or torch.promote_types(dtype, written) == written for dtype in read)


def storages_of(node: fx.Node) -> frozenset[int]:
    """Names of the memory that a node's tensors are in: two nodes that have one in common may see each other's writes."""
    known = provenance(node).storages
    if known is None:
        tensors = [t for t in pytree.tree_leaves(known_tensor(node)) if isinstance(t, Tensor)]
        known = frozenset(t.untyped_storage()._cdata for t in tensors)
        remember(node, storages=known)
    return known


def _is_known_elsewhere(node: fx.Node) -> bool:
    """Whether code that is not in the graph may hold on to this node's tensor: the caller, a hook on a layer, a custom Function."""
    if node.op in ("placeholder", "get_attr"):
        return True
    module = module_of(node)
    if module is not None:
        return boundary_reason(module) is not None or not is_library_leaf(module)
    return is_custom_call(node)


def _make_out_of_place(node: fx.Node) -> bool:
    """Turn one in-place node into its out-of-place form; False when it has none."""
    if _spelt_target(node) is None:
        return False
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
    return True
