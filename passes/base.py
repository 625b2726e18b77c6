"""What a pass is, and the fuel that bounds how many rewrites are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from torch import fx

__all__ = ["Fuel", "Pass", "PassResult", "erase_dead"]


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


class Pass(Protocol):
    """A rewrite: alone it preserves meaning, a second run changes nothing, and the pipeline may end after it."""

    name: ClassVar[str]

    @property
    def fuel(self) -> Fuel: ...

    def __call__(self, graph_module: fx.GraphModule) -> PassResult: ...


def erase_dead(graph: fx.Graph, *nodes: fx.Node) -> None:
    """Erase those of ``nodes`` that nothing reads any more, last first."""
    for node in reversed(nodes):
        if not node.users:
            graph.erase_node(node)


def finish(gm: fx.GraphModule, count: int) -> PassResult:
    """Check and recompile the graph after ``count`` rewrites, and wrap it up."""
    if count:
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, count > 0, count)
