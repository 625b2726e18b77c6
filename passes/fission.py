"""fission: BN -> statistics, finalize, normalise (the paper's section 3.1).

``z = batch_norm(y)`` -> ``mean, var = statistics(y); mean, scale, beta = finalize(...); z = normalise(y, mean, scale, beta)``.
SyncBatchNorm gains a step between the first two that merges the statistics of all ranks.
"""

from __future__ import annotations

from bnrestructure.graph.ir import Finalize, Normalise, Statistics, Synchronise
from bnrestructure.graph.layers import BatchNormLayer, reference
from bnrestructure.graph.provenance import carry, locate, module_path, provenance, remember
from bnrestructure.passes.base import Pass, Rule
from bnrestructure.patterns.batch_norm import batch_norm

__all__ = ["FISSION"]


def split(layer: BatchNormLayer) -> None:
    """Put the three parts in the place of a batch norm."""
    node = layer.node
    site = provenance(node).site or module_path(node)
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    parameters = {name: reference(getattr(layer, name), before=node) for name in names}
    statistics = Statistics.create(before=node, x=layer.input)
    mean, var, size = (statistics.out(name) for name in ("mean", "var", "size"))
    if layer.synchronised:
        group = reference(layer.process_group, before=node)
        merged = Synchronise.create(before=node, mean=mean, var=var, size=size, process_group=group)
        mean, var, size = (merged.out(name) for name in ("mean", "var", "size"))
    finalize = Finalize.create(
        before=node, mean=mean, var=var, size=size, **parameters,
        momentum=layer.momentum, eps=layer.eps, dimensions=layer.dimensions,
    )  # fmt: skip
    vectors = {name: finalize.out(name) for name in ("mean", "scale", "beta")}
    normalise = Normalise.create(before=node, x=layer.input, **vectors)
    remember(statistics.node, statistics_of=(site,))
    remember(finalize.node, site=site)
    remember(normalise.node, normalises=(site,))
    for part in (statistics, finalize, normalise):
        locate(part.node, node)
    z = normalise.out("z")
    carry(z, node)
    node.replace_all_uses_with(z)
    node.graph.erase_node(node)


FISSION = Pass("fission", (Rule(batch_norm, split),))
