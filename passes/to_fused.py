"""Turning a plain convolution call into the fused node with nothing riding on it yet."""

from __future__ import annotations

from bnrestructure.graph.ir import Conv
from bnrestructure.graph.layers import ConvLayer, reference
from bnrestructure.graph.provenance import carry

__all__ = ["to_fused"]


def to_fused(conv: Conv | ConvLayer) -> Conv:
    """An equal fused node in the place of a plain convolution, whose readers read its y; a fused one as it is."""
    if isinstance(conv, Conv):
        return conv
    node = conv.node
    fused = Conv.create(
        before=node, x=conv.input, weight=reference(conv.weight, before=node), bias=reference(conv.bias, before=node),
        stride=conv.stride, padding=conv.padding, dilation=conv.dilation, groups=conv.groups,
    )  # fmt: skip
    y = fused.out("y")
    for new in (fused.node, y):
        carry(new, node)
    node.replace_all_uses_with(y)
    node.graph.erase_node(node)
    return fused
