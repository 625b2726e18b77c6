"""Captured graphs, passes by name, and graphs as text that a person can compare."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn

from bnrestructure.capture.regions import captured
from bnrestructure.graph.ir import fused_of
from bnrestructure.passes.base import Pass, PassResult
from bnrestructure.passes.pipeline import PASSES, steps

__all__ = ["after", "graph_text", "make_pass", "prefix_before", "run_pass", "site_graph"]


def site_graph(model: nn.Module) -> fx.GraphModule:
    """The captured, functionalised graph of a model that takes one tensor, before any pass."""
    gm = captured(model, type(model).forward).graph_module
    gm.recompile()
    return gm


def make_pass(name: str, fuel: int | None = None) -> Pass:
    """One pass; select-kernels with the reference backend."""
    return next(step for step in steps([name], "reference", fuel) if step.name == name)


def prefix_before(name: str) -> tuple[str, ...]:
    """The passes that come before this one in the pipeline."""
    return PASSES[: PASSES.index(name)]


def after(model: nn.Module, *names: str) -> fx.GraphModule:
    """The model's graph after these passes."""
    gm = site_graph(model)
    for name in names:
        make_pass(name)(gm)
    return gm


def run_pass(model: nn.Module, name: str, *before: str) -> tuple[fx.GraphModule, PassResult]:
    """The graph after ``before`` and then this pass, and what this pass reported."""
    gm = after(model, *before)
    return gm, make_pass(name)(gm)


def graph_text(gm: fx.GraphModule) -> str:
    """One line a node; what is None, False or at its default is left out, and so are parameters' own lines."""
    return "\n".join(_line(node) for node in gm.graph.nodes if node.op != "get_attr")


_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "act": ("identity",), "groups": (1,), "offset": (0,), "backend": ("auto",), "stride": ((1,), (1, 1), (1, 1, 1)),
    "padding": ((0,), (0, 0), (0, 0, 0)), "dilation": ((1,), (1, 1), (1, 1, 1)), "momentum": (0.1,), "eps": (1e-5,),
    "dimensions": ((2, 3), (4,), (5,)),
}  # fmt: skip


def _line(node: fx.Node) -> str:
    if node.op == "output":
        return f"return {_show(node.args[0])}"
    if node.op == "placeholder":
        return f"{node.name} = input"
    if node.target is operator.getitem and len(node.args) == 2:
        return f"{node.name} = {_show(node.args[0])}[{_show(node.args[1])}]"
    called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if node.op == "call_method":
        called = f".{called}"
    view = fused_of(node)
    given = node.kwargs if view is None else {k: v for k, v in vars(view).items() if k != "node"}
    kwargs = {k: v for k, v in given.items() if v is not None and v is not False and v not in _DEFAULTS.get(k, ())}
    shown = [_show(a) for a in node.args] + [f"{k}={_show(v)}" for k, v in kwargs.items()]
    return f"{node.name} = {called}({', '.join(shown)})"


def _show(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"self.{value.target}" if value.op == "get_attr" else value.name
    if isinstance(value, list):
        return f"[{', '.join(map(_show, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(_show, value))})"
    return repr(value)
