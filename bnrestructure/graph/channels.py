"""How many channels a node's tensor has, where the graph alone tells."""

from __future__ import annotations

from torch import fx, nn

from bnrestructure.graph import activations
from bnrestructure.graph.ir import Conv, Link, OwnGradient, Reader, Residual, maker_of, output_of
from bnrestructure.graph.layers import ConvLayer, conv_of, input_of, module_of, shape_of
from bnrestructure.graph.operations import concat_of, pooling_of
from bnrestructure.graph.provenance import guarded_tensor, known_tensor
from bnrestructure.graph.splits import part_of
from bnrestructure.graph.targets import called_name, is_custom_call

__all__ = ["channels_of"]

_KEEP_CHANNELS = (
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.dropout._DropoutNd,
    nn.Upsample,
    *activations.LAYERS,
)
#: Functions and methods of PyTorch's, by name, whose result has the channels of their first argument.
_KEEPING = activations.NAMES | {
    "clamp", "interpolate", "avg_pool2d", "adaptive_avg_pool2d", "max_pool2d", "dropout", "dropout2d", "contiguous", "clone", "detach",
    "to", "float", "double", "half", "bfloat16",
}  # fmt: skip
#: Those of two tensors of one shape, or of a tensor and a number.
_ELEMENTWISE = {"add", "sub", "mul", "div", "truediv", "maximum", "minimum"}


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
    name = None if is_custom_call(node) else called_name(node)
    if name in _ELEMENTWISE:
        return _of_both(node)
    if name == "getitem" and output_of(node) is None:
        return _of_part(node)
    source = input_of(node) if name in _KEEPING else _source_of(node)
    return None if source is None else channels_of(source)


def _of_both(node: fx.Node) -> int | None:
    """Channels of what is computed from several tensors, of which all have as many, and as many dimensions as far as that is known."""
    counts = {channels_of(source) for source in node.all_input_nodes}
    dimensions = {len(known.shape) for source in node.all_input_nodes if (known := known_tensor(source)) is not None}
    return counts.pop() if len(counts) == 1 and len(dimensions) <= 1 else None


def _of_part(node: fx.Node) -> int | None:
    """Channels of one of the parts that a tensor is split into."""
    part = part_of(node)
    if part is None or part[0].dim != 1:
        return None
    split, index = part
    whole = channels_of(split.input)
    sizes = None if whole is None else split.sizes(whole)
    return sizes[index] if sizes is not None and -len(sizes) <= index < len(sizes) else None


def _source_of(node: fx.Node) -> fx.Node | None:
    """The tensor of which this node's has the channels, because the node changes none."""
    fused, output = maker_of(node)
    if isinstance(fused, Residual):
        return fused.y if output == "out" else None
    if isinstance(fused, Link | Reader | OwnGradient):
        return fused.x if output in ("z", "passed", "deferred", None) else None
    pooled = pooling_of(node)
    if pooled is not None:
        return pooled.input
    return input_of(node) if isinstance(module_of(node), _KEEP_CHANNELS) else None
