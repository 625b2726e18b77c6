"""The back door: what a rewritten graph needs before it runs as somebody's forward."""

from __future__ import annotations

from torch import fx

from bnrestructure.graph.ir import output_of
from bnrestructure.passes.base import Pass, Rule
from bnrestructure.passes.restore_formats import RESTORE_FORMATS, formats_read
from bnrestructure.passes.share_returned import hand_out

__all__ = ["finish"]


def finish(gm: fx.GraphModule) -> None:
    """What code that is not ours gets, its callers and its modules, is as eager would give it. The last step, after all passes."""
    RETURN_APART.rewrite(gm)
    RESTORE_FORMATS.rewrite(gm)


def one_of_several(node: fx.Node) -> fx.Node | None:
    """An output of a node that has more, which the caller alone reads: a hook on it would be called for the others' gradients."""
    return node if output_of(node) is not None and [user.op for user in node.users] == ["output"] else None


def return_apart(node: fx.Node) -> None:
    """Put a node in between, which gradients of the other outputs do not reach."""
    output = next(iter(node.users))
    made = hand_out(node, formats_read(output).get(node), after=output.prev)
    output.replace_input_with(node, made)


RETURN_APART = Pass("return-apart", (Rule(one_of_several, return_apart),))
