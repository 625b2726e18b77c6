"""conv-bn-act-squeeze-excite: a normalised tensor that is averaged, and read only through a gate made of the average."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from bnrestructure.graph.ir import Conv, Normalise
from bnrestructure.graph.layers import ConvLayer
from bnrestructure.graph.operations import GlobalAverage, pooling_of, product_of
from bnrestructure.graph.order import readers_of
from bnrestructure.graph.provenance import known_tensor, provenance
from bnrestructure.patterns.pairs import bare_conv, is_average_of

__all__ = ["Excitation", "excitation"]


@dataclass(frozen=True)
class Excitation:
    """normalise -> {global average -> ... -> gate, product with the gate}, and the convolution that reads the product if one does alone.

    ``expanded`` is the gate expanded to the shape of what it multiplies, where the product is spelt so.
    """

    normalise: Normalise
    average: GlobalAverage
    product: fx.Node
    gate: fx.Node
    expanded: fx.Node | None
    conv: Conv | ConvLayer | None


def excitation(node: fx.Node) -> Excitation | None:
    """The squeeze-excite behind a normalise node."""
    normalise = Normalise.of(node)
    z = normalise.outs().get("z") if normalise is not None and normalise.is_plain else None
    if normalise is None or z is None:
        return None
    readers = readers_of(z)
    averages = [pooling for reader in readers if isinstance(pooling := pooling_of(reader), GlobalAverage)]
    average = next((a for a in averages if a.input is z and is_average_of(normalise, a)), None)
    products = [(reader, factor) for reader in readers if (factor := _factor_of(reader, z)) is not None]
    if average is None or not products or not average.node < products[0][0]:
        return None
    product, factor = products[0]
    expands = _expanded_like(factor, z)
    gate, expanded = (factor, None) if expands is None else (expands, factor)
    if not _is_by_channel(gate, product, average.node):
        return None
    if set(readers) != {average.node, product} | ({expanded} if expanded is not None else set()):
        return None
    conv = bare_conv(next(iter(product.users))) if len(product.users) == 1 else None
    conv = conv if conv is not None and conv.input is product else None
    return Excitation(normalise, average, product, gate, expanded, conv)


def _factor_of(node: fx.Node, z: fx.Node) -> fx.Node | None:
    """The other factor when ``node`` multiplies z by a tensor."""
    operands = product_of(node)
    return None if operands is None or z not in operands else operands[operands[0] is z]


def _is_by_channel(gate: fx.Node, product: fx.Node, average: fx.Node) -> bool:
    """Whether the gate is one number for each channel of each image that leaves the dtype as it is, as far as capture knows. Where another
    call is another case, ops/gate.py multiplies as PyTorch does.
    """
    factor, made, averaged = (known_tensor(node) for node in (gate, product, average))
    if factor is None or made is None or averaged is None:
        return True
    by_channel = tuple(factor.shape) == (*made.shape[:2], *[1] * (len(made.shape) - 2))
    return by_channel and made.dtype == averaged.dtype


def _expanded_like(factor: fx.Node, z: fx.Node) -> fx.Node | None:
    """What ``factor`` expands to z's shape, for the product with z alone."""
    is_expanded = factor.op == "call_method" and factor.target == "expand_as" and len(factor.args) == 2
    if not is_expanded or factor.args[1] is not z or len(factor.users) != 1 or provenance(factor).changed_by is not None:
        return None
    gate = factor.args[0]
    return gate if isinstance(gate, fx.Node) and gate is not z else None
