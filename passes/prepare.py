"""The front door between capture and the passes: a captured graph is made plain, and its batch norms get names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torch import fx

from bnrestructure.graph.activations import activation_of
from bnrestructure.graph.inplace import functionalise
from bnrestructure.graph.layers import BatchNormLayer, ConvLayer, conv_of
from bnrestructure.graph.operations import concat_of, handed_through, zero_added_to
from bnrestructure.graph.provenance import known_tensor, module_path, remember
from bnrestructure.passes.base import Pass, Rule
from bnrestructure.passes.name_activations import NAME_ACTIVATIONS
from bnrestructure.passes.restore_formats import note_formats
from bnrestructure.passes.share_returned import SHARE_RETURNED, note_handed_through
from bnrestructure.passes.use_reshape import USE_RESHAPE
from bnrestructure.patterns.batch_norm import batch_norm

__all__ = ["prepare"]


def prepare(gm: fx.GraphModule, path_of: Callable[[fx.Node], str] = module_path) -> None:
    """Make a captured graph ready for patterns: no identities, no sum that begins with 0, no operation in place that can be avoided, no
    view that must be one, no activation that is written out.

    Each batch norm call becomes a site with a name of its own: ``path_of`` it, with #2, #3 ... for further calls of a shared module. The
    module's forward stays as it was until ``gm.recompile()``.
    """
    note_formats(gm.graph)
    note_handed_through(gm.graph)
    note_unlike(gm.graph)
    DROP_IDENTITIES.rewrite(gm)
    functionalise(gm.graph)
    DROP_ZEROS.rewrite(gm)
    NAME_ACTIVATIONS.rewrite(gm)
    READ_SIZES_BEFORE.rewrite(gm)
    USE_RESHAPE.rewrite(gm)
    SHARE_RETURNED.rewrite(gm)
    calls: Counter[str] = Counter()
    for node in gm.graph.nodes:
        if batch_norm(node) is not None:
            path = path_of(node)
            calls[path] += 1
            remember(node, site=path if calls[path] == 1 else f"{path}#{calls[path]}")


def note_unlike(graph: fx.Graph) -> None:
    """What is known of the segments of concats: passes will not know it of the nodes that they put in the segments' places."""
    for node in graph.nodes:
        whole, segments = known_tensor(node), concat_of(node) or []
        known = [tensor for tensor in map(known_tensor, segments) if tensor is not None]
        if whole is not None and any(t.dtype != whole.dtype or len(t.shape) != len(whole.shape) or t.shape[1] == 0 for t in known):
            remember(node, unlike=True)


def identity(node: fx.Node) -> fx.Node | None:
    """A call that returns its input as it is."""
    return node if handed_through(node) is not None else None


def zero_sum(node: fx.Node) -> fx.Node | None:
    """The number 0 added to a batch norm's or a convolution's result that nothing else reads: nobody can tell the sum from it."""
    x = zero_added_to(node)
    if x is None or len(x.users) != 1:
        return None
    return node if batch_norm(x) is not None or isinstance(conv_of(x), ConvLayer) else None


#: Methods that read a tensor's size alone, and those that read its dtype and device alone.
_OF_SIZE, _OF_KIND = ("size", "dim", "numel"), ("new_empty", "new_ones", "new_zeros", "new_full")


def size_of_normalised(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(what reads the size of a batch norm's result, or of its activation's, or makes a new tensor of its kind, the batch norm's input,
    which has the same): no tensor has to be in memory for that alone.
    """
    tensor = node.args[0] if node.op == "call_method" and node.target in _OF_SIZE + _OF_KIND and node.args else None
    if not isinstance(tensor, fx.Node):
        return None
    activation = activation_of(tensor)
    layer = batch_norm(tensor if activation is None else activation.input)
    if not isinstance(layer, BatchNormLayer):
        return None
    kinds = [None if known is None else known.dtype for known in map(known_tensor, (tensor, layer.input))]
    return (node, layer.input) if node.target in _OF_SIZE or (kinds[0] is not None and kinds[0] == kinds[1]) else None


def read_before(match: tuple[fx.Node, fx.Node]) -> None:
    """Read it of the batch norm's input."""
    reader, source = match
    reader.args = (source, *reader.args[1:])


def drop(node: fx.Node) -> None:
    """Let its readers read its input."""
    (source,) = node.all_input_nodes
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)


DROP_IDENTITIES = Pass("drop-identities", (Rule(identity, drop),))
DROP_ZEROS = Pass("drop-zeros", (Rule(zero_sum, drop),))
READ_SIZES_BEFORE = Pass("read-sizes-before", (Rule(size_of_normalised, read_before),))
