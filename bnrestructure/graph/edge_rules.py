"""Rules about neighbours: the vectors of an edge, the gate and what it gates, the gain and who gives it."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import fx

from bnrestructure.graph.chains import passed_tensor
from bnrestructure.graph.invariant import Invariant, Look
from bnrestructure.graph.ir import Conv, Finalize, Normalise, Reader, Residual, Squeeze, Statistics, output_of
from bnrestructure.graph.provenance import provenance
from bnrestructure.graph.splits import batch_norm_scaling_by, part_of

__all__ = ["EDGE_RULES"]


class _Edge(NamedTuple):
    """The vectors of an edge at which a node reads a tensor."""

    mean: fx.Node | None
    scale: fx.Node | None
    beta: fx.Node | None
    tensor: fx.Node | None


def _edges(view: Reader | Residual) -> list[_Edge]:
    """The edges at which a node reads: x's or y's, and the shortcut's."""
    edges = [_Edge(view.mean, view.scale, view.beta, view.y if isinstance(view, Residual) else view.x)]
    if isinstance(view, Residual | Conv):
        edges.append(_Edge(view.r_mean, view.r_scale, view.r_beta, view.r))
    return edges


def whole_edge(view: Reader | Residual, look: Look) -> str | None:
    """The vectors of an edge are all there or none; a shortcut has none without a tensor, and none where the branch has none."""
    first, *rest = _edges(view)
    for mean, scale, beta, _ in (first, *rest):
        if not (mean is None) == (scale is None) == (beta is None):
            return "an edge has some of mean, scale and beta, and not all"
    if view.forms_residual and first.mean is None and rest[0].mean is not None:
        return "a residual has a batch norm in its shortcut, and none in its branch"
    if isinstance(view, Conv) and not view.forms_residual and rest[0].mean is not None:
        return "there are vectors of a shortcut that is not there"
    return None


def one_batch_norm(view: Reader | Residual, look: Look) -> str | None:
    """The vectors of an edge are those of one batch norm, and the node remembers it; or of several whose tensors are concatenated. For a
    part of a tensor they are the same part of each vector.

    The mean, too, is finalize's: statistics' own would have its gradient twice, from the reader and from finalize.
    """
    for mean, scale, beta, tensor in _edges(view):
        if mean is None or scale is None or beta is None:
            continue
        owners = [_owner(part, "scale") for part in _parts(scale)]
        if None in owners:
            return f"{scale.name} is not the scale of a batch norm"
        if any([_owner(part, name) for part in _parts(vector)] != owners for name, vector in (("mean", mean), ("beta", beta))):
            return f"mean, scale and beta of {scale.name} are of different batch norms"
        finalize = batch_norm_scaling_by(scale)
        if finalize is None:
            continue
        if _which_part(scale) not in (None, _which_part(_read_by(tensor))):
            return f"{scale.name} is not of the channels that it normalises"
        site = provenance(finalize.node).site
        applies_itself = not (isinstance(view, Squeeze) and view.excite)
        if applies_itself and site not in provenance(view.node).normalises:
            return f"it normalises for {site}, and does not remember it"
    return None


def one_tensor(view: Finalize, look: Look) -> str | None:
    """mean, var and size of a batch norm are of one tensor; those of a concat are in the same order."""
    means = [_owner(part, "mean", "passed_mean") for vector in (view.mean, view.behind_mean) for part in _parts(vector)]
    variances = [_owner(part, "var", "passed_var") for vector in (view.var, view.behind_var) for part in _parts(vector)]
    if None in means or None in variances:
        return "its mean or var is no node's"
    if means != variances:
        return "its mean and var are of different tensors, or in different orders"
    handed_on = any(isinstance(owner, fx.Node) and owner.target is Finalize.op for owner in means)  # the size was looked at there
    sizes = {_owner(view.size, "size")}
    if None in sizes or (len(means) == 1 and not handed_on and sizes != set(means)):
        return f"{view.size.name} is not the size of the tensor of {view.mean.name}"
    return None


def _parts(vector: fx.Node | None) -> list[fx.Node]:
    """The parts of a concat of vectors, one that stands in it twice both times; none of what is not there."""
    if vector is None:
        return []
    return list(cast("list[fx.Node]", vector.args[0])) if vector.target is torch.cat else [vector]


def _owner(vector: fx.Node, *names: str) -> object:
    """The node whose output of one of these names a vector is, or None. A concat stands for any: its own parts were looked at before.

    Of a part of a split vector: that of the vector, how it was split, and which part it is.
    """
    if vector.target is torch.cat:
        return torch.cat
    if (part := part_of(vector)) is not None:
        owner = _owner(part[0].input, *names)
        return None if owner is None else (owner, _which_part(vector))
    output = output_of(vector)
    return output[0] if output is not None and output[1] in names else None


def _which_part(node: fx.Node | None) -> object:
    """How a tensor or vector was split, and which part of it this is; None of one that is whole."""
    part = None if node is None else part_of(node)
    return None if part is None else (part[0].operation, str(part[0].how), part[1])


def _read_by(tensor: fx.Node | None) -> fx.Node | None:
    """The tensor that is read, in front of what passed it on or deferred it."""
    if tensor is None:
        return None
    squeeze = Squeeze.making(tensor, "deferred")
    return passed_tensor(tensor if squeeze is None else squeeze.x)


def gate(view: Conv | Normalise | Residual, look: Look) -> str | None:
    """A node with a gate reads what a squeeze defers, through the very edge of the squeeze: its gradient is that at the gate."""
    squeeze = Squeeze.making(view.input, "deferred")
    if view.gate is None:
        return None if squeeze is None else "it reads a deferred tensor without a gate"
    if squeeze is None:
        return "its gate is on a tensor that no squeeze defers"
    act = "identity" if view.forms_residual else view.act  # a residual's is the sum's
    same = all(getattr(view, name) is squeeze.edge[name] for name in ("mean", "scale", "beta")) and act == squeeze.act
    return None if same else "its edge is not the squeeze's"


def deferred(view: Squeeze, look: Look) -> str | None:
    """What a squeeze defers goes to one node with a gate, as its input, and to nothing else."""
    tensor = look.outs(view).get("deferred")
    readers = [] if tensor is None else list(tensor.users)
    if tensor is None or not readers:
        return "it defers a tensor that nobody reads" if view.excite else None
    reader = Conv.of(readers[0]) or Normalise.of(readers[0]) or Residual.of(readers[0])
    fits = len(readers) == 1 and reader is not None and reader.input is tensor and reader.times_read(tensor) == 1
    return None if fits else f"{readers[0].name} reads a deferred tensor, and is no convolution, normalise or residual with a gate"


def unmerged(view: Conv | Residual | Statistics, look: Look) -> str | None:
    """Statistics that are not merged go to one batch norm, which merges them first."""
    outs = look.outs(view)
    left = outs.get("unmerged")
    if left is None:
        return None
    readers = {reader for name in ("mean", "var", "unmerged") if name in outs for reader in outs[name].users}
    finalize = Finalize.of(next(iter(readers))) if len(readers) == 1 else None
    if finalize is None or finalize.unmerged is not left:
        return "its statistics are not merged, and are not those of one batch norm that merges them"
    last = finalize.last_part
    fits = last == (outs.get("mean"), outs.get("var")) and all(finalize.times_read(vector) == 1 for vector in last)
    return None if fits else f"{finalize.node.name} merges them into others"


def gain(view: Conv, look: Look) -> str | None:
    """A convolution that applies the scale in backward is told which, by the residual that alone reads its y."""
    if not view.gain:
        return None
    given = look.outs(view).get("gain")
    if given is None or len(given.users) != 1:
        return "it applies a scale in backward that not one residual gives"
    y = look.outs(view).get("y")
    if view.in_buffer or y is None or len(y.users) != 1:
        return "others read its y, whose gradient has another scale"
    (reader,) = given.users
    residual = Residual.of(reader) or Conv.of(reader)
    pairs = [] if residual is None else _gains(residual)
    return None if (y, given) in pairs else f"{reader.name} gives a scale, and does not read y at that edge"


def gain_given(view: Residual | Conv, look: Look) -> str | None:
    """A residual gives a scale to the convolution that makes the operand in question, and that convolution asked for it."""
    for operand, given in _gains(view):
        if given is None:
            continue
        conv = Conv.making(operand, "y")
        if conv is None or given is not look.outs(conv).get("gain"):
            return f"{given.name} is not the gain of the convolution that makes {operand.name if operand is not None else 'it'}"
    if isinstance(view, Conv) and not view.forms_residual and (view.x_gain is not None or view.r_gain is not None):
        return "it gives a scale, and forms no residual"
    if view.r_gain is not None and view.r_mean is None:
        return "it gives the scale of a shortcut that has none"
    return None


def _gains(view: Residual | Conv) -> list[tuple[fx.Node | None, fx.Node | None]]:
    """(operand, the gain of the convolution that makes it) for both operands of a residual."""
    first = (view.y, view.gain) if isinstance(view, Residual) else (view.x, view.x_gain)
    return [first, (view.r, view.r_gain)]


EDGE_RULES = (
    Invariant("whole edge", (Reader, Residual), whole_edge),
    Invariant("one batch norm", (Reader, Residual), one_batch_norm),
    Invariant("one tensor", (Finalize,), one_tensor),
    Invariant("gate", (Conv, Normalise, Residual), gate),
    Invariant("deferred", (Squeeze,), deferred),
    Invariant("unmerged", (Conv, Residual, Statistics), unmerged),
    Invariant("gain", (Conv,), gain),
    Invariant("gain given", (Residual, Conv), gain_given),
)
