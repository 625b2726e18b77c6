"""Which implementation of a dense convolution node is the faster one: ``fused``, ``hybrid`` or ``winograd``, and why.

The fused kernels pay for the prologue and epilogue with almost nothing, the hybrid with extra passes over memory around
a product that is, for some shapes, faster. Forward, with `lead` the fraction by which ATen's product is faster, the hybrid wins
where lead * multiply-adds > bytes swept * (multiply-adds the machine does in the time it sweeps a byte). Both numbers
are ratios, not absolute speeds; benchmarks/convolution_grid.py measures what comes of them.

Where Winograd's algorithm applies it is faster than both but for a few channels or pixels; what it saves are multiplications, on any
instruction set. Where ATen multiplies bfloat16 on matrix tiles and the fused kernels on vectors (another library than the one for tiles
is used), no sweep costs as much as that saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bnrestructure.core.activation import unsupported_activation
from bnrestructure.kernels import tuning
from bnrestructure.kernels.calls import ConvBackward, ConvForward
from bnrestructure.kernels.choice import BACKWARD, Choice, Node
from bnrestructure.kernels.cpu import library, processor
from bnrestructure.kernels.cpu.elements import ELEMENT_CODES
from bnrestructure.kernels.rounding import narrowed

__all__ = ["HALVES", "CpuRule", "instruction_set", "rule"]

#: Which implementation makes the input gradient and which the weight gradient, for each backward candidate.
HALVES = BACKWARD | {"winograd": ("winograd", "winograd"), "depthwise": ("depthwise", "depthwise")}

_TILES = "+amx"

#: How many multiply-adds the machine does while it sweeps one byte of an activation.
_OPERATIONS_PER_BYTE = {torch.float32: 8.0, torch.bfloat16: 16.0}


class CpuRule:
    """See :class:`bnrestructure.kernels.choice.Rule`."""

    prefix = "conv"
    state: Callable[[], Hashable] = staticmethod(torch.get_num_threads)

    def machine(self, dtype: torch.dtype) -> str:
        """The fused kernels' instruction set and the number of threads."""
        return f"{instruction_set()}, {torch.get_num_threads()} threads"

    def unsupported(self, call: ConvForward | ConvBackward) -> str | None:
        """Why no kernel here can answer the call: dtypes, sizes, a geometry or an activation. Memory is not asked for."""
        x, weight, transform, geometry = call.x, call.weight, call.transform, call.geometry
        if weight.dim() != 4:
            return f"{weight.dim() - 2}-D convolution"
        if not (call.dtype in ELEMENT_CODES and x.dtype in ELEMENT_CODES and weight.dtype in ELEMENT_CODES):
            return f"computing in {call.dtype} with an input in {x.dtype} and a weight in {weight.dtype}"
        if 0 in x.shape or 0 in weight.shape:
            return "an empty tensor"
        if call.join is not None and {call.join.y.dtype, call.join.r.dtype} != {call.dtype}:
            return "the tensors of one sweep must have one dtype"
        act = transform.act if call.join is None else call.join.act
        return narrowed(x, transform, call.dtype) or geometry.misfit(x.shape, weight.shape) or unsupported_activation(act)

    def candidates(self, node: Node, direction: str) -> list[str]:
        """Depthwise convolutions have one kernel."""
        if node.geometry.is_depthwise(node.weight):
            return ["depthwise"]
        names = ["fused", "hybrid"] if direction == "forward" else list(BACKWARD)
        return [*names, "winograd"] if _suits_winograd(node) else names

    def choose(self, node: Node, direction: str) -> Choice:
        """:func:`rule` with the instruction set in use."""
        return rule(node, direction, instruction_set())

    def identify(self, device: torch.device) -> None:
        """The processor, PyTorch's version, and our kernels' sources."""
        tuning.set_machine(processor=processor.name(), torch=torch.__version__, kernels=_kernels_digest())

    def timer(self, x: Tensor) -> Callable[[Callable[[], Any]], float]:
        """The host's clock."""
        return tuning.wall_clock

    def prepared(self, run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        """The run itself."""
        return run


def rule(node: Node, direction: str, isa: str) -> Choice:
    """The choice where nothing was measured; benchmarks/convolution_grid.py holds it against measurements."""
    dtype = node.dtype
    if node.geometry.is_depthwise(node.weight):
        return Choice("depthwise", "depthwise convolutions have one kernel")
    if _suits_winograd(node) and _gains_by_winograd(node):
        return Choice("winograd", "16 multiplications do the work of 36")
    if dtype is torch.bfloat16 and isa == "amx":
        return _rule_on_tiles(node)
    if dtype is torch.bfloat16 and isa.endswith(_TILES):
        return _rule_beside_tiles(node, direction)
    if not isa.startswith(("avx512", "amx")) or (dtype is torch.bfloat16 and not isa.startswith("avx512bf16")):
        return Choice("fused", f"the rule's numbers were not measured with {isa}: tune() measures here")
    if direction == "backward":
        return _backward_rule(node)
    lead = _lead_of_aten(node)
    if lead <= 0:
        return Choice("fused", "ATen's product is ahead by less than a sweep costs")
    positions = node.x[0] * math.prod(node.size_out)
    operations = positions * math.prod(node.weight)
    x = math.prod(node.x)
    swept = ((2 * x if node.transformed else 0) + positions * node.weight[0]) * dtype.itemsize
    gained, lost = lead * operations, swept * _OPERATIONS_PER_BYTE[dtype]
    if gained > lost:
        return Choice("hybrid", f"ATen's product saves {gained / lost:.1f} times what the extra sweeps cost")
    return Choice("fused", f"the extra sweeps cost {lost / gained:.1f} times what ATen's product saves")


def _rule_on_tiles(node: Node) -> Choice:
    """The fused kernels on matrix tiles themselves.

    Measured on a Xeon with AMX and two threads: without groups benchmarks/results/intel-xeon-2-cores-convolution-grid.txt, with groups
    of 4 to 48 channels intel-xeon-2-cores-convolution-grid-groups.txt beside it, where no choice took more than 1.14 times the best.
    """
    if node.x[1] < 8 and math.prod(node.weight[2:]) > 1:
        return Choice("hybrid", "a pixel of few channels leaves most of a matrix tile idle")
    return Choice("fused", "both multiply on matrix tiles (AMX), and the fused kernels do without sweeps")


def _rule_beside_tiles(node: Node, direction: str) -> Choice:
    """Measured on a Xeon with AMX and two threads, benchmarks/results/intel-xeon-2-cores-convolution-grid-on-vectors.txt.

    Groups are not in it: tune() took the hybrid for resnext50's 32 groups of 8 and more channels, but for one with a stride, and for
    those of 4 the fused weight gradient.
    """
    groups = node.geometry.groups
    if direction == "backward" and groups > 1 and node.x[1] // groups < 8:
        return Choice("hybrid dgrad, fused wgrad", "ATen's wgrad is slow in groups of few channels")
    return Choice("hybrid", "ATen's bfloat16 products run on matrix tiles (AMX), three to ten times as fast as the fused ones")


def _backward_rule(node: Node) -> Choice:
    """The fused products share a tile's output gradient, which is mostly worth more than anything that ATen's are ahead by."""
    if math.prod(node.weight[2:]) > 1 and node.geometry.groups == 1:
        if _weight_bytes(node) > 12 << 20:
            return Choice("hybrid dgrad, fused wgrad", "every tile of the fused dgrad would read all weights from memory")
        output_bytes = node.dtype.itemsize * node.x[0] * node.weight[0] * math.prod(node.size_out)
        if node.dtype is torch.bfloat16 and output_bytes > 24 << 20:
            return Choice("hybrid", "ATen's wgrad of a tensor beyond the last-level cache saves more than the extra sweeps cost")
    return Choice("fused", "the fused products share a tile's output gradient")


def instruction_set() -> str:
    """The fused kernels' instruction set, and ``+amx`` where ATen's bfloat16 products have more than that."""
    isa = library.isa_name()
    return isa + _TILES if isa == "avx512bf16" and processor.has_bfloat16_tiles() else isa


@cache
def _kernels_digest() -> str:
    return library.sources_digest()


def _suits_winograd(node: Node) -> bool:
    """Whether F(2x2, 3x3) can run the node as exactly as the direct sum.

    bfloat16 would round its transformed operands a second time. On a few pixels most of the kernel meets padding, which the direct sum
    leaves out, while here its weights cancel but for their rounding.
    """
    stride, padding, dilation, _ = node.geometry
    plain = (tuple(node.weight[2:]), stride, dilation) == ((3, 3), (1, 1), (1, 1))
    return plain and max(padding) <= 2 and min(*node.x[2:], *node.size_out) >= 4 and node.dtype is torch.float32


def _gains_by_winograd(node: Node) -> bool:
    """Where the transforms cost less than they save: enough channels for a pixel's, enough pixels for the weight's.

    Measured: without groups benchmarks/convolution_grid.py; in groups two dozen shapes of 4 to 112 channels each, at 7x7 to 56x56.
    """
    groups = node.geometry.groups
    each = min(node.x[1], node.weight[0]) // groups
    if groups > 1 and each * min(node.size_out) < 640:  # many small products
        return False
    return each >= 16 and node.x[0] * math.prod(node.size_out) >= 256


def _weight_bytes(node: Node) -> int:
    return node.dtype.itemsize * math.prod(node.weight)


def _lead_of_aten(node: Node) -> float:
    """How much less time ATen's forward product takes than the fused kernels', as a fraction of the latter; 0 where not less.

    Measured on Zen 5 with two threads, benchmarks/results/amd-epyc-2-cores-convolution-grid.txt. For 1 x 1 kernels, for groups and
    for narrow tensors the lead, where there is any, is below what a single sweep costs. It grows where a row of the output is too
    short for a register tile, with the size of the kernel, and with weights beyond the second- and the third-level cache.
    """
    taps = math.prod(node.weight[2:])
    narrow = min(node.x[1], node.weight[0]) < (40 if taps >= 25 else 128)
    if taps == 1 or node.geometry.groups > 1 or narrow:
        return 0.0
    lead = 0.06 if node.dtype is torch.float32 else 0.04
    if node.size_out[1] <= 8 and node.geometry.stride[1] == 1:
        lead += 0.05
    if taps >= 25:
        lead += 0.05
    size = _weight_bytes(node)
    return lead + (0.03 if size > 4 << 20 else 0.0) + (0.2 if size > 16 << 20 else 0.0)
