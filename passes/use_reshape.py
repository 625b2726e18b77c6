"""use-reshape: ``x.view(...)`` -> ``x.reshape(...)``, for fused nodes may hand on channels_last tensors where eager has contiguous ones.

Not where memory is shared with something that is written to: a copy would lose what is written (restore-formats sees to those). The pass
always runs, first, and is no rewrite that a user can choose.
"""

from __future__ import annotations

import torch
from torch import fx

from bnrestructure.graph.provenance import provenance
from bnrestructure.passes.base import Pass, Rule

__all__ = ["USE_RESHAPE"]


def view(node: fx.Node) -> fx.Node | None:
    """A view of another shape; one in another dtype is no reshape."""
    is_view = node.op == "call_method" and node.target in ("view", "view_as") and provenance(node).changed_by is None
    return node if is_view and not any(isinstance(a, torch.dtype) for a in (*node.args[1:], *node.kwargs.values())) else None


def reshape(node: fx.Node) -> None:
    """Let it copy where it must."""
    node.target = "reshape" if node.target == "view" else "reshape_as"
    if "size" in node.kwargs:
        node.kwargs = {"shape": node.kwargs["size"]}


USE_RESHAPE = Pass("use-reshape", (Rule(view, reshape),))
