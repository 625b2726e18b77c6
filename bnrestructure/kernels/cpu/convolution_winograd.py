"""The dense 3x3 convolution with everything inside it, by Winograd's algorithm (src/winograd.h): 16 multiplications for 36.

In float32 alone: bfloat16 would round the transformed operands a second time.
"""

from __future__ import annotations

from functools import partial

from bnrestructure.kernels.cpu import convolution_fused, library

__all__ = ["conv_backward", "conv_forward"]

conv_forward = partial(convolution_fused.conv_forward, kernel=library.declare("bnr_winograd_forward", "p"))
conv_backward = partial(convolution_fused.conv_backward, kernel=library.declare("bnr_winograd_backward", "p"))
