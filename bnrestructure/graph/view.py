"""Typed views of fused nodes: what every one of them can do. The nodes themselves are in graph/ir.py."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Self

from torch import fx

__all__ = ["Fused", "item_of"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Fused:
    """A view of a node that calls one of ``ops``: its fields are the call's arguments as they were when the view was taken.

    A field that the node does not give has the op's default. Other nodes of the graph are :class:`torch.fx.Node`; what is no tensor is a
    plain value. :meth:`update` writes to the node and returns a new view; views taken before keep the old values.
    """

    node: fx.Node

    op: ClassVar[Callable[..., Any]]
    outputs: ClassVar[tuple[str, ...]]
    _fields: ClassVar[dict[str, Any]]

    def __init_subclass__(cls, op: Callable[..., Any] | None = None, outputs: Any = None) -> None:
        if op is not None:  # none: a class that several nodes have their fields from
            cls.op = staticmethod(op)
            cls.outputs = () if outputs is None else outputs._fields

    @classmethod
    def of(cls, node: object) -> Self | None:
        """The view of a node that calls this op, or None of anything else."""
        return cls._read(node) if isinstance(node, fx.Node) and node.target is cls.op else None

    @classmethod
    def making(cls, value: object, output: str) -> Self | None:
        """The view of the node that ``value`` is this output of, or None where it is not."""
        item = item_of(value)
        if item is None or item[0].target is not cls.op or cls.outputs[item[1]] != output:
            return None
        return cls._read(item[0])

    @classmethod
    def every(cls, graph: fx.Graph) -> list[Self]:
        """All nodes of this op, in graph order."""
        return [cls._read(node) for node in graph.find_nodes(op="call_function", target=cls.op)]

    @classmethod
    def _read(cls, node: fx.Node) -> Self:
        view = object.__new__(cls)  # views are made by the thousand: their fields are copied from the call in one go
        values = view.__dict__
        values.update(node.kwargs)
        values["node"] = node
        return view

    @classmethod
    def create(cls, *, before: fx.Node | None = None, after: fx.Node | None = None, **operands: Any) -> Self:
        """A new node of this op in front of or behind another, with these fields. Raises TypeError for fields that it has not."""
        place = before or after
        assert place is not None
        graph = place.graph
        with graph.inserting_before(place) if before is not None else graph.inserting_after(place):
            given = {name: operands.pop(name, default) for name, default in cls._known().items()}
            given = {name: value for name, value in given.items() if value is not MISSING}
            node = graph.call_function(cls.op, (), cls._checked(given | operands))
        return cls._read(node)

    def update(self, **changes: Any) -> Self:
        """Change some fields of the node. Raises TypeError for fields that it has not."""
        self.node.kwargs = {**self.node.kwargs, **self._checked(changes)}
        return self._read(self.node)

    def times_read(self, tensor: fx.Node) -> int:
        """How many of the node's operands are this tensor."""
        return sum(value is tensor for value in self.node.kwargs.values())

    def outs(self) -> dict[str, fx.Node]:
        """The outputs that have a node, by name."""
        names = self.outputs
        return {names[item[1]]: user for user in self.node.users if (item := item_of(user)) is not None}

    def out(self, name: str) -> fx.Node:
        """The node of one output, made right behind the fused node if there is none."""
        existing = self.outs().get(name)
        if existing is not None:
            return existing
        with self.node.graph.inserting_after(self.last):
            arguments = (self.node, self.outputs.index(name))
            return self.node.graph.create_node("call_function", operator.getitem, arguments, name=f"{self.node.name}_{name}")

    @property
    def last(self) -> fx.Node:
        """The last of the nodes of the outputs, which stand behind the fused node; the node itself where it has none."""
        return max(self.outs().values(), default=self.node)

    def erase(self) -> None:
        """Take the node and its outputs, which nobody reads any more, out of the graph."""
        for item in self.outs().values():
            self.node.graph.erase_node(item)
        self.node.graph.erase_node(self.node)

    def erase_if_unread(self) -> None:
        """Take the node and its outputs out of the graph, if nobody reads any of them any more."""
        if not any(item.users for item in self.outs().values()):
            self.erase()

    @classmethod
    def _known(cls) -> dict[str, Any]:
        """The fields in the order of the op's arguments, with what a call must give for them where only the field has a default."""
        known: dict[str, Any] | None = cls.__dict__.get("_fields")
        if known is None:
            arguments = inspect.signature(cls.op).parameters
            own = {field.name: field.default for field in fields(cls) if field.name != "node"}
            known = {name: own[name] if argument.default is argument.empty else MISSING for name, argument in arguments.items()}
            cls._fields = known
        return known

    @classmethod
    def _checked(cls, operands: dict[str, Any]) -> dict[str, Any]:
        """The operands, each of which is a field."""
        unknown = operands.keys() - cls._known().keys()
        if unknown:
            raise TypeError(f"{cls.__name__} has no field {', '.join(sorted(unknown))}")
        return operands


def item_of(value: object) -> tuple[fx.Node, int] | None:
    """(the node that ``value`` is an item of, which one) where it is an item of a node's results."""
    if not isinstance(value, fx.Node) or value.target is not operator.getitem:
        return None
    node, index = value.args
    return (node, index) if isinstance(node, fx.Node) and isinstance(index, int) else None
