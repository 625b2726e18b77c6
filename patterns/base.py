"""What every pattern is: a function from one node to what was found there, a reason why nothing was, or None."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import fx

__all__ = ["Described", "Finder", "Found", "Pair", "Refusal", "found_at", "refused_at"]


class Described(Protocol):
    """The description of a node that reads one tensor."""

    @property
    def node(self) -> fx.Node: ...

    @property
    def input(self) -> fx.Node: ...


M = TypeVar("M")
R = TypeVar("R", bound=Described)


@dataclass(frozen=True)
class Refusal:
    """A place that a pattern looked at and left alone, and why."""

    node: fx.Node
    reason: str


#: A pattern looks at one node and what is around it, and changes nothing.
Finder = Callable[[fx.Node], M | Refusal | None]


def found_at(pattern: Finder[M], nodes: Iterable[fx.Node]) -> Iterator[M]:
    """What a pattern finds at these nodes."""
    for node in nodes:
        match = pattern(node)
        if match is not None and not isinstance(match, Refusal):
            yield match


def refused_at(pattern: Finder[M], nodes: Iterable[fx.Node]) -> Iterator[Refusal]:
    """What a pattern refuses at these nodes."""
    return (match for node in nodes if isinstance(match := pattern(node), Refusal))


@dataclass(frozen=True)
class Found(Generic[M, R]):
    """A pair of neighbours: ``maker`` made the tensor that ``reader`` reads."""

    maker: M
    reader: R


@dataclass(frozen=True)
class Pair(Generic[M, R]):
    """The pattern of two neighbours, found at the second: ``maker -> reader``.

    reader    what the second node is, by its description; the description's ``input`` is the tensor in question
    maker     what made that tensor; a Refusal says why it is not what it might be
    alone     nothing else may read the tensor
    when      what must hold of the two together
    """

    maker: Callable[[fx.Node], M | Refusal | None]
    reader: Callable[[fx.Node], R | None]
    alone: bool = False
    when: Callable[[M, R], bool] | None = None

    def __call__(self, node: fx.Node) -> Found[M, R] | Refusal | None:
        reader = self.reader(node)
        if reader is None:
            return None
        maker = self.maker(reader.input)
        if maker is None or isinstance(maker, Refusal):
            return None if maker is None else Refusal(node, maker.reason)
        fits = (not self.alone or len(reader.input.users) == 1) and (self.when is None or self.when(maker, reader))
        return Found(maker, reader) if fits else None
