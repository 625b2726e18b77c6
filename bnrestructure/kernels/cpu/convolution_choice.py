"""Which implementation of a dense convolution node is the faster one: ``fused``, ``hybrid`` or ``winograd``, and why.

Where this machine has measured the node (bnrestructure.tune), the measurement decides; elsewhere the rule below does. The two
products of a backward pass may be measured to be better apart: ``hybrid dgrad, fused wgrad``, say.

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
from functools import cache, lru_cache
from typing import NamedTuple

import torch

from bnrestructure.core.edges import ConvGeometry
from bnrestructure.kernels import tuning
from bnrestructure.kernels.choice import BACKWARD, Choice
from bnrestructure.kernels.cpu import library, processor

__all__ = ["IMPLEMENTATIONS", "Node", "call_of", "candidates", "choose", "identify_machine", "instruction_set", "rule"]

#: Which implementation makes the input gradient and which the weight gradient (choice.BACKWARD), with Winograd's algorithm.
IMPLEMENTATIONS = BACKWARD | {"winograd": ("winograd", "winograd")}


class Node(NamedTuple):
    """What the choice depends on: sizes of x and y (without the batch), of the kernel, and how x is transformed.

    ``joined``: x is a residual join's sum, whose gradient the node finishes.
    """

    batch: int
    channels: int
    size: tuple[int, ...]
    channels_out: int
    size_out: tuple[int, ...]
    kernel: tuple[int, ...]
    geometry: ConvGeometry
    transformed: bool
    joined: bool = False


_TILES = "+amx"

#: How many multiply-adds the machine does while it sweeps one byte of an activation.
_OPERATIONS_PER_BYTE = {torch.float32: 8.0, torch.bfloat16: 16.0}


def candidates(node: Node, dtype: torch.dtype, direction: str) -> list[str]:
    """The implementations that can run the node, the one that needs the least memory first."""
    names = ["fused", "hybrid"] if direction == "forward" else list(BACKWARD)
    return [*names, "winograd"] if _suits_winograd(node, dtype) else names


@lru_cache(maxsize=4096)
def choose(node: Node, dtype: torch.dtype, direction: str, isa: str, threads: int) -> Choice:
    """The choice for ``direction`` "forward" or "backward" on the instruction set ``isa`` (:func:`instruction_set`).

    Cached; tuning clears the cache.
    """
    identify_machine()
    found = tuning.measured(call_of(node, dtype, direction, isa, threads))
    return rule(node, dtype, direction, isa) if found is None else Choice(found.choice, found.reason)


def rule(node: Node, dtype: torch.dtype, direction: str, isa: str) -> Choice:
    """The choice where nothing was measured; benchmarks/convolution_grid.py holds it against measurements."""
    if _suits_winograd(node, dtype) and _gains_by_winograd(node):
        return Choice("winograd", "16 multiplications do the work of 36")
    if dtype is torch.bfloat16 and isa == "amx":
        return _rule_on_tiles(node)
    if dtype is torch.bfloat16 and isa.endswith(_TILES):
        return _rule_beside_tiles(node, direction)
    if not isa.startswith(("avx512", "amx")) or (dtype is torch.bfloat16 and not isa.startswith("avx512bf16")):
        return Choice("fused", f"the rule's numbers were not measured with {isa}: tune() measures here")
    if direction == "backward":
        return _backward_rule(node, dtype)
    lead = _lead_of_aten(node, dtype)
    if lead <= 0:
        return Choice("fused", "ATen's product is ahead by less than a sweep costs")
    positions = node.batch * node.size_out[0] * node.size_out[1]
    operations = positions * node.channels_out * (node.channels // node.geometry.groups) * math.prod(node.kernel)
    x = node.batch * node.channels * math.prod(node.size)
    swept = ((2 * x if node.transformed else 0) + positions * node.channels_out) * dtype.itemsize
    gained, lost = lead * operations, swept * _OPERATIONS_PER_BYTE[dtype]
    if gained > lost:
        return Choice("hybrid", f"ATen's product saves {gained / lost:.1f} times what the extra sweeps cost")
    return Choice("fused", f"the extra sweeps cost {lost / gained:.1f} times what ATen's product saves")


def _rule_on_tiles(node: Node) -> Choice:
    """The fused kernels on matrix tiles themselves.

    Measured on a Xeon with AMX and two threads: without groups benchmarks/results/intel-xeon-2-cores-convolution-grid.txt, with groups
    of 4 to 48 channels intel-xeon-2-cores-convolution-grid-groups.txt beside it, where no choice took more than 1.14 times the best.
    """
    if node.channels < 8 and math.prod(node.kernel) > 1:
        return Choice("hybrid", "a pixel of few channels leaves most of a matrix tile idle")
    return Choice("fused", "both multiply on matrix tiles (AMX), and the fused kernels do without sweeps")


def _rule_beside_tiles(node: Node, direction: str) -> Choice:
    """Measured on a Xeon with AMX and two threads, benchmarks/results/intel-xeon-2-cores-convolution-grid-on-vectors.txt.

    Groups are not in it: tune() took the hybrid for resnext50's 32 groups of 8 and more channels, but for one with a stride, and for
    those of 4 the fused weight gradient.
    """
    groups = node.geometry.groups
    if direction == "backward" and groups > 1 and node.channels // groups < 8:
        return Choice("hybrid dgrad, fused wgrad", "ATen's wgrad is slow in groups of few channels")
    return Choice("hybrid", "ATen's bfloat16 products run on matrix tiles (AMX), three to ten times as fast as the fused ones")


def _backward_rule(node: Node, dtype: torch.dtype) -> Choice:
    """The fused products share a tile's output gradient, which is mostly worth more than anything that ATen's are ahead by."""
    if math.prod(node.kernel) > 1 and node.geometry.groups == 1:
        if _weight_bytes(node, dtype) > 12 << 20:
            return Choice("hybrid dgrad, fused wgrad", "every tile of the fused dgrad would read all weights from memory")
        output_bytes = dtype.itemsize * node.batch * node.channels_out * math.prod(node.size_out)
        if dtype is torch.bfloat16 and output_bytes > 24 << 20:
            return Choice("hybrid", "ATen's wgrad of a tensor beyond the last-level cache saves more than the extra sweeps cost")
    return Choice("fused", "the fused products share a tile's output gradient")


def instruction_set() -> str:
    """The fused kernels' instruction set, and ``+amx`` where ATen's bfloat16 products have more than that."""
    isa = library.isa_name()
    return isa + _TILES if isa == "avx512bf16" and processor.has_bfloat16_tiles() else isa


def identify_machine() -> None:
    """Tell kernels/tuning.py what times depend on here: the processor, PyTorch's version, and our kernels' sources."""
    tuning.set_machine(processor=processor.name(), torch=torch.__version__, kernels=_kernels_digest())


def call_of(node: Node, dtype: torch.dtype, direction: str, isa: str, threads: int) -> str:
    """The node's name in the file of measurements: all that its time depends on, as far as it knows."""
    (h, w), (kh, kw), (stride, padding, dilation, groups) = node.size, node.kernel, node.geometry
    details = [f"stride {_by(stride)}", f"padding {_by(padding)}", f"dilation {_by(dilation)}", f"groups {groups}"]
    transformed = ("transformed" if node.transformed else "as it is") + (", joined" if node.joined else "")
    return (
        f"conv {direction} {str(dtype).removeprefix('torch.')} {node.batch}x{node.channels}x{h}x{w} {transformed}, "
        f"to {node.channels_out} by {kh}x{kw}, {', '.join(details)}, {isa}, {threads} threads"
    )


def _by(pair: tuple[int, ...]) -> str:
    return "x".join(map(str, pair))


@cache
def _kernels_digest() -> str:
    return library.sources_digest()


def _suits_winograd(node: Node, dtype: torch.dtype) -> bool:
    """Whether F(2x2, 3x3) can run the node as exactly as the direct sum.

    bfloat16 would round its transformed operands a second time. On a few pixels most of the kernel meets padding, which the direct sum
    leaves out, while here its weights cancel but for their rounding.
    """
    stride, padding, dilation, _ = node.geometry
    plain = (node.kernel, stride, dilation) == ((3, 3), (1, 1), (1, 1))
    return plain and max(padding) <= 2 and min(*node.size, *node.size_out) >= 4 and dtype is torch.float32


def _gains_by_winograd(node: Node) -> bool:
    """Where the transforms cost less than they save: enough channels for a pixel's, enough pixels for the weight's.

    Measured: without groups benchmarks/convolution_grid.py; in groups two dozen shapes of 4 to 112 channels each, at 7x7 to 56x56.
    """
    groups = node.geometry.groups
    each = min(node.channels, node.channels_out) // groups
    if groups > 1 and each * min(node.size_out) < 640:  # many small products
        return False
    return each >= 16 and node.batch * math.prod(node.size_out) >= 256


def _weight_bytes(node: Node, dtype: torch.dtype) -> int:
    return dtype.itemsize * math.prod(node.kernel) * node.channels * node.channels_out // node.geometry.groups


def _lead_of_aten(node: Node, dtype: torch.dtype) -> float:
    """How much less time ATen's forward product takes than the fused kernels', as a fraction of the latter; 0 where not less.

    Measured on Zen 5 with two threads, benchmarks/results/amd-epyc-2-cores-convolution-grid.txt. For 1 x 1 kernels, for groups and
    for narrow tensors the lead, where there is any, is below what a single sweep costs. It grows where a row of the output is too
    short for a register tile, with the size of the kernel, and with weights beyond the second- and the third-level cache.
    """
    taps = math.prod(node.kernel)
    narrow = min(node.channels, node.channels_out) < (40 if taps >= 25 else 128)
    if taps == 1 or node.geometry.groups > 1 or narrow:
        return 0.0
    lead = 0.06 if dtype is torch.float32 else 0.04
    if node.size_out[1] <= 8 and node.geometry.stride[1] == 1:
        lead += 0.05
    if taps >= 25:
        lead += 0.05
    size = _weight_bytes(node, dtype)
    return lead + (0.03 if size > 4 << 20 else 0.0) + (0.2 if size > 16 << 20 else 0.0)
