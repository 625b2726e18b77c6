"""Typed views of fused nodes: what every one of them can do. The nodes themselves are in graph/ir.py."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, NamedTuple, Self

from torch import fx

__all__ = ["Fused", "Group", "item_of"]


class Group(NamedTuple):
    """Fields of a view that the op takes as one argument, a NamedTuple of class ``make``.

    A member is the field called ``prefix`` and its name; it has its default where the view has no such field, or the op takes that as an
    argument of its own.
    """

    make: Any
    prefix: str = ""


@dataclass(frozen=True, eq=False, kw_only=True)
class Fused:
    """A view of a node that calls one of ``ops``: its fields are the call's arguments as they were when the view was taken.

    The members of an argument that is a tuple (:class:`Group`) are fields, too. A field that the node does not give has the op's default.
    Other nodes of the graph are :class:`torch.fx.Node`; what is no tensor is a plain value. :meth:`update` writes to the node and returns
    a new view; views taken before keep the old values.
    """

    node: fx.Node

    op: ClassVar[Callable[..., Any]]
    outputs: ClassVar[tuple[str, ...]]
    _grouped: ClassVar[dict[str, Group]]
    _known_form: ClassVar[_Form]

    def __init_subclass__(
        cls, op: Callable[..., Any] | None = None, outputs: Any = None, groups: dict[str, Group] | None = None
    ) -> None:
        if op is not None:  # none: a class that several nodes have their fields from
            cls.op = staticmethod(op)
            cls.outputs = () if outputs is None else outputs._fields
            cls._grouped = groups or {}

    @property
    def forms_residual(self) -> bool:
        """Whether the node adds a shortcut to what it reads."""
        return False

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
        view.__dict__.update(cls._form().fields_of(node.kwargs), node=node)
        return view

    @classmethod
    def create(cls, *, before: fx.Node | None = None, after: fx.Node | None = None, **operands: Any) -> Self:
        """A new node of this op in front of or behind another, with these fields. Raises TypeError for fields that it has not."""
        place = before or after
        assert place is not None
        graph = place.graph
        arguments = cls._form().arguments_of(cls._checked(operands))
        with graph.inserting_before(place) if before is not None else graph.inserting_after(place):
            node = graph.call_function(cls.op, (), arguments)
        return cls._read(node)

    def update(self, **changes: Any) -> Self:
        """Change some fields of the node. Raises TypeError for fields that it has not."""
        form = self._form()
        self.node.kwargs = form.arguments_of(form.fields_of(self.node.kwargs) | self._checked(changes))
        return self._read(self.node)

    def times_read(self, tensor: fx.Node) -> int:
        """How many of the node's operands are this tensor."""
        return sum(value is tensor for value in self._form().fields_of(self.node.kwargs).values())

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
    def _form(cls) -> _Form:
        """How the fields make up a call of the op."""
        found: _Form | None = cls.__dict__.get("_known_form")
        if found is None:
            own = {field.name: field.default for field in fields(cls) if field.name != "node"}
            found = cls._known_form = _Form(inspect.signature(cls.op).parameters, own, cls._grouped)
        return found

    @classmethod
    def _checked(cls, operands: dict[str, Any]) -> dict[str, Any]:
        """The operands, each of which is a field."""
        unknown = operands.keys() - cls._form().defaults.keys()
        if unknown:
            raise TypeError(f"{cls.__name__} has no field {', '.join(sorted(unknown))}")
        return operands


class _Form:
    """How the fields of a view make up the call of its op, by keyword."""

    def __init__(self, arguments: Mapping[str, inspect.Parameter], defaults: dict[str, Any], groups: dict[str, Group]) -> None:
        self.defaults = defaults
        self._arguments = arguments
        self._groups = {name: (group.make, self._members(group)) for name, group in groups.items()}

    def _members(self, group: Group) -> list[tuple[str | None, Any]]:
        """(the field, if there is one, and its default) of each member of a group."""
        found: list[tuple[str | None, Any]] = []
        for member in group.make._fields:
            name = group.prefix + member
            is_field = name in self.defaults and name not in self._arguments
            default = self.defaults[name] if is_field else group.make._field_defaults[member]
            found.append((name if is_field else None, default))
        return found

    def fields_of(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that a call gives. What is no argument of the op stays as it is, for the verifier to see."""
        given: dict[str, Any] = {}
        for name, value in arguments.items():
            make, members = self._groups.get(name, (None, ()))
            if make is not None and isinstance(value, make):
                given.update((field, of) for (field, _), of in zip(members, value, strict=True) if field is not None)
            else:
                given[name] = value
        return given

    def arguments_of(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call with these fields: those that the op has no default for, and those that differ from it.

        What is no field is an argument as it is, for the verifier to see.
        """
        found = {}
        for name, argument in self._arguments.items():
            if name in self._groups:
                make, members = self._groups[name]
                values = [default if field is None else given.get(field, default) for field, default in members]
                if MISSING in values:
                    raise TypeError(f"{make.__name__} needs {', '.join(make._fields[i] for i, v in enumerate(values) if v is MISSING)}")
                if argument.default is argument.empty or any(v != d for v, (_, d) in zip(values, members, strict=True)):
                    found[name] = make(*values)
            elif name in given:
                found[name] = given[name]
            elif argument.default is argument.empty and self.defaults[name] is not MISSING:
                found[name] = self.defaults[name]
        return found | {name: value for name, value in given.items() if name not in self.defaults}


def item_of(value: object) -> tuple[fx.Node, int] | None:
    """(the node that ``value`` is an item of, which one) where it is an item of a node's results."""
    if not isinstance(value, fx.Node) or value.target is not operator.getitem:
        return None
    node, index = value.args
    return (node, index) if isinstance(node, fx.Node) and isinstance(index, int) else None
