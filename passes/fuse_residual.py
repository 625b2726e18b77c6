"""fuse-residual: normalise + add (+ the shortcut's normalise) + activation -> one sweep (ICF across residuals).

``act(normalise(y) * gate + shortcut)``, mostly without a gate -> one residual node; the statistics of its sum ride along where a batch norm
follows. So do those of ``act(y + shortcut)``, where neither has a batch norm. A branch that is activated before it is added,
``act(normalise(x)) + shortcut``, is one sweep, too, and so is one that stochastic depth multiplies by a factor of each image.

Where nothing but the residual reads a convolution's y, the residual hands its gradient back unscaled and the convolution applies the
scale: both operands then share one gradient tensor.
"""

from __future__ import annotations

from torch import fx

from bnrestructure.graph.ir import Conv, Normalise, Residual, Statistics
from bnrestructure.graph.provenance import carry
from bnrestructure.passes.base import Pass, Rule, erase_dead
from bnrestructure.passes.fuse_statistics import ride_on_residual
from bnrestructure.patterns.pairs import RESIDUAL_STATISTICS
from bnrestructure.patterns.residual import (
    ActivatedBranch,
    ResidualMatch,
    ScaledBranch,
    activated_branch,
    plain_sum,
    residual,
    scaled_branch,
)

__all__ = ["FUSE_RESIDUAL"]


def into_residual(match: ResidualMatch) -> None:
    """Put one residual in the place of the normalises, the add and the activation."""
    main, other = match.normalise, match.other
    shortcut = {"r": match.shortcut} if other is None else _prefixed(other.edge)
    last = match.activation or match.add
    vectors = {} if main is None else {name: getattr(main, name) for name in ("mean", "scale", "beta", "gate")}
    made = Residual.create(before=last, y=match.y, **vectors, **shortcut, act=match.act)
    normalises = [normalise for normalise in (main, other) if normalise is not None]
    out = made.out("out")
    carry(made.node, match.add, *(normalise.node for normalise in normalises))
    carry(out, match.add)
    last.replace_all_uses_with(out)
    for conv in match.activating:
        conv.update(act="identity")
    erase_dead(*dict.fromkeys((match.add, last)))
    for normalise in normalises:
        normalise.erase_if_unread()
    if main is not None:
        _share_gradient(made, made.y, "gain")
    if other is not None:
        _share_gradient(made, made.r, "r_gain")


def into_normalise(match: ActivatedBranch) -> None:
    """Let the sweep that makes the branch add the shortcut."""
    _sweep_for(match.add, match.normalise, factor=match.normalise.factor, r=match.shortcut)


def scale(match: ScaledBranch) -> None:
    """Let the sweep that makes the branch multiply it."""
    _sweep_for(match.product, match.normalise, factor=match.factor)


def _sweep_for(node: fx.Node, normalise: Normalise, **more: fx.Node | None) -> None:
    """Put a normalise that does ``more`` in the place of this node."""
    made = Normalise.create(before=node, **normalise.edge, gate=normalise.gate, **more)
    carry(made.node, node, normalise.node)
    node.replace_all_uses_with(made.out("z"))
    node.graph.erase_node(node)
    normalise.erase_if_unread()


def _prefixed(edge: dict[str, object]) -> dict[str, object]:
    return {"r": edge["x"]} | {f"r_{name}": edge[name] for name in ("mean", "scale", "beta")}


def _share_gradient(made: Residual, operand: fx.Node, gain: str) -> None:
    """Let the convolution that makes this operand apply the scale, if the residual is all that reads the operand."""
    conv = Conv.making(operand, "y")
    both = made.y is made.r  # y + normalise(y): the scale is not that of the whole gradient
    if conv is not None and not both and len(operand.users) == 1 and not conv.in_buffer:
        conv.update(gain=True)
        made.update(**{gain: conv.out("gain")})


FUSE_RESIDUAL = Pass(
    "fuse-residual",
    (
        Rule(residual, into_residual),
        Rule(scaled_branch, scale),
        Rule(plain_sum, into_residual),
        Rule(activated_branch, into_normalise),
        Rule(RESIDUAL_STATISTICS, ride_on_residual, at=Statistics),
    ),
)
