"""How models spell activations: one table, for the patterns that fuse them, for what makes in-place ones plain, and for capture.

A new activation that kernels know (core/activation.py) is one more line here: it is fused then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from bnrestructure.core.activation import leaky_relu_name
from bnrestructure.graph.boundaries import boundary_reason
from bnrestructure.graph.layers import arguments_of, input_of, module_of
from bnrestructure.graph.provenance import provenance

__all__ = ["FUNCTIONS", "LAYERS", "MODULES", "NAMES", "Activation", "Spelling", "activation_of"]


@dataclass(frozen=True)
class Activation:
    """A call of an activation that a prologue can apply, by its name in core/activation.py."""

    node: fx.Node
    input: fx.Node
    name: str


@dataclass(frozen=True)
class Spelling:
    """One activation: as a module and as a function, whose parameters have the names of the module's attributes.

    parameters    their defaults
    name          how kernels know it, perhaps by its parameters; None where no kernel does
    also          other functions and methods that are the same
    """

    module: type[nn.Module]
    function: Callable[..., Any]
    name: str | Callable[..., str | None] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    also: tuple[Callable[..., Any] | str, ...] = ()


def _leaky_relu(negative_slope: object) -> str | None:
    return leaky_relu_name(negative_slope) if isinstance(negative_slope, int | float) else None


def _gelu(approximate: object) -> str:
    return "gelu" if approximate == "none" else "gelu_tanh"


_SPELLINGS = (
    Spelling(nn.ReLU, F.relu, "relu", also=(torch.relu, "relu")),
    Spelling(nn.ReLU6, F.relu6, "relu6"),
    Spelling(nn.SiLU, F.silu, "silu"),
    Spelling(nn.Hardswish, F.hardswish, "hardswish"),
    Spelling(nn.LeakyReLU, F.leaky_relu, _leaky_relu, {"negative_slope": 0.01}),
    Spelling(nn.GELU, F.gelu, _gelu, {"approximate": "none"}),
    Spelling(nn.Hardsigmoid, F.hardsigmoid),
    Spelling(nn.Mish, F.mish),
    Spelling(nn.ELU, F.elu, parameters={"alpha": 1.0}),
    Spelling(nn.Hardtanh, F.hardtanh, parameters={"min_val": -1.0, "max_val": 1.0}),
)
#: The spellings by module type, and by function or name of a method.
MODULES: dict[type[nn.Module], Spelling] = {spelling.module: spelling for spelling in _SPELLINGS}
FUNCTIONS: dict[Any, Spelling] = {target: spelling for spelling in _SPELLINGS for target in (spelling.function, *spelling.also)}
#: All activations, those that are never fused among them: layers, and functions and methods by name. A result has its input's shape.
LAYERS: tuple[type[nn.Module], ...] = (*MODULES, nn.Sigmoid, nn.Tanh)
NAMES: frozenset[str] = frozenset({spelling.function.__name__ for spelling in _SPELLINGS} | {"sigmoid", "tanh"})


def activation_of(node: fx.Node) -> Activation | None:
    """The activation that this node applies, None where it is something else or no prologue can."""
    if node.op == "call_module":
        module = module_of(node)
        spelling = MODULES.get(type(module)) if module is not None else None
        if spelling is None or module is None or boundary_reason(module) is not None:
            return None
        values = {name: getattr(module, name) for name in spelling.parameters}
    elif node.op in ("call_function", "call_method"):
        spelling = FUNCTIONS.get(node.target)
        if spelling is None:
            return None
        given = arguments_of(node, ("input", *spelling.parameters), dict(spelling.parameters))
        values = {name: given[name] for name in spelling.parameters}
    else:
        return None
    source = input_of(node)
    name = spelling.name(**values) if callable(spelling.name) else spelling.name
    if source is None or name is None or provenance(node).changed_by is not None or provenance(source).changed_by is not None:
        return None
    return Activation(node, source, name)
