"""select-kernels: which implementation each fused node asks for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from bnrestructure.graph.fused import OUTPUTS, set_kwargs
from bnrestructure.passes.base import Fuel, PassResult, finish

__all__ = ["SelectKernels"]


@dataclass(frozen=True)
class SelectKernels:
    """Stamp the backend on every fused node.

    With ``auto`` and the device backends the final choice falls per call, when shape, dtype and device are known: the device's kernel where
    it supports the call, the reference where it does not (kernels/registry.py).
    """

    name: ClassVar[str] = "select-kernels"
    backend: str = "auto"
    fuel: Fuel = field(default_factory=Fuel, compare=False)

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        count = 0
        for node in graph_module.graph.nodes:
            fused = node.op == "call_function" and node.target in OUTPUTS
            if fused and node.kwargs.get("backend", "auto") != self.backend and self.fuel.take():
                set_kwargs(node, backend=self.backend)
                count += 1
        return finish(graph_module, count)


