"""Rules about one node: how it is called, what is asked of it, and what it remembers."""

from __future__ import annotations

import operator
from dataclasses import MISSING, fields

from torch import fx

from bnrestructure.core.activation import is_homogeneous, unsupported_activation
from bnrestructure.graph.invariant import Invariant, Look
from bnrestructure.graph.ir import (
    FUSED,
    OTHERS,
    AvgPool,
    BatchNorm,
    ConcatBuffer,
    Conv,
    Finalize,
    Link,
    Normalise,
    Reader,
    Residual,
    Squeeze,
    Statistics,
)
from bnrestructure.graph.provenance import provenance
from bnrestructure.graph.view import Fused

__all__ = ["NODE_RULES"]


def _fields(view: type[Fused]) -> tuple[frozenset[str], dict[str, bool | None]]:
    """(the fields that a call must give, and of all fields: whether it may be None if it is a tensor, None if it is a value)."""
    own = [field for field in fields(view) if field.name != "node"]
    needed = frozenset(field.name for field in own if field.default is MISSING)
    return needed, {field.name: "None" in str(field.type) if "Node" in str(field.type) else None for field in own}


_FIELDS = {view: _fields(view) for view in (*FUSED, *OTHERS)}


def arguments(view: Fused, look: Look) -> str | None:
    """The call gives what the op needs, by keyword, and nothing that it does not know: tensors as nodes, options as values."""
    needed, optional = _FIELDS[type(view)]
    given = vars(view)
    if view.node.args:
        return "its operands are not given by keyword"
    if not needed <= given.keys():
        return f"it has no {', '.join(sorted(needed - given.keys()))}"
    for name, value in given.items():
        if isinstance(value, fx.Node):
            if optional.get(name) is None and name != "node":
                return f"its {name} is a node and should be a value" if name in optional else f"its op takes no {name}"
        elif name not in optional:
            return f"its op takes no {name}"
        elif optional[name] is False or (optional[name] and value is not None):
            return f"its {name} is {value!r} and should be a node"
    return None


def outputs(view: Fused, look: Look) -> str | None:
    """Of a node with several outputs only the outputs are read, each through one node."""
    if not view.outputs or len(look.outs(view)) == len(view.node.users):
        return None
    for user in view.node.users:
        if user.target is not operator.getitem or user.args[0] is not view.node:
            return f"{user.name} reads all of its outputs at once"
    return "one of its outputs has two nodes"


def asked_for(view: Conv | Residual | Link | Squeeze, look: Look) -> str | None:
    """An output that a node computes on demand is only read where it was asked for."""
    for name in look.outs(view):
        if name in ("mean", "var", "size"):
            asked = not isinstance(view, Conv | Residual) or view.statistics
        elif name == "passed":
            asked = isinstance(view, Link) and view.chain
        elif name == "deferred":
            asked = isinstance(view, Squeeze) and view.excite
        else:
            asked = name != "gain" or (isinstance(view, Conv) and view.gain)
        if not asked:
            return f"its output {name} is read, and was not asked for"
    return None


def activation(view: Reader | Residual | BatchNorm, look: Look) -> str | None:
    """The activation is one that kernels know; one under an average pool can be applied to a multiple of its input."""
    if isinstance(view, AvgPool) and not is_homogeneous(view.act):
        return f"the average of {view.act} of a tensor is not that of a multiple of it"
    return unsupported_activation(view.act)


def place(view: Conv | ConcatBuffer, look: Look) -> str | None:
    """What is written into a buffer goes to a known place in one buffer, an old or a new one."""
    if isinstance(view, ConcatBuffer):
        makes = (view.into is not None) + bool(view.channels) + bool(view.extra)
        return None if makes == 1 else "a buffer is either written into, or made of a number of channels, or of what is to come"
    if view.into is not None and view.channels is not None:
        return "it writes into a buffer, and makes one"
    if view.offset is None and view.into is None:
        return "it appends to no buffer"
    if view.visible is not None and not view.in_buffer:
        return "channels of a buffer are visible that is not there"
    return None


def remembers(view: Fused, look: Look) -> str | None:
    """A node that does one half of a batch norm remembers of which site, and no other node does."""
    known = provenance(view.node)
    if isinstance(view, Finalize | BatchNorm):
        return "it does not remember its site" if known.site is None else None
    takes = isinstance(view, Statistics) or (isinstance(view, Conv | Residual) and view.statistics)
    if takes != bool(known.statistics_of):
        return "it takes statistics of no site" if takes else "it remembers statistics that it does not take"
    applies = isinstance(view, Normalise | Residual) or (isinstance(view, Reader) and view.mean is not None)
    stands_for_z = isinstance(view, Squeeze) and view.excite  # the convolution behind the gate applies it
    if applies != bool(known.normalises) and not stands_for_z:
        return "it normalises for no site" if applies else "it remembers a normalisation that it does not apply"
    return None


NODE_RULES = (
    Invariant("arguments", (*FUSED, *OTHERS), arguments),
    Invariant("outputs", (*FUSED, *OTHERS), outputs),
    Invariant("asked for", (Conv, Residual, Link, Squeeze), asked_for),
    Invariant("activation", (Reader, Residual, BatchNorm), activation),
    Invariant("place in a buffer", (Conv, ConcatBuffer), place),
    Invariant("remembers its halves", (*FUSED, BatchNorm), remembers),
)
