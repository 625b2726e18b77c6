"""A rewritten graph as a function of the user's own module: every parameter, buffer and layer is looked up when it runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from bnrestructure.core.plain import plain
from bnrestructure.ops.casts import Casts, cast_ahead
from bnrestructure.ops.synchronise import synchronise

__all__ = ["Program", "copied_graph", "dict_with"]

#: Runs a function on the inputs and the own tensors, or does what comes to the same.
Through = Callable[[Callable[..., Any], Sequence[Tensor], Sequence[Tensor]], Any]


class Program:
    """``program(module, tensors)`` runs a graph whose attribute paths start at ``module``.

    It holds no tensor: replaced parameters, ``load_state_dict(assign=True)`` and deep copies see their own. Parameters, buffers and
    other tensors are fetched straight from the dicts of the modules that own them, which are remembered for the module that was called
    last; the caller vouches that its module tree has not changed in between (capture/state.py). ``synchronises``: whether it merges
    statistics across processes.
    """

    def __init__(self, gm: fx.GraphModule, rebuild: Callable[[Sequence[Any]], Any] | None, name: str) -> None:
        graph = copied_graph(gm.graph)
        self._slots = _attributes_to_arguments(graph, gm)
        self.synchronises = any(node.target is synchronise for node in graph.nodes)
        self._layers = [str(node.target) for node in graph.nodes if node.op == "call_module"]
        self._rebuild = rebuild
        for node in graph.nodes:
            node.args, node.kwargs = map_aggregate(node.args, plain), map_aggregate(node.kwargs, plain)  # of layers' attributes, too
        code = graph.python_code("self")
        self._source = code.src
        namespace = dict(code.globals)
        exec(compile(code.src, f"<bnrestructure: {name}>", "exec"), namespace)
        self._function = namespace["forward"]
        self._casts = Casts()
        self._owner: nn.Module | None = None
        self._dicts: list[tuple[dict[str, Any], str]] = []

    def __call__(self, module: nn.Module, tensors: Sequence[Tensor], through: Through | None = None) -> Any:
        """The program's result. ``through`` is called in place of its function, with that, the inputs, and all tensors of the module's
        own that it reads: those of PyTorch's layers that it calls, too.
        """
        owner, dicts = self._owner, self._dicts
        if owner is not module:
            dicts = [_home(module.get_submodule(path), name) for path, name in self._slots]
            self._owner, self._dicts = module, dicts
        try:
            own = [values[name] for values, name in dicts]
        except KeyError:  # it is an attribute of another kind now, or none
            self._owner, self._dicts = module, [_home(module.get_submodule(path), name) for path, name in self._slots]
            own = [values[name] for values, name in self._dicts]
        result = self._run(module, *tensors, *own) if through is None else self._through(through, module, tensors, own)
        return result if self._rebuild is None else self._rebuild(result)

    def _run(self, *arguments: Any) -> Any:
        """The function's result; on a GPU's autocast its weights are cast together (ops/casts.py)."""
        if not torch.is_autocast_enabled("cuda") or torch.compiler.is_compiling():
            return self._function(*arguments)
        with cast_ahead(self._casts):
            return self._function(*arguments)

    def _through(self, through: Through, module: nn.Module, tensors: Sequence[Tensor], own: list[Tensor]) -> Any:
        layers = [module.get_submodule(path) for path in self._layers]
        of_layers = [t for layer in layers for t in chain(layer.parameters(), layer.buffers())]
        count = len(tensors) + len(own)
        return through(lambda *given: self._run(module, *given[:count]), tensors, own + of_layers)

    def digest(self, of: Any) -> str:
        """Names the program, run on what ``of`` says, in files."""
        return hashlib.sha256(f"{self._source}\n{of}".encode()).hexdigest()[:16]


def copied_graph(graph: fx.Graph) -> fx.Graph:
    """A copy that holds on to no module."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    return copied


def dict_with(module: nn.Module, name: str) -> dict[str, Any] | None:
    """The dict that an attribute of the module is in: its own, that of its parameters or of its buffers. None for an absent one."""
    return next((values for values in (module.__dict__, module._parameters, module._buffers) if name in values), None)


def _home(module: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    values = dict_with(module, name)
    if values is None:
        raise AttributeError(f"{type(module).__name__!r} object has no attribute {name!r}")
    return values, name


def _attributes_to_arguments(graph: fx.Graph, gm: fx.GraphModule) -> list[tuple[str, str]]:
    """Turn reads of tensors into arguments behind the graph's own; where to fetch each: (module path, name).

    In ``gm``, which torch.fx has copied them to, all tensors but parameters are buffers.
    """
    slots: list[tuple[str, str]] = []
    arguments: dict[str, fx.Node] = {}
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    last = placeholders[-1] if placeholders else None
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        target = str(node.target)
        path, _, name = target.rpartition(".")
        owner = gm.get_submodule(path)
        if name not in owner._parameters and name not in owner._buffers:
            continue
        if target not in arguments:
            position = graph.inserting_after(last) if last is not None else graph.inserting_before(next(iter(graph.nodes)))
            with position:
                last = arguments[target] = graph.placeholder(f"parameter_{len(slots)}")  # paths need not be identifiers
            slots.append((path, name))
        node.replace_all_uses_with(arguments[target])
        graph.erase_node(node)
    return slots
