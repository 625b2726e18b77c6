"""What a node calls, told by name: a function, a method, an operator of ``torch.ops``, code that capture did not look into."""

from __future__ import annotations

import torch
from torch import fx

__all__ = ["called_name", "is_custom_call"]


def called_name(node: fx.Node) -> str | None:
    """The name of the function, method or operator that a node calls, without an operator's overload; None of any other node."""
    if node.op not in ("call_function", "call_method"):
        return None
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", "")).partition(".")[0]


def is_custom_call(node: fx.Node) -> bool:
    """Whether a function of the user's is called, a custom autograd Function say: Dynamo's graphs have a graph inside a graph for it."""
    if node.op != "call_function":
        return False
    captured = (getattr(node.target, "__module__", None) or "").startswith("bnrestructure.capture")
    return captured or isinstance(node.target, torch._ops.HigherOrderOperator)
