"""conv-bn-act-pool: pools whose windows can normalise and activate what they read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from bnrestructure import ops
from bnrestructure.core.activation import is_homogeneous
from bnrestructure.graph.fused import normalised_tensors, produced_by, tensor_readers
from bnrestructure.graph.layers import ConvLayer, conv_of, modules_of
from bnrestructure.graph.operations import GlobalAverage, avg_pool_of, concat_of, global_average_of, max_pool_of

__all__ = ["PoolReader", "averages_of", "find_pool_readers", "pool_reader"]


@dataclass(frozen=True)
class PoolReader:
    """A pool that can apply the normalise that it reads.

    ``kind`` is "max", "average" or "global average". The first two have a ``window``, as graph/operations.py describes it; the last says
    whether it keeps its dimensions.
    """

    normalise: fx.Node
    pool: fx.Node
    kind: str
    window: dict[str, Any]
    keepdim: bool = True


def find_pool_readers(gm: fx.GraphModule) -> list[PoolReader]:
    """Every pool that reads a normalised tensor and can normalise it itself."""
    modules = modules_of(gm)
    pairs = [(normalise, z, reader) for normalise, z in normalised_tensors(gm) for reader in tensor_readers(z)]
    return [found for normalise, z, node in pairs if (found := pool_reader(node, normalise, z, modules)) is not None]


def pool_reader(node: fx.Node, normalise: fx.Node, z: fx.Node, modules: dict[str, nn.Module]) -> PoolReader | None:
    """What ``node`` is, if it pools z, the result of ``normalise``, and can do without z in memory."""
    window = max_pool_of(node, modules)
    if window is not None and window["input"] is z:
        if _is_4d(normalise, modules) is False:
            return None
        return PoolReader(normalise, node, "max", window)
    window = avg_pool_of(node, modules)
    if window is not None and window["input"] is z:
        divisible = is_homogeneous(str(normalise.kwargs["act"])) and _is_4d(normalise, modules) is True
        return PoolReader(normalise, node, "average", window) if divisible else None
    average = averages_of(node, normalise, z, modules)
    if average is not None and len(z.users) == 1:
        return PoolReader(normalise, node, "global average", {}, average.keepdim)
    return None


def averages_of(reader: fx.Node, normalise: fx.Node, z: fx.Node, modules: dict[str, nn.Module]) -> GlobalAverage | None:
    """The global average of z that ``reader`` is, if it is one for as many dimensions as z has."""
    average = global_average_of(reader, modules)
    if average is None or average.input is not z:
        return None
    is_4d = _is_4d(normalise, modules)
    return average if is_4d or (is_4d is None and not average.only_4d) else None


def _is_4d(normalise: fx.Node, modules: dict[str, nn.Module]) -> bool | None:
    """Whether a normalise is of [N, C, H, W], by the class of its batch norm or the convolutions that made its input; None: nobody knows.

    A 2-D pool takes [N, C, L] for one image of N channels.
    """
    finalize = produced_by(normalise.kwargs["scale"], ops.finalize, "scale")
    dimensions: Any = () if finalize is None else finalize.kwargs.get("dimensions", ())
    if dimensions:
        return dimensions == (4,)
    source: fx.Node = normalise.kwargs["x"]  # type: ignore[assignment]
    sizes = {_convolution_dimensions(segment, modules) for segment in concat_of(source) or [source]} - {None}
    return 2 in sizes if sizes else None


def _convolution_dimensions(tensor: fx.Node, modules: dict[str, nn.Module]) -> int | None:
    """The number of spatial dimensions of the convolution that made the tensor; None where none did."""
    layer = conv_of(tensor, modules)
    if isinstance(layer, ConvLayer):
        return len(layer.stride)
    fused = produced_by(tensor, ops.conv, "y")
    return None if fused is None else len(tuple(fused.kwargs["stride"]))  # type: ignore[arg-type]
