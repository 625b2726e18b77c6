"""name-activations: ``x * sigmoid(x)`` -> ``F.silu(x)`` behind a batch norm, and what else a model writes out.

The pass always runs, in the preparation of a graph, and is no rewrite that a user can choose.
"""

from __future__ import annotations

from bnrestructure.passes.base import Pass, Rule, erase_dead
from bnrestructure.patterns.written_out import WrittenOut, written_out

__all__ = ["NAME_ACTIVATIONS"]


def name(match: WrittenOut) -> None:
    """Call the function that it is."""
    node = match.node
    node.op, node.target, node.args, node.kwargs = "call_function", match.function, (match.input,), {}
    erase_dead(*match.inside)


NAME_ACTIVATIONS = Pass("name-activations", (Rule(written_out, name),))
