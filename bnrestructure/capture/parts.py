"""Whether a graph has a number of parts burnt in: Python code may go through them, and their number may follow from a size.

``for image in x``, ``x.unbind()`` and ``x.split(4)`` give as many tensors as x has of something, and a graph looks up just those.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from bnrestructure.graph import activations
from bnrestructure.graph.channels import channels_of
from bnrestructure.graph.layers import arguments_of, module_of
from bnrestructure.graph.operations import concat_of
from bnrestructure.graph.provenance import known_tensor
from bnrestructure.graph.splits import part_of
from bnrestructure.graph.targets import called_name

__all__ = ["follow_from_sizes"]

#: Functions and methods of a tensor and a dimension, by name, and the argument, if any, that says how it is divided.
_DIVIDING = {"unbind": None, "split": "size", "unsafe_split": "size", "chunk": "chunks", "unsafe_chunk": "chunks"}
#: Those whose result has the sizes of their first argument; layers, too.
_KEEPING_LAYERS = (nn.LayerNorm, nn.Dropout, nn.Identity, nn.Softmax, *activations.LAYERS)
_KEEPING = activations.NAMES | {"batch_norm", "contiguous", "clone", "detach", "dropout", "float", "layer_norm", "softmax", "to"}
#: Arithmetic of numbers.
_ARITHMETIC = {"add", "sub", "mul", "floordiv", "mod", "neg"}


def follow_from_sizes(graph: fx.Graph) -> bool:
    """Whether other sizes of the inputs may give another number of parts somewhere."""
    return any(_may_vary(node) for node in graph.nodes if called_name(node) in _DIVIDING)


def _may_vary(node: fx.Node) -> bool:
    name = called_name(node)
    how = _DIVIDING[name or ""]
    values = arguments_of(node, ("input", *([how] if how else []), "dim"), {"dim": 0})
    x, dim, divided = values.get("input"), values["dim"], values.get(how or "")
    known = known_tensor(x) if isinstance(x, fx.Node) else None
    if not isinstance(x, fx.Node) or known is None or not isinstance(dim, int):
        return True
    if how == "size" and not isinstance(divided, int):
        return False  # as many as there are numbers
    return not _is_fixed(x, dim % len(known.shape))


def _is_fixed(node: fx.Node, dim: int) -> bool:
    """Whether a tensor has the same size in this dimension whatever the sizes of the inputs, as far as that can be told."""
    known = known_tensor(node)
    if node.op == "get_attr":
        return True
    if known is None:
        return False
    rank = len(known.shape)
    if dim == 1 and channels_of(node) is not None:
        return True
    layer, name = module_of(node), called_name(node)
    if isinstance(layer, nn.Linear) or name == "linear":
        return dim == rank - 1
    source = next(iter(node.all_input_nodes), None)
    if source is None:
        return False
    if isinstance(layer, _KEEPING_LAYERS) or name in _KEEPING:
        return _is_fixed(source, dim)
    if (part := part_of(node)) is not None:
        return _is_fixed(part[0].input, dim)
    if (segments := concat_of(node)) is not None:
        return all(_is_fixed(segment, dim) for segment in segments)
    arguments: Any = node.args[1:]
    arguments = arguments[0] if len(arguments) == 1 and isinstance(arguments[0], tuple | list) else arguments
    if name in ("reshape", "view") and len(arguments) == rank:
        return _is_fixed_number(arguments[dim])
    if name == "permute" and all(isinstance(d, int) for d in arguments) and len(arguments) == rank:
        return _is_fixed(source, arguments[dim] % rank)
    if name == "transpose" and all(isinstance(d, int) for d in arguments) and len(arguments) == 2:
        one, other = (d % rank for d in arguments)
        return _is_fixed(source, other if dim == one else one if dim == other else dim)
    return False


def _is_fixed_number(value: Any) -> bool:
    """Whether a size that is asked for is the same one for all inputs: a number, or what layers' numbers make."""
    if not isinstance(value, fx.Node):
        return isinstance(value, int) and value != -1
    name, rest = called_name(value), value.args[1:]
    source = value.args[0] if value.args else None
    if name == "size" and isinstance(source, fx.Node) and len(rest) == 1 and isinstance(rest[0], int):
        known = known_tensor(source)
        return known is not None and _is_fixed(source, rest[0] % len(known.shape))
    return name in _ARITHMETIC and all(map(_is_fixed_number, value.args))
