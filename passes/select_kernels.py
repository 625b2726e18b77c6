"""select-kernels: which implementation each fused node asks for, or back to unfused where nothing was won.

With ``auto`` and the device backends the final choice falls per call, when shape, dtype and device are known: the device's kernel where
it supports the call, the reference where it does not (kernels/registry.py). Statistics that one batch norm reads may come to it as a
kernel's tiles have found them.
"""

from __future__ import annotations

from functools import partial

from torch import fx

from bnrestructure.graph.ir import BatchNorm, Conv, Finalize, Normalise, Residual, Statistics, fused_of, maker_of
from bnrestructure.graph.provenance import locate, module_path, provenance, remember
from bnrestructure.graph.view import Fused
from bnrestructure.passes.base import Pass, Rule
from bnrestructure.patterns.lonely import LonelyBatchNorm, lonely_batch_norm

__all__ = ["SELECT_KERNELS", "select_kernels"]

SELECT_KERNELS = "select-kernels"


def put_together(match: LonelyBatchNorm) -> None:
    """Put a batch norm in the place of its parts, of which none found anything to ride on."""
    statistics, finalize, normalise = match.statistics, match.finalize, match.normalise
    x = statistics.x  # normalise may read it through the statistics' chain
    whole = BatchNorm.create(before=normalise.node, x=x, **finalize.layer, act=normalise.act)
    results = normalise.outs()
    remember(whole.node, site=provenance(finalize.node).site, module=module_path(results["z"]))
    locate(whole.node, normalise.node)
    results["z"].replace_all_uses_with(whole.node)
    if "passed" in results:  # further readers had it through the chain
        results["passed"].replace_all_uses_with(x)
    for part in (normalise, finalize, statistics):
        part.erase()


def merged_alone(node: fx.Node) -> tuple[Finalize, Conv | Residual | Statistics] | None:
    """(a batch norm, the node whose statistics it alone reads, at its end), where kernels may leave the merging of tiles to it."""
    finalize = Finalize.of(node)
    if finalize is None or finalize.unmerged is not None:
        return None
    mean, var = finalize.last_part
    (maker, name), (other, other_name) = maker_of(mean), maker_of(var)
    if not isinstance(maker, Conv | Residual | Statistics) or other is None or other.node is not maker.node:
        return None
    alone = (name, other_name) == ("mean", "var") and [*mean.users] == [*var.users] == [node]
    return (finalize, maker) if alone and finalize.times_read(mean) == finalize.times_read(var) == 1 else None


def merge_in_finalize(match: tuple[Finalize, Conv | Residual | Statistics]) -> None:
    """Let the batch norm merge the statistics that tiles have found, so that no launch of its own does."""
    finalize, maker = match
    maker = maker.update(unmerged=True) if isinstance(maker, Statistics) else maker.update(statistics="unmerged")
    finalize.update(unmerged=maker.out("unmerged"))


def other_backend(backend: str, node: fx.Node) -> Fused | None:
    """A fused node that asks for another backend than this."""
    view = fused_of(node)
    return view if getattr(view, "backend", backend) != backend else None


def select_kernels(backend: str) -> Pass:
    """The pass that stamps this backend on every fused node, and puts batch norms together again whose halves ride on nothing."""

    def stamp(view: Fused) -> None:
        view.update(backend=backend)

    together, merging = Rule(lonely_batch_norm, put_together, at=Normalise), Rule(merged_alone, merge_in_finalize, at=Finalize)
    return Pass(SELECT_KERNELS, (together, merging, Rule(partial(other_backend, backend), stamp)))
