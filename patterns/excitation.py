"""conv-bn-act-squeeze-excite: a normalised tensor that is averaged, and read only through a gate made of the average."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from bnrestructure.graph.ir import Conv, Normalise
from bnrestructure.graph.layers import ConvLayer
from bnrestructure.graph.operations import GlobalAverage, pooling_of
from bnrestructure.graph.order import readers_of
from bnrestructure.graph.provenance import provenance
from bnrestructure.patterns.pairs import bare_conv, is_average_of

__all__ = ["Excitation", "excitation"]

#: Methods that leave a tensor's shape alone when everything else they take is a number.
_POINTWISE_METHODS = {"sigmoid", "relu", "tanh", "clamp", "mul", "add", "sub", "div"}
_LONGEST_GATE = 12


@dataclass(frozen=True)
class Excitation:
    """normalise -> {global average -> ... -> gate, product with the gate} -> a convolution."""

    normalise: Normalise
    average: GlobalAverage
    product: fx.Node
    gate: fx.Node
    conv: Conv | ConvLayer


def excitation(node: fx.Node) -> Excitation | None:
    """The squeeze-excite behind a normalise node."""
    normalise = Normalise.of(node)
    z = None if normalise is None else normalise.outs().get("z")
    if normalise is None or z is None or len(z.users) != 2:
        return None
    readers = readers_of(z)
    averages = [pooling for reader in readers if isinstance(pooling := pooling_of(reader), GlobalAverage)]
    average = next((a for a in averages if a.input is z and a.keepdim and is_average_of(normalise, a)), None)
    product = next((reader for reader in readers if _product_with(reader, z) is not None), None)
    if average is None or product is None or len(product.users) != 1:
        return None
    gate = _product_with(product, z)
    conv = bare_conv(next(iter(product.users)))
    if gate is None or conv is None or conv.input is not product or not _derives_from(gate, average.node):
        return None
    return Excitation(normalise, average, product, gate, conv)


def _product_with(node: fx.Node, z: fx.Node) -> fx.Node | None:
    """The other factor when ``node`` multiplies z by a tensor."""
    is_product = node.target in (operator.mul, torch.mul) or (node.op == "call_method" and node.target == "mul")
    if not is_product or len(node.args) != 2 or provenance(node).changed_by is not None:
        return None
    a, b = node.args
    other = b if a is z else a if b is z else None
    return other if isinstance(other, fx.Node) and other is not z else None


def _derives_from(gate: fx.Node, average: fx.Node) -> bool:
    """Whether the gate has the shape [N, C, 1, 1] for certain: a chain of pointwise operations and convolutions on the average."""
    current = gate
    for _ in range(_LONGEST_GATE):
        if current is average:
            return True
        inputs = [n for n in current.all_input_nodes if n.op != "get_attr"]
        pointwise = current.op == "call_method" and current.target in _POINTWISE_METHODS
        known = pointwise or current.op in ("call_module", "call_function")
        if len(inputs) != 1 or not known:
            return False
        current = inputs[0]
    return False
