"""Turning a plain convolution call into the fused node with nothing riding on it yet."""

from __future__ import annotations

from torch import fx

from bnrestructure import ops
from bnrestructure.graph.fused import output
from bnrestructure.graph.layers import ConvLayer, module_path, reference

__all__ = ["to_fused_conv"]


def to_fused_conv(graph: fx.Graph, node: fx.Node, layer: ConvLayer) -> fx.Node:
    """Replace the plain convolution ``node`` by an equal fused node; its readers read the fused node's y."""
    weight = reference(graph, layer.weight, node)
    bias = reference(graph, layer.bias, node)
    source = node.args[0] if node.args else node.kwargs["input"]  # layer.input may have been replaced since it was matched
    with graph.inserting_before(node):
        fused = graph.call_function(
            ops.conv,
            (),
            {
                "x": source, "mean": None, "scale": None, "beta": None, "weight": weight, "bias": bias, "act": "identity",
                "gate": None, "stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation,
                "groups": layer.groups, "statistics": False, "thread": False, "gain": False, "into": None, "offset": 0,
                "channels": None, "visible": None,
            },
        )  # fmt: skip
    fused.meta["bnr_module"] = module_path(node)
    fused.meta["bnr_conv"] = layer
    fused.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
    if "example_value" in node.meta:
        fused.meta["example_value"] = node.meta["example_value"]
    y = output(fused, "y")
    y.meta["bnr_module"] = module_path(node)
    node.replace_all_uses_with(y)
    graph.erase_node(node)
    return fused
