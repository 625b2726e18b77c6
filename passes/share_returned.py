"""share-returned: what a forward returns *and* reads on is one tensor, for its caller as for its readers.

A caller may hook such a tensor, call its ``retain_grad()``, or ask ``torch.autograd.grad()`` for its gradient. Fusion would leave the
caller with a tensor that the rest of the graph does not read: a convolution that normalises what it reads takes the raw tensor instead,
and a chain passes on another. So the tensor goes through a node that no pattern knows. The pass always runs, and is no rewrite that a
user can choose.
"""

from __future__ import annotations

import torch
from torch import fx

from bnrestructure.graph.inplace import inplace_target
from bnrestructure.graph.order import readers_of
from bnrestructure.graph.provenance import Format, guarded_tensor, known_tensor, provenance, remember
from bnrestructure.graph.targets import is_custom_call
from bnrestructure.ops.formats import returned
from bnrestructure.passes.base import Pass, Rule
from bnrestructure.passes.restore_formats import formats_read

__all__ = ["SHARE_RETURNED", "hand_out", "note_handed_through"]


def note_handed_through(graph: fx.Graph) -> None:
    """What capture tells of a node, for the nodes of a graph of Dynamo's: what is handed through has one example. So has what is written to
    in place, and the graph must still say so.
    """
    for node in graph.nodes:
        example = guarded_tensor(node)
        plain = example is not None and inplace_target(node) is None and not is_custom_call(node)
        if plain and any(example is guarded_tensor(source) for source in node.all_input_nodes):
            remember(node, hands_through=True)


def read_on(node: fx.Node) -> fx.Node | None:
    """A tensor that has a gradient, is returned, and has other readers. The caller's own tensors are one for all as they are."""
    if node.op in ("placeholder", "get_attr", "output") or node.target is returned or provenance(node).changed_by is not None:
        return None
    readers = readers_of(node)
    if len(readers) < 2 or readers[-1].op != "output":
        return None
    dtype = getattr(known_tensor(node), "dtype", None)
    return node if isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex) else None


def handed_through(node: fx.Node) -> fx.Node | None:
    """A node whose result is returned, and in eager is the very tensor that the node reads."""
    known = provenance(node)
    through = known.hands_through and known.changed_by is None and node.target is not returned and len(node.all_input_nodes) == 1
    return node if through and any(user.op == "output" for user in node.users) else None


def return_source(node: fx.Node) -> None:
    """Return what the node reads."""
    output = readers_of(node)[-1]
    output.replace_input_with(node, node.all_input_nodes[0])
    if not node.users:
        node.graph.erase_node(node)


def share(node: fx.Node) -> None:
    """Let all readers read what is returned."""
    output = readers_of(node)[-1]
    made = hand_out(node, formats_read(output)[node], after=node)
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)


def hand_out(node: fx.Node, order: Format | None, *, after: fx.Node) -> fx.Node:
    """A node for what the caller gets, in this format."""
    with node.graph.inserting_after(after):
        made = node.graph.call_function(returned, (node,))
    made.meta = dict(node.meta)
    remember(made, formats=(order,))
    return made


SHARE_RETURNED = Pass("share-returned", (Rule(handed_through, return_source), Rule(read_on, share)))
