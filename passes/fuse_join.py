"""fuse-join: a residual + the CONV that reads its sum -> the convolution's prologue, and the dgrad's epilogue.

``conv(act(normalise(y) * gate + shortcut))``, mostly without a gate -> one node. The sum is stored as it is formed, of its gradient only
what both operands share. The pass comes behind chain-readers: the first reader of a chain is the last to add to its gradient, so it can
finish it.
"""

from __future__ import annotations

from bnrestructure.graph.ir import Conv, Residual
from bnrestructure.graph.provenance import take_halves
from bnrestructure.passes.base import Pass, Rule
from bnrestructure.patterns.base import Found
from bnrestructure.patterns.pairs import RESIDUAL_CONV

__all__ = ["FUSE_JOIN"]


def into_conv(match: Found[Residual, Conv]) -> None:
    """Let the convolution form the sum."""
    residual, conv = match.maker, match.reader
    conv.update(
        x=residual.y, mean=residual.mean, scale=residual.scale, beta=residual.beta, gate=residual.gate, act=residual.act, r=residual.r,
        r_mean=residual.r_mean, r_scale=residual.r_scale, r_beta=residual.r_beta, x_gain=residual.gain, r_gain=residual.r_gain,
    )  # fmt: skip
    take_halves(conv.node, residual.node)
    residual.erase()


FUSE_JOIN = Pass("fuse-join", (Rule(RESIDUAL_CONV, into_conv, at=Conv),))
