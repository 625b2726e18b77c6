"""The verifier of the IR: the rules that every pass may rely on, and must leave standing. Run after each pass.

Most rules are about the nodes of some kinds, and look at one node and its neighbours: node_rules.py, edge_rules.py, memory_rules.py. Those
here are about all nodes: their order, and the sites.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from torch import fx

from bnrestructure.core.errors import BrokenGraphError
from bnrestructure.graph.edge_rules import EDGE_RULES
from bnrestructure.graph.invariant import Invariant, Look
from bnrestructure.graph.ir import FUSED, OTHERS, BatchNorm, fused_of
from bnrestructure.graph.memory_rules import MEMORY_RULES
from bnrestructure.graph.node_rules import NODE_RULES
from bnrestructure.graph.provenance import provenance
from bnrestructure.graph.view import Fused

__all__ = ["RULES", "Violation", "verify", "violations"]

_OF_NODES: tuple[Invariant, ...] = (*NODE_RULES, *EDGE_RULES, *MEMORY_RULES)
_KINDS = {rule: [view for view in (*FUSED, *OTHERS) if issubclass(view, rule.of)] for rule in _OF_NODES}
#: The names of all rules.
RULES = ("order", "sites", "plain memory", *(rule.name for rule in _OF_NODES), "owners")


class Violation(NamedTuple):
    """A node that breaks a rule, and how."""

    node: fx.Node
    rule: str
    what: str


def verify(graph: fx.Graph, pass_name: str) -> None:
    """Raise BrokenGraphError, which names the pass, the node and the rule, for the first rule that does not hold."""
    for node, rule, what in violations(graph):
        raise BrokenGraphError(pass_name, node.name, rule, what)


def violations(graph: fx.Graph) -> list[Violation]:
    """Every node that breaks the first rule that does not hold: later ones rely on it."""
    views: list[Fused] = []
    found = list(_plain(graph, views))
    look = Look(views)
    for rule, kinds in _KINDS.items():
        if found:
            return found
        for view in (view for kind in kinds for view in look.of(kind)):
            what = rule.broken(view, look)
            if what is not None:
                found.append(Violation(view.node, rule.name, what))
    return found or list(_owners(views))


def _plain(graph: fx.Graph, views: list[Fused]) -> Iterator[Violation]:
    """What must hold of all nodes: operands are computed before they are read, a site is one batch norm. Collects the fused nodes."""
    computed: set[fx.Node] = set()
    sites: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if not computed.issuperset(node.all_input_nodes):
            yield Violation(node, "order", "it reads what is not computed before it in this graph")
        computed.add(node)
        if node.op == "get_attr" or node.target is operator.getitem:
            continue
        known, view = provenance(node), fused_of(node)
        if known.site is not None and sites.setdefault(known.site, node) is not node:
            yield Violation(node, "sites", f"{sites[known.site].name} is the batch norm {known.site}, too")
        if view is not None:
            views.append(view)
            if known.changed_by is not None:
                yield Violation(node, "plain memory", f"{known.changed_by} changes what it makes in place")


def _owners(views: list[Fused]) -> Iterator[Violation]:
    """The statistics of a split site are taken by one node, or by several that share-statistics made share them; somebody normalises it."""
    statistics: dict[str, list[fx.Node]] = defaultdict(list)
    normalised: set[str] = set()
    for view in views:
        known = provenance(view.node)
        normalised.update(known.normalises)
        for site in known.statistics_of:
            statistics[site].append(view.node)
    for view in views:
        split = provenance(view.node).site
        if split is None or isinstance(view, BatchNorm):
            continue
        owners = statistics.pop(split, [])
        if not owners or (len(owners) > 1 and not all(provenance(owner).shared_statistics for owner in owners)):
            yield Violation(view.node, "owners", f"the statistics of {split} are taken by {len(owners)} nodes")
        if split not in normalised:
            yield Violation(view.node, "owners", f"nobody normalises for {split}")
    for site, (owner, *_) in statistics.items():
        yield Violation(owner, "owners", f"it takes statistics of {site}, which is no split batch norm of this graph")
