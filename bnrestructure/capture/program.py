"""A rewritten graph as a plain function of the user's own module: every parameter, buffer and layer is looked up when it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

__all__ = ["compile_graph", "use_reshape"]


def compile_graph(gm: fx.GraphModule, name: str) -> Callable[..., Any]:
    """``function(module, *tensors)`` from a graph whose attribute paths start at ``module``.

    The function holds no parameter or module: replaced parameters, ``load_state_dict(assign=True)`` and deep copies see their own tensors.
    """
    code = gm.graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, f"<bnrestructure: {name}>", "exec"), namespace)
    return namespace["forward"]


def use_reshape(gm: fx.GraphModule) -> None:
    """Turn ``x.view(...)`` into ``x.reshape(...)``: fused nodes may hand on channels_last tensors where eager has contiguous ones."""
    for node in gm.graph.nodes:
        if node.op == "call_method" and node.target == "view" and not any(_is_dtype(a) for a in node.args[1:]):
            node.target = "reshape"


def _is_dtype(argument: Any) -> bool:
    import torch

    return isinstance(argument, torch.dtype)
