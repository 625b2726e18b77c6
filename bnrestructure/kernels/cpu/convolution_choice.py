"""Which implementation of a dense convolution node is the faster one: ``fused`` or ``hybrid``, and why.

Where this machine has measured the node (bnrestructure.tune), the measurement decides; elsewhere the rule below does. The two
products of a backward pass may be measured to be better apart: ``hybrid dgrad, fused wgrad``, say.

The fused kernels pay for the prologue and epilogue with almost nothing, the hybrid with extra passes over memory around
a product that is, for some shapes, faster. With `lead` the fraction by which ATen's product is faster, the hybrid wins
where lead * multiply-adds > bytes swept * (multiply-adds the machine does in the time it sweeps a byte). Both numbers
are ratios, not absolute speeds; benchmarks/cpu_convolution.py measures them (--grid: shapes of no particular model).
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch

from bnrestructure.kernels import tuning
from bnrestructure.kernels.choice import Choice
from bnrestructure.kernels.cpu import library, processor
from bnrestructure.ops.edges import ConvGeometry

__all__ = ["Node", "call_of", "choose", "identify_machine"]


class Node(NamedTuple):
    """What the choice depends on: sizes of x and y (without the batch), of the kernel, and how x is transformed."""

    batch: int
    channels: int
    size: tuple[int, ...]
    channels_out: int
    size_out: tuple[int, ...]
    kernel: tuple[int, ...]
    geometry: ConvGeometry
    transformed: bool


#: How many multiply-adds the machine does while it sweeps one byte of an activation.
_OPERATIONS_PER_BYTE = {torch.float32: 8.0, torch.bfloat16: 16.0}



@lru_cache(maxsize=4096)
def choose(node: Node, dtype: torch.dtype, direction: str, isa: str, threads: int) -> Choice:
    """The choice for ``direction`` "forward" or "backward" on the instruction set ``isa`` (library.isa_name()).

    Cached; tuning clears the cache.
    """
    identify_machine()
    found = tuning.measured(call_of(node, dtype, direction, isa, threads))
    if found is not None:
        return Choice(found.choice, found.reason)
    lead = _lead_of_aten(node, dtype, direction, isa)
    if lead <= 0:
        return Choice("fused", "the fused product is as fast as ATen's")
    taps = node.kernel[0] * node.kernel[1]
    positions = node.batch * node.size_out[0] * node.size_out[1]
    operations = positions * node.channels_out * (node.channels // node.geometry.groups) * taps
    item = 2 if dtype is torch.bfloat16 else 4
    x = node.batch * node.channels * node.size[0] * node.size[1] * item
    y = positions * node.channels_out * item
    if direction == "forward":
        swept = (2 * x if node.transformed else 0) + y
    else:
        operations *= 2
        swept = 3 * y + (5 * x if node.transformed else 0)
    gained, lost = lead * operations, swept * _OPERATIONS_PER_BYTE[dtype]
    if gained > lost:
        return Choice("hybrid", f"ATen's product saves {gained / lost:.1f} times what the extra sweeps cost")
    return Choice("fused", f"the extra sweeps cost {lost / gained:.1f} times what ATen's product saves")


def identify_machine() -> None:
    """Tell kernels/tuning.py what times depend on here: the processor, PyTorch's version, and our kernels' sources."""
    tuning.set_machine(processor=processor.name(), torch=torch.__version__, kernels=_kernels_digest())


def call_of(node: Node, dtype: torch.dtype, direction: str, isa: str, threads: int) -> str:
    """The node's name in the file of measurements: all that its time depends on, as far as it knows."""
    (h, w), (kh, kw), (stride, padding, dilation, groups) = node.size, node.kernel, node.geometry
    details = [f"stride {_by(stride)}", f"padding {_by(padding)}", f"dilation {_by(dilation)}", f"groups {groups}"]
    transformed = "transformed" if node.transformed else "as it is"
    return (
        f"conv {direction} {str(dtype).removeprefix('torch.')} {node.batch}x{node.channels}x{h}x{w} {transformed}, "
        f"to {node.channels_out} by {kh}x{kw}, {', '.join(details)}, {isa}, {threads} threads"
    )


def _by(pair: tuple[int, ...]) -> str:
    return "x".join(map(str, pair))


@cache
def _kernels_digest() -> str:
    return library.sources_digest()


def _lead_of_aten(node: Node, dtype: torch.dtype, direction: str, isa: str) -> float:
    """How much less time ATen's product takes than the fused kernels', as a fraction of the latter; 0 where not less.

    Measured on Zen 5 with two threads. For 1 x 1 kernels, for groups and for narrow tensors the lead, where there is
    any, is below what a single sweep costs. It grows where a row of the output is too short for a register tile, and
    where the weight does not fit into the second-level cache.
    """
    if not isa.startswith("avx512") or (dtype is torch.bfloat16 and isa != "avx512bf16"):
        return 0.0  # not measured
    taps = node.kernel[0] * node.kernel[1]
    if taps == 1 or node.geometry.groups > 1 or min(node.channels, node.channels_out) < 128:
        return 0.0
    large = 4 * taps * node.channels * node.channels_out > 4 << 20
    if direction == "backward":
        return 0.08 if large else 0.0
    return 0.05 + (0.10 if node.size_out[1] <= 8 else 0.0) + (0.05 if large else 0.0)
