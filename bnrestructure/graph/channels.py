"""How many channels a node's tensor has, where the graph alone tells."""

from __future__ import annotations

from torch import fx, nn
from torch.nn import functional as F

from bnrestructure.graph.activations import activation_of
from bnrestructure.graph.ir import Conv, Link, OwnGradient, Reader, Residual, maker_of
from bnrestructure.graph.layers import ConvLayer, conv_of, input_of, module_of, shape_of
from bnrestructure.graph.operations import concat_of, pooling_of
from bnrestructure.graph.provenance import guarded_tensor

__all__ = ["channels_of"]

_KEEP_CHANNELS = (
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.dropout._DropoutNd,
)


def channels_of(node: fx.Node) -> int | None:
    """Channels of this node's tensor [N, C, *spatial], or None when they are not known before the model runs."""
    known = guarded_tensor(node)
    if known is not None and hasattr(known, "shape") and len(known.shape) > 1:
        return int(known.shape[1]) if isinstance(known.shape[1], int) else None
    conv = Conv.making(node, "y")
    if conv is not None:
        shape = None if conv.in_buffer else shape_of(conv.weight)
        return None if shape is None else shape[0]
    layer = conv_of(node)
    if isinstance(layer, ConvLayer):
        return layer.out_channels
    segments = concat_of(node)
    if segments is not None:
        counts = [channels_of(segment) for segment in segments]
        return None if None in counts else sum(count for count in counts if count is not None)
    source = _source_of(node)
    return None if source is None else channels_of(source)


def _source_of(node: fx.Node) -> fx.Node | None:
    """The tensor of which this node's has the channels, because the node changes none."""
    fused, output = maker_of(node)
    if isinstance(fused, Residual):
        return fused.y if output == "out" else None
    if isinstance(fused, Link | Reader | OwnGradient):
        return fused.x if output in ("z", "passed", "deferred", None) else None
    described = activation_of(node) or pooling_of(node)
    if described is not None:
        return described.input
    averages = node.op == "call_function" and node.target in (F.avg_pool2d, F.adaptive_avg_pool2d)
    return input_of(node) if averages or isinstance(module_of(node), _KEEP_CHANNELS) else None
