"""Whether a graph has a number of parts burnt in: Python code may go through them, and their number may follow from a size.

``for image in x``, ``x.unbind()`` and ``x.split(4)`` give as many tensors as x has of something, and a graph looks up just those.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from bnrestructure.graph.channels import channels_of
from bnrestructure.graph.layers import arguments_of, module_of
from bnrestructure.graph.provenance import known_tensor
from bnrestructure.graph.targets import called_name

__all__ = ["follow_from_sizes"]

#: Functions and methods of a tensor and a dimension, by name, and the argument, if any, that says how it is divided.
_DIVIDING = {"unbind": None, "split": "size", "unsafe_split": "size", "chunk": "chunks", "unsafe_chunk": "chunks"}
#: Those whose result has the sizes of their first argument; layers, too.
_KEEPING = {"contiguous", "clone", "detach", "relu", "gelu", "silu", "sigmoid", "tanh", "softmax", "dropout", "layer_norm", "to", "float"}
_KEEPING_LAYERS = (nn.LayerNorm, nn.Dropout, nn.Identity, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Softmax)


def follow_from_sizes(graph: fx.Graph) -> bool:
    """Whether other sizes of the inputs may give another number of parts somewhere."""
    return any(_may_vary(node) for node in graph.nodes if called_name(node) in _DIVIDING)


def _may_vary(node: fx.Node) -> bool:
    name = called_name(node)
    how = _DIVIDING[name or ""]
    values = arguments_of(node, ("input", *([how] if how else []), "dim"), {"dim": 0})
    x, dim, divided = values.get("input", values.get("self")), values["dim"], values.get(how or "")
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
    arguments: Any = node.args[1:]
    arguments = arguments[0] if len(arguments) == 1 and isinstance(arguments[0], tuple | list) else arguments
    if name in ("reshape", "view") and len(arguments) == rank:
        return isinstance(arguments[dim], int) and arguments[dim] != -1
    if name == "permute" and all(isinstance(d, int) for d in arguments) and len(arguments) == rank:
        return _is_fixed(source, arguments[dim] % rank)
    if name == "transpose" and all(isinstance(d, int) for d in arguments) and len(arguments) == 2:
        one, other = (d % rank for d in arguments)
        return _is_fixed(source, other if dim == one else one if dim == other else dim)
    return False
