"""Where a tensor becomes an address: what C++ is about to touch is held against the tensor's own memory, here and nowhere else.

A caller says what its kernel reads or writes: so many images, channels and pixels of an activation, so many numbers of a vector. A tensor
that does not have them is refused, before anything is written. One that has them in another layout is copied. So is a view with PyTorch's
negative bit, whose numbers have the other sign in memory. Copies go to ``keep``, which must outlive the kernel, as the tensors must.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnrestructure.core.edges import Join
from bnrestructure.core.errors import UnsupportedCallError
from bnrestructure.core.kept import kept_activation
from bnrestructure.kernels import layout
from bnrestructure.kernels.cpu.elements import ELEMENT_CODES, activation_code
from bnrestructure.kernels.cpu.structures import JoinArguments
from bnrestructure.kernels.layout import pitch_of
from bnrestructure.kernels.operands import readable, require_memory

__all__ = [
    "Keep",
    "channels_last",
    "fresh",
    "fresh_kept",
    "fresh_like",
    "fresh_vector",
    "join",
    "parameter",
    "pixels",
    "span",
    "vector",
    "vectors",
    "written",
]

_CPU = torch.device("cpu")

#: Copies that a kernel reads.
Keep = list[Tensor]


def span(x: Tensor, reach: int) -> int:
    """The address of x's first element, for a kernel that touches no more than the ``reach`` elements from there on.

    Raises RuntimeError for a tensor that is not in the CPU's memory or whose storage is shorter than that (somebody resized it), and
    UnsupportedCallError for a view with the negative bit.
    """
    if x.is_neg():
        raise UnsupportedCallError("a view with the negative bit")
    if not x.is_cpu or (x.storage_offset() + reach) * x.itemsize > x.untyped_storage().nbytes():
        require_memory(x, reach, "cpu")
    return x.data_ptr()


def pixels(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, keep: Keep) -> tuple[int, int]:
    """(address, pixel pitch) of an activation of this shape [N, C, H, W], to be read in ``dtype``."""
    if x.shape != shape:
        raise UnsupportedCallError(f"a tensor of shape {list(x.shape)} where {list(shape)} was expected")
    pitch = pitch_of(x) if x.dtype is dtype and not x.is_neg() else 0
    if not pitch:
        x = channels_last(x, dtype)
        keep.append(x)
        pitch = pitch_of(x)
    n, c, h, w = shape
    reach = (n * h * w - 1) * pitch + c
    if not x.is_cpu or (x.storage_offset() + reach) * dtype.itemsize > x.untyped_storage().nbytes():
        require_memory(x, reach, "cpu")
    return x.data_ptr(), pitch


def channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An activation as kernels can address it: in ``dtype`` (fp32 or bf16) and channels_last."""
    if x.dtype is not dtype and not x.is_floating_point():
        raise UnsupportedCallError(f"an activation of {x.dtype}")
    return readable(x).to(dtype).contiguous(memory_format=torch.channels_last).resolve_neg()


def written(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int]:
    """(address, pixel pitch) of an activation that is written, in place."""
    pitch = pitch_of(x)
    if x.shape != shape or x.dtype is not dtype or not pitch:
        raise UnsupportedCallError(f"a result {list(x.shape)} of {x.dtype}, where {list(shape)} of {dtype} is to be written")
    n, c, h, w = shape
    return span(x, (n * h * w - 1) * pitch + c), pitch


def vector(v: Tensor | None, keep: Keep, *shape: int) -> int:
    """The address of [C] or [N, C] numbers in fp32; 0 for none."""
    if v is None:
        return 0
    if v.shape != shape:
        raise UnsupportedCallError(f"a tensor of shape {list(v.shape)} where {list(shape)} was expected")
    made = layout.vector(v)
    if made is not v:
        keep.append(made)
    return span(made, made.numel())


def vectors(keep: Keep, channels: int, *given: Tensor | None) -> list[int]:
    """The addresses of vectors [C] that are there together or not at all; zeros without them."""
    if given[0] is None:
        return [0] * len(given)
    found = []
    for v in given:
        if v is None:
            raise UnsupportedCallError("vectors that are not all there")
        # What vector() looks at, in the hope that there is nothing to convert or to refuse: this runs several times for every convolution.
        plain = v.dtype is torch.float32 and v.dim() == 1 and v.numel() == channels and v.is_contiguous() and v.is_cpu and not v.is_neg()
        if plain and (v.storage_offset() + channels) * 4 <= v.untyped_storage().nbytes():
            found.append(v.data_ptr())
        else:
            found.append(vector(v, keep, channels))
    return found


def parameter(v: Tensor | None, channels: int, keep: Keep | None) -> tuple[int, int]:
    """(address, element code) of a batch norm's parameter; (0, 0) for none. Without ``keep`` it is written, and may not be a copy."""
    if v is None:
        return 0, 0
    if v.numel() != channels or v.dtype not in ELEMENT_CODES:
        raise UnsupportedCallError(f"a parameter of shape {list(v.shape)} and {v.dtype} for {channels} channels")
    if not v.is_contiguous() or v.is_neg():
        if keep is None:
            raise UnsupportedCallError("running statistics must be contiguous, without the negative bit, to be updated in place")
        v = readable(v).detach().contiguous().resolve_neg()
        keep.append(v)
    return span(v, channels), ELEMENT_CODES[v.dtype]


def join(j: Join, shape: tuple[int, ...], dtype: torch.dtype, keep: Keep) -> JoinArguments:
    """A residual join whose sum has this shape and dtype."""
    if j.tr.gate is not None:
        raise UnsupportedCallError("a gate on a join's second operand")
    a = JoinArguments()
    a.gate_pitch, a.image_pixels = shape[1], shape[2] * shape[3]
    if j.ty.gate is not None:
        a.gate = vector(j.ty.gate, keep, *shape[:2])
    a.y, a.y_pitch = pixels(j.y, shape, dtype, keep)
    a.r, a.r_pitch = pixels(j.r, shape, dtype, keep)
    a.y_mean, a.y_scale, a.y_beta = vectors(keep, shape[1], j.ty.mean, j.ty.scale, j.ty.beta)
    a.r_mean, a.r_scale, a.r_beta = vectors(keep, shape[1], j.tr.mean, j.tr.scale, j.tr.beta)
    a.activation, a.slope = activation_code(j.act)
    return a


def fresh(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, int, int]:
    """(an uninitialised channels_last activation, its address, its pixel pitch)."""
    x = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    return x, x.data_ptr(), shape[1]


def fresh_kept(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, int, int]:
    """The same for what lives until backward."""
    x = kept_activation(shape, dtype, _CPU)
    return x, x.data_ptr(), shape[1]


def fresh_like(x: Tensor) -> tuple[Tensor, int]:
    """(an uninitialised tensor of x's shape, dtype and, but for gaps, strides, its address)."""
    made = torch.empty_like(x)
    return made, made.data_ptr()


def fresh_vector(*shape: int) -> tuple[Tensor, int]:
    """An uninitialised fp32 vector and its address."""
    v = torch.empty(shape, dtype=torch.float32)  # said, for the default may be another
    return v, v.data_ptr()
