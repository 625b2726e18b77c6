"""The convolution nodes of benchmarks/gpu.py, timed: each implementation, its rivals, and what the memory and the multipliers allow."""

from __future__ import annotations

from typing import Any

import torch
from gpu_clock import clock_for, convolutions_chosen
from gpu_nodes import Node, draw, implementation, implementations
from torch import Tensor
from torch.nn import functional as F

from bnrestructure.core.activation import activate
from bnrestructure.kernels.choice import Node as ChoiceNode
from bnrestructure.kernels.cuda.rule import rule

__all__ = ["bounds", "time_node"]


def time_node(node: Node, ceilings: dict[str, float], batch: int = 256, device: str = "cuda") -> dict[str, Any]:
    """Milliseconds of each implementation forward and backward, of the unfused sequence with cuDNN, and of their roofline; bf16.

    ``forward_rule`` and ``backward_rule`` are what the rule of kernels/cuda/rule.py picks; check_node says whether they are right.
    ``not_captured``: the times that hold their launches from Python, and why.
    """
    clock = clock_for(device)
    a = draw(node, batch, torch.bfloat16, device)
    c, geometry = node.channels, node.geometry
    zeros, ones = torch.zeros(c, device=device), torch.ones(c, device=device)

    def unfused(x: Tensor, weight: Tensor) -> Tensor:
        z = F.batch_norm(x, None, None, ones, zeros, training=True)
        z = activate(z + a.r if node.joined else z, node.act)
        z = z if a.transform.gate is None else z * a.transform.gate.to(z.dtype).view(batch, c, 1, 1)
        return F.conv2d(z, weight, None, geometry.stride, geometry.padding, geometry.dilation, node.groups)

    found: dict[str, Any] = {"ok": True, **bounds(node, batch, ceilings)}

    def time(name: str, work: Any) -> None:
        found[name] = clock.milliseconds(name, work)

    for name in implementations(node):
        kernels = implementation(node, name)
        with convolutions_chosen():
            time(f"{name}_forward", lambda k=kernels: a.forward(k, node, torch.bfloat16))
            time(f"{name}_backward", lambda k=kernels: a.backward(k, node, torch.bfloat16, a.before))
    x, weight = a.x.detach().requires_grad_(), a.weight.detach().requires_grad_()
    with convolutions_chosen():
        with clock.stream():
            y = unfused(x, weight)
        time("unfused_forward", lambda: unfused(x, weight))
        time("unfused_backward", lambda: torch.autograd.grad(y, (x, weight), a.dy, retain_graph=True))
        time("cudnn_forward", lambda: F.conv2d(a.x, a.weight, None, *geometry))
    of = ChoiceNode(tuple(a.x.shape), tuple(a.weight.shape), geometry, torch.bfloat16, not node.joined, node.gated, node.joined)
    for way in ("forward", "backward"):
        found[f"{way}_rule"] = rule(of, way).implementation
        found[f"{way}_share"] = found[f"{way}_bound"] / found[f"fused_{way}"]
    return found | ({"not_captured": clock.not_captured} if clock.not_captured else {})


def bounds(node: Node, batch: int, ceilings: dict[str, float]) -> dict[str, float]:
    """Milliseconds that no implementation can beat, at these bytes and operations a second, in bf16.

    ``backward_two_pass_bound`` is for one that reads everything twice, for dgrad and for wgrad, as ours do.
    """
    x = 2 * batch * node.channels * node.size**2
    y = 2 * batch * node.out * node.out_size**2
    flops = y * node.channels // node.groups * node.kernel**2  # two for each value of y, as there are bytes
    # Forward reads x and writes y. Backward reads P, y and x, and reads and writes dx. A join's forward reads r and writes the sum, too,
    # and its backward reads both of its operands.
    forward = (3 if node.joined else 1) * x + y
    backward = 2 * y + (4 if node.joined else 3) * x
    two_passes = 2 * (2 * y + x) + (3 if node.joined else 2) * x

    def milliseconds(moved: int, operations: int) -> float:
        return max(moved / ceilings["bytes"], operations / ceilings["flops"]) * 1e3

    return {
        "forward_bound": milliseconds(forward, flops),
        "backward_bound": milliseconds(backward, 2 * flops),
        "backward_two_pass_bound": milliseconds(two_passes, 2 * flops),
    }
