"""fuse-statistics: CONV + statistics -> the convolution's epilogue (MVF: one sweep, and that one not over memory).

``y = conv(x); mean, var = statistics(y)`` -> ``y, mean, var = conv(x, statistics=True)``; a residual likewise.
"""

from __future__ import annotations

from bnrestructure.graph.ir import Conv, Residual, Statistics
from bnrestructure.graph.layers import ConvLayer
from bnrestructure.graph.provenance import take_halves
from bnrestructure.passes.base import Pass, Rule
from bnrestructure.passes.to_fused import to_fused
from bnrestructure.patterns.base import Found
from bnrestructure.patterns.pairs import CONV_STATISTICS, RESIDUAL_STATISTICS

__all__ = ["FUSE_STATISTICS", "ride_on_residual"]


def ride_on_conv(match: Found[Conv | ConvLayer, Statistics]) -> None:
    """Let the convolution compute the statistics."""
    _ride(to_fused(match.maker), match.reader)


def ride_on_residual(match: Found[Residual, Statistics]) -> None:
    """Let the residual compute the statistics of its sum."""
    _ride(match.maker, match.reader)


def _ride(producer: Conv | Residual, statistics: Statistics) -> None:
    producer.update(statistics=True)
    tensor = producer.out("y" if isinstance(producer, Conv) else "out")
    for name, item in statistics.outs().items():
        item.replace_all_uses_with(tensor if name == "passed" else producer.out(name))
    take_halves(producer.node, statistics.node)
    statistics.erase()


FUSE_STATISTICS = Pass(
    "fuse-statistics",
    (Rule(CONV_STATISTICS, ride_on_conv, at=Statistics), Rule(RESIDUAL_STATISTICS, ride_on_residual, at=Statistics)),
)
