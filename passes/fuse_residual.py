"""fuse-residual: normalise + add (+ the shortcut's normalise) + activation -> one sweep (ICF across residual joins)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from bnrestructure import ops
from bnrestructure.graph.fused import output, produced_by, set_kwargs
from bnrestructure.graph.layers import module_path
from bnrestructure.passes.base import Fuel, PassResult, erase_dead, finish
from bnrestructure.passes.fuse_statistics import carry_statistics
from bnrestructure.patterns.residual import ResidualMatch, find_residuals
from bnrestructure.patterns.statistics import find_residual_statistics

__all__ = ["FuseResidual"]


@dataclass(frozen=True)
class FuseResidual:
    """``act(normalise(y) + shortcut)`` -> one residual node; the statistics of its result ride along where a batch norm follows.

    Where nothing but the join reads a convolution's y, the join hands its gradient back unscaled and the convolution applies the scale:
    both operands then share one gradient tensor.
    """

    name: ClassVar[str] = "fuse-residual"
    fuel: Fuel = field(default_factory=Fuel, compare=False)

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        graph, count = graph_module.graph, 0
        for match in find_residuals(graph_module):
            if self.fuel.take():
                _join(graph, match)
                count += 1
        for statistics, join in find_residual_statistics(graph_module):
            if self.fuel.take():
                carry_statistics(graph, statistics, join)
                count += 1
        return finish(graph_module, count)


def _join(graph: fx.Graph, match: ResidualMatch) -> None:
    main, other = match.normalise, match.other_normalise
    z = output(main, "z")
    shortcut = next(operand for operand in match.add.args if operand is not z)  # looked up now: an earlier join may have replaced it
    kwargs = {
        "y": main.kwargs["x"], "mean": main.kwargs["mean"], "scale": main.kwargs["scale"], "beta": main.kwargs["beta"],
        "r": shortcut, "r_mean": None, "r_scale": None, "r_beta": None, "act": match.act, "gain": None, "r_gain": None,
        "statistics": False,
    }  # fmt: skip
    if other is not None:
        kwargs |= {"r": other.kwargs["x"]} | {f"r_{k}": other.kwargs[k] for k in ("mean", "scale", "beta")}
    last = match.add if match.activation is None else match.activation
    with graph.inserting_before(last):
        join = graph.call_function(ops.residual, (), kwargs)
    out = output(join, "out")
    join.meta["bnr_module"] = out.meta["bnr_module"] = module_path(match.add)
    join.meta["nn_module_stack"] = match.add.meta.get("nn_module_stack", {})
    join.meta["bnr_normalises"] = [s for n in (main, other) if n is not None for s in n.meta["bnr_normalises"]]
    last.replace_all_uses_with(out)
    for conv in match.activating:
        set_kwargs(conv, act="identity")
    dead = [match.add] if match.activation is None else [match.add, match.activation]
    for normalise in (main, other):
        if normalise is not None:
            dead = [normalise, *normalise.users, *dead]
    erase_dead(graph, *dead)
    _share_gradient(join, "y", "gain")
    if other is not None:
        _share_gradient(join, "r", "r_gain")


def _share_gradient(join: fx.Node, operand: str, gain: str) -> None:
    """Let the convolution that produces this operand apply the scale, if the join is all that reads the operand."""
    tensor = join.kwargs[operand]
    conv = produced_by(tensor, ops.conv, "y")
    both = join.kwargs["y"] is join.kwargs["r"]  # y + normalise(y): the scale is not that of the whole gradient
    if conv is not None and not both and len(tensor.users) == 1 and conv.kwargs["into"] is None and conv.kwargs["channels"] is None:  # type: ignore[union-attr]
        set_kwargs(conv, gain=True)
        set_kwargs(join, **{gain: output(conv, "gain")})
