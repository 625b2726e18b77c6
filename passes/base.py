"""What a pass is: a name and its rules; and the one driver that walks over a graph, takes fuel, counts and verifies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import fx

from bnrestructure.graph.verify import verify
from bnrestructure.graph.view import Fused
from bnrestructure.patterns.base import Finder, Refusal

__all__ = ["Fuel", "Pass", "PassResult", "Rule", "erase_dead"]

M = TypeVar("M")


@dataclass(frozen=True)
class PassResult:
    """The graph after a pass, whether it changed, and how many rewrites were made."""

    graph_module: fx.GraphModule
    modified: bool
    count: int


@dataclass
class Fuel:
    """Stop rewriting after ``limit`` rewrites, across all passes: bisecting over it finds the rewrite that breaks a model."""

    limit: int | None = None
    used: int = field(default=0, init=False)

    def take(self) -> bool:
        """Whether one more rewrite may be made; counts it."""
        if self.limit is not None and self.used >= self.limit:
            return False
        self.used += 1
        return True


@dataclass(frozen=True)
class Rule(Generic[M]):
    """What to look for at a node, and how to rewrite what was found there.

    ``at`` names the fused nodes that are looked at; None: all nodes. A rewrite leaves nothing behind at which the rule would find the same
    again, for the driver walks until nothing is found.
    """

    find: Finder[M]
    rewrite: Callable[[M], None]
    at: type[Fused] | None = None

    def apply(self, graph: fx.Graph, fuel: Fuel) -> int:
        """Rewrite what is found, in graph order and in as many walks as it takes; returns how many rewrites were made."""
        total = 0
        while count := self._walk(graph, fuel):
            total += count
        return total

    def _walk(self, graph: fx.Graph, fuel: Fuel) -> int:
        nodes: Any = graph.nodes if self.at is None else graph.find_nodes(op="call_function", target=self.at.op)
        count = 0
        for node in nodes:
            if self.at is not None and node.next.prev is not node:
                continue  # a rewrite has taken it out of the graph
            match = self.find(node)
            if match is None or isinstance(match, Refusal):
                continue
            if not fuel.take():
                break
            self.rewrite(match)
            count += 1
        return count


@dataclass(frozen=True)
class Pass:
    """A rewrite: alone it preserves meaning, a second run changes nothing, and the pipeline may end after it.

    Calling the pass rewrites a graph in place; ``rewrite`` leaves it to the caller to recompile the module that owns the graph.
    """

    name: str
    rules: tuple[Rule[Any], ...]
    fuel: Fuel = field(default_factory=Fuel, compare=False)

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        result = self.rewrite(graph_module)
        if result.modified:
            graph_module.recompile()
        return result

    def rewrite(self, graph_module: fx.GraphModule) -> PassResult:
        """Apply the rules, then verify the graph. Raises BrokenGraphError where a rule of the IR does not hold any more."""
        count = self.apply(graph_module.graph)
        if count:
            verify(graph_module.graph, self.name)
        return PassResult(graph_module, count > 0, count)

    def apply(self, graph: fx.Graph) -> int:
        """Apply the rules in turn, until none of them finds anything; returns how many rewrites were made."""
        total = 0
        while count := sum(rule.apply(graph, self.fuel) for rule in self.rules):
            total += count
        return total


def erase_dead(*nodes: fx.Node) -> None:
    """Erase those of ``nodes`` that nothing reads any more, last first."""
    for node in reversed(nodes):
        if not node.users:
            node.graph.erase_node(node)
