"""Rules about one node: how it is called, what is asked of it, and what it remembers."""

from __future__ import annotations

import operator
from dataclasses import MISSING, fields
from typing import Literal

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
    Writer,
)
from bnrestructure.graph.provenance import provenance
from bnrestructure.graph.view import Fused

__all__ = ["NODE_RULES"]


#: What a field of a view may hold: nodes and values of its annotation.
_Kind = Literal["node", "node or None", "value", "number"]


def _fields(view: type[Fused]) -> tuple[frozenset[str], dict[str, _Kind]]:
    """(the fields that a call must give, and what each field may hold)."""
    own = [field for field in fields(view) if field.name != "node"]
    return frozenset(field.name for field in own if field.default is MISSING), {field.name: _kind(str(field.type)) for field in own}


def _kind(annotation: str) -> _Kind:
    if "Number" in annotation:
        return "number"
    if "Node" not in annotation:
        return "value"
    return "node or None" if "None" in annotation else "node"


_FIELDS = {view: _fields(view) for view in (*FUSED, *OTHERS)}


def arguments(view: Fused, look: Look) -> str | None:
    """The call gives what the op needs, by keyword, and nothing that it does not know: tensors as nodes, options as values."""
    needed, kinds = _FIELDS[type(view)]
    given = vars(view)
    if view.node.args:
        return "its operands are not given by keyword"
    if not needed <= given.keys():
        return f"it has no {', '.join(sorted(needed - given.keys()))}"
    for name, value in given.items():
        if name == "node":
            continue
        kind = kinds.get(name)
        if kind is None:
            return f"its op takes no {name}"
        if kind == "value" and isinstance(value, fx.Node):
            return f"its {name} is a node and should be a value"
        if not isinstance(value, fx.Node) and (kind == "node" or (kind == "node or None" and value is not None)):
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


def asked_for(view: Conv | Residual | Link | Squeeze | Finalize, look: Look) -> str | None:
    """An output that a node computes on demand is only read where it was asked for."""
    for name in look.outs(view):
        if name in ("mean", "var", "size"):
            asked = not isinstance(view, Conv | Residual) or view.statistics
        elif name.startswith("passed"):
            asked = isinstance(view, Link | Finalize) and view.chain
        elif name == "unmerged":
            asked = view.unmerged if isinstance(view, Statistics) else getattr(view, "statistics", None) == "unmerged"
        elif name == "deferred":
            asked = isinstance(view, Squeeze) and view.excite
        elif name == "buffer":
            asked = isinstance(view, Writer) and view.in_buffer
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


def place(view: Writer | ConcatBuffer, look: Look) -> str | None:
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
    takes = isinstance(view, Statistics) or (isinstance(view, Conv | Residual) and bool(view.statistics))
    if takes != bool(known.statistics_of):
        return "it takes statistics of no site" if takes else "it remembers statistics that it does not take"
    applies = isinstance(view, Normalise) or (isinstance(view, Reader | Residual) and view.mean is not None)
    stands_for_z = isinstance(view, Squeeze) and view.excite  # the node with the gate applies it
    if applies != bool(known.normalises) and not stands_for_z:
        return "it normalises for no site" if applies else "it remembers a normalisation that it does not apply"
    return None


NODE_RULES = (
    Invariant("arguments", (*FUSED, *OTHERS), arguments),
    Invariant("outputs", (*FUSED, *OTHERS), outputs),
    Invariant("asked for", (Conv, Residual, Link, Squeeze, Finalize), asked_for),
    Invariant("activation", (Reader, Residual, BatchNorm), activation),
    Invariant("place in a buffer", (Conv, Normalise, ConcatBuffer), place),
    Invariant("remembers its halves", (*FUSED, BatchNorm), remembers),
)
