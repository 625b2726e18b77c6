"""Which implementation of a convolution node should be the faster one on a GPU, and why. Needs neither a GPU nor Triton.

    fused        prologue, product and epilogue in one Triton kernel (``depthwise``: in the depthwise kernels)
    hybrid       cuDNN's convolution between Triton sweeps
    reference    plain PyTorch

Where the node was measured on this GPU (bnrestructure.tune) the measurement decides; elsewhere the rule below does. It
weighs what the sweeps of the hybrid cost against what the fused kernel's prologue costs, which transforms each element
once for every tap and every tile that reads it: 3x3 convolutions pay it nine times, 1x1 ones once or twice.

The rule knows two things. How many cycles a multiprocessor needs to issue the instructions of a step, and those before and behind
the steps, counted in the compiler's output for sm_90 (compile_ahead.py; tests/cuda/test_compiled.py holds most of the numbers here
against it, those of the variants that ``make test`` compiles). And that an H100 does about 800 TFLOP/s in bf16 and moves 3.0 TB/s.
**None of it was timed as a whole on a GPU**: tune() is how to know.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnrestructure.kernels import tuning
from bnrestructure.kernels.calls import ConvBackward, ConvForward
from bnrestructure.kernels.choice import BACKWARD as DENSE_BACKWARD
from bnrestructure.kernels.choice import Choice, Node
from bnrestructure.kernels.cuda.device import event_timer, gpu_here, gpu_of, graph_of, identify_machine, uses_tf32

__all__ = ["BACKWARD", "ISSUED", "ISSUED_BY_WGRAD", "CudaRule", "forms_sum", "rule", "step_cycles"]

#: Backward candidates: the implementations of the input gradient and of the weight gradient.
BACKWARD = {**DENSE_BACKWARD, "depthwise": ("depthwise", "depthwise"), "reference": ("reference", "reference")}

#: Bytes that memory moves in one cycle of a multiprocessor's tensor cores (4096 operations) with all of them at work.
_BYTES_PER_CYCLE = 4096 * 3.0 / 800
_TILE, _STEP = 128, 64
_TENSOR_CORES = 512.0


class Issued(NamedTuple):
    """Cycles that a multiprocessor takes to issue a step 64 deep of 128 pixels by 32, 64 or 128 channels, and what is before and behind the
    steps of 128 pixels by 128 channels: addresses, the sums over the pixels, what is stored."""

    narrow: float
    half: float
    full: float
    fixed: float


#: By what is done to the pixels: nothing, the prologue, that of a padded convolution, the sum of a join, the gradient at the output;
#: where a step runs through several taps every number has an address of its own.
ISSUED = {
    "product": Issued(92, 92, 260, 1600),
    "gathered": Issued(1460, 1460, 2920, 4430),
    "prologue": Issued(385, 385, 648, 1690),
    "masked prologue": Issued(708, 712, 1076, 2154),
    "join": Issued(812, 812, 1152, 2152),
    "dgrad": Issued(724, 724, 790, 2734),
    "masked dgrad": Issued(1190, 1190, 1206, 3670),
    "join dgrad": Issued(732, 732, 1464, 4396),
}
#: A weight gradient's step, 64 pixels deep, of 128 outputs by 128 inputs: for its outputs and for its inputs.
ISSUED_BY_WGRAD = {
    "wgrad": (608, 572),
    "wgrad of both": (608, 784),
    "masked wgrad": (680, 564),
    "masked wgrad of both": (680, 918),
}
#: Numbers of channels that forbid vector loads multiply them (counted in the variant "1x1 odd channels bf16" of compile_ahead.py).
_SCALAR = {"dgrad": 4.4, "wgrad": 3.9}
_SCALAR_FORWARD = 2.4
#: The hybrid must promise this share of the fused kernel's time: it needs temporaries, and the promise is rough.
_MARGIN = 0.9

#: The widest depthwise kernel, and the longest stride, whose sums and addresses leave the depthwise kernels without spilled registers.
_MOST_COLUMNS = 15


class CudaRule:
    """See :class:`bnrestructure.kernels.choice.Rule`."""

    prefix = "cuda conv"
    state: Callable[[], Hashable] = staticmethod(uses_tf32)

    def machine(self, dtype: torch.dtype) -> str:
        """How fp32 products are formed; the GPU is told to :meth:`identify`."""
        return "tf32" if dtype is torch.float32 and uses_tf32() else "exact products"

    def unsupported(self, call: ConvForward | ConvBackward) -> None:
        """Nothing: CudaKernels has asked limits.py."""

    def candidates(self, node: Node, direction: str) -> list[str]:
        """What can run the node in ``direction``, the one that needs no memory of its own first. The hybrid has no gate."""
        return _candidates(node, direction)

    def choose(self, node: Node, direction: str) -> Choice:
        """:func:`rule`."""
        return rule(node, direction)

    def identify(self, device: torch.device) -> None:
        """The device's GPU, or the current one."""
        identify_machine(gpu_of(device) or gpu_here() or "no GPU")

    def timer(self, x: Tensor) -> Callable[[Callable[[], Any]], float]:
        """The GPU's clock; the host's where kernels are interpreted."""
        return event_timer(x.device) if x.is_cuda else tuning.wall_clock

    def prepared(self, run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        """A replay of the run's CUDA graph; the run itself where kernels are interpreted."""
        return graph_of(run, device) if device.type == "cuda" else run


def forms_sum(node: Node) -> bool:
    """Whether the fused forward kernel can form a residual join's sum: each pixel must be read by one row of tiles alone."""
    return node.geometry.is_pointwise(node.weight) and node.geometry.groups == 1


def _candidates(node: Node, direction: str) -> list[str]:
    own = "depthwise" if node.geometry.is_depthwise(node.weight) else "fused"
    if own == "depthwise" and _is_too_wide(node):
        return ["reference"] if node.gated else ["hybrid", "reference"]
    if node.gated:
        return [own, "reference"]
    if direction == "forward" or own == "depthwise":
        return [own, "hybrid", "reference"]
    return [*DENSE_BACKWARD, "reference"]


def _is_too_wide(node: Node) -> bool:
    """Whether the depthwise kernels leave this one alone."""
    return max(node.weight[3], node.geometry.stride[1]) > _MOST_COLUMNS


def rule(node: Node, direction: str) -> Choice:
    """The choice for "forward" or "backward" where nothing was measured."""
    if node.geometry.is_depthwise(node.weight):
        if _is_too_wide(node):
            first = _candidates(node, direction)[0]
            return Choice(first, "by rule: what so wide a kernel, or so long a stride, keeps would not fit the registers")
        return Choice("depthwise", "by rule: depthwise convolutions have kernels of their own")
    if node.gated:
        return Choice("fused", "by rule: only the fused kernel has a gate")
    if node.geometry.groups > 1:
        return Choice("fused", "by rule: nothing is known that is faster with groups")
    if node.dtype is torch.float32 and not _uses_tf32(node):
        return Choice("fused", "by rule: nothing is known of fp32 products without TF32")
    costs = _forward_costs(node) if direction == "forward" else _backward_costs(node)
    best = min(costs, key=lambda name: costs[name])
    share = costs[best] / costs["fused"]
    if share >= _MARGIN:
        return Choice("fused", "by rule: sweeps around cuDNN's product would cost more than they save, or as much")
    return Choice(best, f"by rule: should take {share:.2f} of the fused kernels' time (estimated, not timed)")


def _uses_tf32(node: Node) -> bool:
    return node.dtype is torch.float32 and node.machine == "tf32"


# --- the rule: times in bytes that memory could have moved meanwhile ----------------------------------------------------


def _sizes(node: Node) -> tuple[int, int, float]:
    """Bytes of x, bytes of y, and the product on tensor cores alone."""
    (n, c, h, w), (out, _, kh, kw), (oh, ow) = node.x, node.weight, node.size_out
    item = node.dtype.itemsize
    operations = 2 * n * oh * ow * out * c * kh * kw
    return n * c * h * w * item, n * oh * ow * out * item, operations / 4096 * _BYTES_PER_CYCLE * (2 if _uses_tf32(node) else 1)


def step_cycles(kind: str, rows: int, columns: int, depth: int) -> float:
    """What a step of this kind takes to issue in a tile of ``rows`` x ``columns``, ``depth`` deep."""
    if kind in ISSUED_BY_WGRAD:
        left, right = ISSUED_BY_WGRAD[kind]
        return (left * rows + right * columns) / _TILE * depth / _STEP
    issued = ISSUED[kind]
    return (issued.narrow if columns <= 32 else issued.half if columns <= 64 else issued.full) * rows / _TILE * depth / _STEP


def _tiled(kind: str, left: int, right: int, depth: int, node: Node) -> float:
    """A product of [left, depth] by [depth, right] in tiles, in steps of this kind."""
    a, b = (min(_TILE, max(16, 1 << (n - 1).bit_length())) for n in (left, right))
    tiles, steps = -(-left // a) * -(-right // b), depth / _STEP
    issued, fixed = step_cycles(kind, a, b, _STEP), ISSUED[kind].fixed * a * b / _TILE**2 if kind in ISSUED else 0.0
    if any(channels % 8 for channels in (node.x[1], *node.weight[:2])) and kind != "gathered":
        issued *= next((factor for word, factor in _SCALAR.items() if word in kind), _SCALAR_FORWARD)
    multiplied = _TENSOR_CORES * a * b / _TILE**2 * (2 if _uses_tf32(node) else 1)
    return tiles * max(steps * issued + fixed, steps * multiplied) * _BYTES_PER_CYCLE


def _forward_costs(node: Node) -> dict[str, float]:
    x, y, product = _sizes(node)
    (n, c, _, _), (out, _, kh, kw), (oh, ow) = node.x, node.weight, node.size_out
    joins = node.joined and forms_sum(node)
    prologue = "masked prologue" if any(node.geometry.padding) else "prologue"
    gathered = c // node.geometry.groups < 16 and kh * kw > 1  # see problem.is_gathered
    kind = "join" if joins else "gathered" if gathered else prologue if node.transformed else "product"
    fused = _tiled(kind, n * oh * ow, out, c * kh * kw, node)
    # The sum's operands are read and it is written, in a sweep of its own where the fused kernel does not form it.
    in_kernel, before = (3 * x, 0) if joins else (x, 3 * x if node.joined else 0)
    around = y + (2 * x if node.transformed else 0) + (3 * x if node.joined else 0)
    return {"fused": max(in_kernel + y, fused) + before, "hybrid": max(x + y, product) + around}


def _backward_costs(node: Node) -> dict[str, float]:
    x, y, product = _sizes(node)
    (n, c, h, w), (out, _, kh, kw), (oh, ow) = node.x, node.weight, node.size_out
    taps, strides = kh * kw, node.geometry.stride[0] * node.geometry.stride[1]
    gathered = c < 16 and taps > 1  # a step of its weight gradient runs through several taps
    columns, depth = (c * taps, n * oh * ow) if gathered else (c, n * oh * ow * taps)
    # A stride leaves each input pixel only some of the taps.
    masked = "masked " if any(node.geometry.padding) else ""
    dgrad = _tiled("join dgrad" if node.joined else f"{masked}dgrad", n * h * w, c, max(1, out * taps // strides), node)
    wgrad = _tiled(f"{masked}wgrad of both" if node.transformed else f"{masked}wgrad", out, columns, depth, node)
    of_dgrad = {
        "fused": max(2 * y + (4 * x if node.joined else 2 * x if node.transformed else x), dgrad),
        "hybrid": max(x + y, product) + (5 * x if node.joined else 3 * x if node.transformed else 0),
    }
    if gathered and not node.transformed and not node.joined:  # a model's first convolution: its input takes no gradient
        of_dgrad = dict.fromkeys(of_dgrad, 0)
    of_wgrad = {"fused": max(2 * y + x, wgrad), "hybrid": max(x + y, product) + (2 * x if node.transformed else 0)}
    edge = {name: 3 * y if "hybrid" in pair else 0 for name, pair in DENSE_BACKWARD.items()}  # dY is formed once
    return {name: of_dgrad[d] + of_wgrad[w] + edge[name] for name, (d, w) in DENSE_BACKWARD.items()}
