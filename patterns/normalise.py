"""Where a normalise node can ride: conv-bn-act-conv, conv-bn-conv, conv-bn-act-depthwise, squeeze-excite."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from bnrestructure import ops
from bnrestructure.graph.fused import is_fused, normalised_tensors, produced_by, tensor_readers
from bnrestructure.graph.layers import ConvLayer, conv_of, modules_of
from bnrestructure.graph.operations import activation_of
from bnrestructure.patterns.pool import averages_of

__all__ = [
    "ConvReader",
    "Excitation",
    "find_activated",
    "find_conv_readers",
    "find_excitations",
    "is_convolution",
]


def find_activated(gm: fx.GraphModule) -> list[tuple[fx.Node, fx.Node, str]]:
    """(normalise, activation node, activation) where the activation is the normalised tensor's only reader."""
    modules = modules_of(gm)
    found = []
    for normalise, z in normalised_tensors(gm):
        readers = tensor_readers(z)
        act = activation_of(readers[0], modules) if len(readers) == 1 else None
        if act is not None and normalise.kwargs["act"] == "identity":
            found.append((normalise, readers[0], act[0]))
    return found


@dataclass(frozen=True)
class ConvReader:
    """A convolution that reads ``source`` after a transform: normalise and activation, or an activation alone."""

    conv: fx.Node
    layer: ConvLayer | None
    normalise: fx.Node | None
    activation: fx.Node | None
    act: str


def find_conv_readers(gm: fx.GraphModule) -> list[ConvReader]:
    """conv-bn-act-conv and kin: convolutions whose prologue can take over the normalise or bare activation that they read.

    A bare activation is taken only where convolutions are all that read it: otherwise its result is in memory anyway.
    """
    modules = modules_of(gm)
    found = []
    for node in gm.graph.nodes:
        layer = conv_of(node, modules)
        if isinstance(layer, ConvLayer):
            source = layer.input
        elif is_fused(node, ops.conv) and node.kwargs["mean"] is None and node.kwargs["act"] == "identity":
            layer, source = None, node.kwargs["x"]
        else:
            continue
        normalise = produced_by(source, ops.normalise, "z")
        if normalise is not None:
            found.append(ConvReader(node, layer, normalise, None, str(normalise.kwargs["act"])))
            continue
        act = activation_of(source, modules)
        if act is not None and all(is_convolution(u, modules) for u in source.users):
            found.append(ConvReader(node, layer, None, source, act[0]))
    return found


def is_convolution(node: fx.Node, modules: dict[str, torch.nn.Module]) -> bool:
    """Whether the node is a convolution that is fused, or could be."""
    return is_fused(node, ops.conv) or isinstance(conv_of(node, modules), ConvLayer)


@dataclass(frozen=True)
class Excitation:
    """squeeze-excite: z is averaged, gated by a function of the average, and read by convolutions only through the gate."""

    normalise: fx.Node
    z: fx.Node
    average: fx.Node
    product: fx.Node
    gate: fx.Node
    convs: list[tuple[fx.Node, ConvLayer | None]]


def find_excitations(gm: fx.GraphModule) -> list[Excitation]:
    """normalise -> {global average -> ... -> gate, multiply by gate} -> convolutions."""
    modules = modules_of(gm)
    found = []
    for normalise, z in normalised_tensors(gm):
        readers = tensor_readers(z)
        if len(readers) != 2:
            continue
        averages = [(r, averages_of(r, normalise, z, modules)) for r in readers]
        average = next((r for r, found_average in averages if found_average is not None and found_average.keepdim), None)
        product = next((r for r in readers if _product_with(r, z) is not None), None)
        if average is None or product is None:
            continue
        gate = _product_with(product, z)
        convs: list[tuple[fx.Node, ConvLayer | None]] = []
        for reader in tensor_readers(product):
            layer = conv_of(reader, modules)
            if isinstance(layer, ConvLayer):
                convs.append((reader, layer))
            elif is_fused(reader, ops.conv) and reader.kwargs["mean"] is None and reader.kwargs["x"] is product:
                convs.append((reader, None))
        if gate is not None and len(convs) == len(product.users) == 1 and _derives_from(gate, average):
            found.append(Excitation(normalise, z, average, product, gate, convs))
    return found


def _product_with(node: fx.Node, z: fx.Node) -> fx.Node | None:
    """The other factor when ``node`` multiplies z by a tensor."""
    is_product = node.target in (operator.mul, torch.mul) or (node.op == "call_method" and node.target == "mul")
    if not is_product or len(node.args) != 2 or "bnr_shared" in node.meta:
        return None
    a, b = node.args
    other = b if a is z else a if b is z else None
    return other if isinstance(other, fx.Node) and other is not z else None


#: Methods that leave a tensor's shape alone when everything else they take is a number.
_POINTWISE_METHODS = {"sigmoid", "relu", "tanh", "clamp", "mul", "add", "sub", "div"}


def _derives_from(gate: fx.Node, average: fx.Node) -> bool:
    """Whether the gate has the shape [N, C, 1, 1] for certain: a chain of pointwise operations and convolutions on the average."""
    current = gate
    for _ in range(12):
        if current is average:
            return True
        inputs = [n for n in current.all_input_nodes if n.op != "get_attr"]
        pointwise = current.op == "call_method" and current.target in _POINTWISE_METHODS
        known = pointwise or current.op in ("call_module", "call_function")
        if len(inputs) != 1 or not known:
            return False
        current = inputs[0]
    return False
