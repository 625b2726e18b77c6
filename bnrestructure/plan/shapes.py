"""What shapes a model's layers get from its inputs, and whether it takes them at all: its own forward is asked, not ours."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from bnrestructure.capture.arguments import Arguments
from bnrestructure.capture.swap import swap_out
from bnrestructure.core.errors import UsageError, first_line
from bnrestructure.core.generators import preserved_generators
from bnrestructure.graph.boundaries import is_library_leaf

__all__ = ["Observed", "Shapes", "layer_shapes"]

#: Path of a layer -> shape and dtype of its input.
Shapes = dict[str, tuple[torch.Size, torch.dtype]]


class Observed:
    """What the parts of a model are called with in one training forward, for these inputs. It runs when somebody first asks.

    It runs for real, on a copy: on the meta device a wrong shape and a data-dependent step would look the same.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._model = model
        self._inputs = inputs
        self._calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] | None = None

    def arguments(self, path: str) -> Arguments | None:
        """Those of the first call of the module at ``path``; None where nobody calls it. Raises UsageError as :meth:`check` does."""
        args, kwargs = (self._inputs, {}) if path == "" else self._run().get(path, (None, None))
        return None if args is None or kwargs is None else Arguments(args, kwargs)

    def check(self) -> None:
        """Raise UsageError with the model's own words when its training forward does not take inputs of these shapes."""
        self._run()

    def _run(self) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
        if self._calls is not None:
            return self._calls
        calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        double = _unwatched(self._model)
        for name, module in double.named_modules():
            if not isinstance(module, torch.jit.ScriptModule) and not is_library_leaf(module):
                module.register_forward_pre_hook(lambda _, args, kwargs, name=name: _note(calls, name, args, kwargs), with_kwargs=True)
        try:
            with torch.no_grad(), preserved_generators(of=double.parameters()):
                double(*pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), self._inputs))
        except Exception as error:  # a forward() may raise anything on a wrong shape
            shown = ", ".join(_shown(leaf) for leaf in pytree.tree_leaves(self._inputs)[:2])
            raise UsageError(f"the model does not take this input ({shown}): {first_line(error)}") from error
        self._calls = calls
        return calls


def _unwatched(model: nn.Module) -> nn.Module:
    """A copy in training mode that runs its own forward, without the hooks: what these see and count is of the model's own calls."""
    double = copy.deepcopy(model).train()
    swap_out(double)
    for module in double.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
    return double


def _note(calls: dict[str, Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if name not in calls:
        with FakeTensorMode():
            calls[name] = pytree.tree_map_only(torch.Tensor, _without_data, (args, kwargs))


def _without_data(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) if t.layout is torch.strided else t


def _shown(leaf: object) -> str:
    return "x".join(map(str, leaf.shape)) if isinstance(leaf, torch.Tensor) else repr(leaf)


def layer_shapes(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Shapes, str | None]:
    """Input shape and dtype of every batch norm and convolution layer in one training forward, from the meta device.

    The second result says why some are missing, or is None: data-dependent models cannot run there to the end.
    """
    found: Shapes = {}

    def record(name: str, x: torch.Tensor) -> None:
        found.setdefault(name, (x.shape, x.dtype))

    layers = (nn.modules.batchnorm._BatchNorm, nn.modules.conv._ConvNd)
    names = {name for name, module in model.named_modules() if isinstance(module, layers[0])}
    try:
        double = _unwatched(model).to("meta")
        for name, module in double.named_modules():
            if isinstance(module, layers[0]) and module.momentum is None:
                module.momentum = 0.1  # a cumulative average reads a counter's value, which a meta tensor has not
            if isinstance(module, layers):
                module.register_forward_pre_hook(lambda _, args, name=name: record(name, args[0]) if args else None)
        double(*pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), inputs))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError) as error:  # it reads values, or cannot be there
        # Meta tensors have no values. Shapes found so far still serve the plan, which then says how far they go.
        return found, f"shapes are known for {len(names & found.keys())} batch norms only: {first_line(error)}"
    return found, None
