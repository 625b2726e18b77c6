"""fuse-normalise: normalise + activation + CONV -> the convolution's prologue; likewise into pools and squeeze-excite gates.

``conv(act(normalise(y)))`` -> ``conv(y, mean, scale, beta, act)``: the normalised tensor never reaches memory.

First each normalise takes the activation behind it, a split of a normalised tensor becomes the normalises of its parts, and a concat of
normalised tensors the normalise of a concat. Then every reader that can apply the normalise itself does: convolutions, pools, global
averages, what is behind a squeeze-excite's gate. On a graph without fission it is the paper's RCF: bare activations move into the
convolutions that read them.
"""

from __future__ import annotations

from torch import fx

from bnrestructure.graph.activations import Activation
from bnrestructure.graph.ir import AvgPool, Conv, MaxPool, Normalise, Squeeze
from bnrestructure.graph.layers import ConvLayer
from bnrestructure.graph.operations import AveragePooling, GlobalAverage, MaxPooling, Pooling
from bnrestructure.graph.provenance import carry, take_halves
from bnrestructure.graph.view import Fused
from bnrestructure.passes.base import Pass, Rule, erase_dead
from bnrestructure.passes.normalise_after_concat import normalise_after_concat
from bnrestructure.passes.normalise_after_split import normalise_after_split
from bnrestructure.passes.to_fused import to_fused
from bnrestructure.patterns.base import Found
from bnrestructure.patterns.excitation import Excitation, excitation
from bnrestructure.patterns.normalised_concat import normalised_concat
from bnrestructure.patterns.normalised_split import normalised_split
from bnrestructure.patterns.pairs import ACTIVATION_CONV, NORMALISE_ACTIVATION, NORMALISE_CONV, NORMALISE_POOL

__all__ = ["FUSE_NORMALISE"]


def activate(match: Found[Normalise, Activation]) -> None:
    """Let the normalise apply the activation."""
    match.maker.update(act=match.reader.name)
    _replace(match.reader.node, match.reader.input)


def into_conv(match: Found[Normalise, Conv | ConvLayer]) -> None:
    """Let the convolution normalise what it reads."""
    normalise, conv = match.maker, to_fused(match.reader)
    conv.update(**normalise.edge)
    _take_over(conv.node, normalise)


def activation_into_conv(match: Found[Activation, Conv | ConvLayer]) -> None:
    """Let the convolution activate what it reads."""
    to_fused(match.reader).update(x=match.maker.input, act=match.maker.name)
    erase_dead(match.maker.node)


def into_pool(found: Found[Normalise, Pooling]) -> None:
    """Let the pool normalise what it reads."""
    normalise, pooling = found.maker, found.reader
    match pooling:
        case GlobalAverage():
            fused: Fused = Squeeze.create(before=pooling.node, **normalise.edge)
            result = _pooled(fused, pooling)
        case MaxPooling(kernel=kernel, stride=stride, padding=padding, ceil_mode=ceil):
            edge = normalise.edge
            fused = MaxPool.create(before=pooling.node, **edge, kernel=kernel, stride=stride, padding=padding, ceil_mode=ceil)
            result = fused.out("z")
        case AveragePooling(kernel=kernel, stride=stride, padding=padding):
            fused = AvgPool.create(before=pooling.node, **normalise.edge, kernel=kernel, stride=stride, padding=padding)
            result = fused.out("z")
    carry(fused.node, pooling.node)
    _replace(pooling.node, result)
    _take_over(fused.node, normalise)


def excite(match: Excitation) -> None:
    """Let the convolution normalise and gate what it reads, or a sweep do both; the squeeze hands it what is to be gated."""
    normalise, average, product = match.normalise, match.average.node, match.product
    squeeze = Squeeze.create(before=average, **normalise.edge, excite=True)
    carry(squeeze.node, average)
    _replace(average, _pooled(squeeze, match.average))
    edge = normalise.edge | {"x": squeeze.out("deferred"), "gate": match.gate}
    if match.conv is None:
        reader: Fused = Normalise.create(before=product, **edge)
        carry(reader.node, product)
        product.replace_all_uses_with(reader.out("z"))
    else:
        reader = to_fused(match.conv)
        reader.update(**edge)
    erase_dead(*(node for node in (match.expanded, product) if node is not None))
    _take_over(reader.node, normalise)


def _pooled(squeeze: Fused, average: GlobalAverage) -> fx.Node:
    """A squeeze's average in the shape of this one: [N, C], or [N, C, 1, 1]."""
    pooled, graph = squeeze.out("pooled"), average.node.graph
    if not average.keepdim:
        return pooled
    with graph.inserting_before(average.node):
        return graph.call_method("unflatten", (pooled, 1, (-1, 1, 1)))


def _replace(old: fx.Node, new: fx.Node) -> None:
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def _take_over(new: fx.Node, normalise: Normalise) -> None:
    """``new`` now does for one reader what the normalise did, which goes when nobody reads it any more."""
    take_halves(new, normalise.node)
    normalise.erase_if_unread()


FUSE_NORMALISE = Pass(
    "fuse-normalise",
    (
        Rule(NORMALISE_ACTIVATION, activate),
        Rule(normalised_split, normalise_after_split),
        Rule(normalised_concat, normalise_after_concat),
        Rule(excitation, excite, at=Normalise),
        Rule(NORMALISE_CONV, into_conv),
        Rule(ACTIVATION_CONV, activation_into_conv),
        Rule(NORMALISE_POOL, into_pool),
    ),
)
