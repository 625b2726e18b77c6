"""How many channels a node's tensor has, where the graph alone tells."""

from __future__ import annotations

from torch import fx, nn

from bnrestructure import ops
from bnrestructure.graph.fused import produced_by
from bnrestructure.graph.layers import ConvLayer, conv_of
from bnrestructure.graph.operations import activation_of, concat_of, max_pool_of

__all__ = ["channels_of"]

_KEEP_CHANNELS = (
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.dropout._DropoutNd,
)


def channels_of(node: fx.Node, modules: dict[str, nn.Module]) -> int | None:
    """Channels of this node's tensor [N, C, *spatial], or None when they are not known before the model runs."""
    example = node.meta.get("example_value")
    if example is not None and hasattr(example, "shape") and len(example.shape) > 1:
        return int(example.shape[1]) if isinstance(example.shape[1], int) else None
    fused = produced_by(node, ops.conv, "y")
    if fused is not None and fused.kwargs["into"] is None and fused.kwargs["channels"] is None:
        layer = fused.meta.get("bnr_conv")
        return None if layer is None else layer.out_channels
    layer = conv_of(node, modules)
    if isinstance(layer, ConvLayer):
        return layer.out_channels
    segments = concat_of(node)
    if segments is not None:
        counts = [channels_of(s, modules) for s in segments]
        return None if any(c is None for c in counts) else sum(c for c in counts if c is not None)
    source: fx.Node | None = None
    for function, name in ((ops.normalise, "z"), (ops.max_pool, "z"), (ops.avg_pool, "z"), (ops.residual, "out")):
        made = produced_by(node, function, name)
        if made is not None:
            source = made.kwargs["y" if function is ops.residual else "x"]  # type: ignore[assignment]
    for threading in (ops.conv, ops.normalise, ops.max_pool, ops.avg_pool, ops.statistics, ops.squeeze):
        threaded = produced_by(node, threading, "x")
        if threaded is not None:
            source = threaded.kwargs["x"]  # type: ignore[assignment]
    if node.target is ops.own_gradient:
        source = node.args[0]  # type: ignore[assignment]
    act = activation_of(node, modules)
    pool = max_pool_of(node, modules)
    averages = node.op == "call_function" and node.target in (nn.functional.avg_pool2d, nn.functional.adaptive_avg_pool2d)
    if act is not None:
        source = act[1]
    elif pool is not None:
        source = pool["input"]
    elif averages or (node.op == "call_module" and isinstance(modules.get(str(node.target)), _KEEP_CHANNELS)):
        source = node.all_input_nodes[0]
    return None if source is None else channels_of(source, modules)
