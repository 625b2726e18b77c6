"""Which element meets which: every small geometry, against what a convolution, a pool and a slice are."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.nn import functional as F

from bnrestructure.core.aliases import alias, channel_slice, channels_last_buffer
from bnrestructure.core.edges import ConvGeometry, PoolGeometry, Transform
from bnrestructure.core.kept import kept_activation
from bnrestructure.kernels.calls import MaxPoolBackward, MaxPoolForward
from bnrestructure.kernels.reference import REFERENCE


def test_output_size() -> None:
    """As many outputs as positions at which the kernel lies within the padded input."""
    for n, kernel, stride, padding, dilation in product(range(1, 10), range(1, 5), range(1, 4), range(4), range(1, 4)):
        reach = dilation * (kernel - 1)
        expected = len(range(0, n + 2 * padding - reach, stride)) if n + 2 * padding > reach else 0
        found = ConvGeometry((stride,), (padding,), (dilation,), 1).output_size((n,), (kernel,))[0]
        assert max(found, 0) == expected, (n, kernel, stride, padding, dilation)


def first_maximum(z: torch.Tensor, geometry: PoolGeometry, n: int, c: int, row: int, column: int) -> tuple[int, int]:
    """Row and column of the first maximum of an output's window, row by row."""
    (kh, kw), (sh, sw), (ph, pw), _ = geometry
    places = [(i, j) for i in range(row * sh - ph, row * sh - ph + kh) for j in range(column * sw - pw, column * sw - pw + kw)]
    inside = [(i, j) for i, j in places if 0 <= i < z.shape[2] and 0 <= j < z.shape[3]]
    return max(inside, key=lambda at: float(z[(n, c, *at)]))


def _pool_geometries() -> list[PoolGeometry]:
    found = []
    kernels, strides, paddings = [(1, 2), (2, 2), (3, 2), (3, 3)], [(1, 1), (2, 1), (2, 3)], [(0, 0), (1, 0), (1, 1)]
    for kernel, stride, padding, ceil in product(kernels, strides, paddings, [False, True]):
        if all(2 * p <= k for p, k in zip(padding, kernel, strict=True)):
            found.append(PoolGeometry(kernel, stride, padding, ceil))
    return found


def test_the_gradient_of_a_max_pool_goes_to_the_first_maximum() -> None:
    """Ties everywhere (three values): PyTorch's results, PyTorch's gradients, and the position inside the window that is stored."""
    generator = torch.Generator().manual_seed(0)
    for geometry, (h, w) in product(_pool_geometries(), [(3, 3), (4, 5), (5, 3)]):
        x = torch.randint(0, 3, (1, 2, h, w), generator=generator).double().requires_grad_()
        y, index = REFERENCE.run(MaxPoolForward(x.detach(), Transform(), geometry, x.dtype))
        expected = F.max_pool2d(x, geometry.kernel, geometry.stride, geometry.padding, ceil_mode=geometry.ceil_mode)
        assert torch.equal(y, expected)
        dy = torch.arange(1.0, y.numel() + 1, dtype=torch.float64).view(y.shape)
        dx = REFERENCE.run(MaxPoolBackward(dy, index, x.detach(), Transform(), geometry)).dx
        assert torch.equal(dx, torch.autograd.grad(expected, x, dy)[0])
        n, c, row, column = (int(i) for i in torch.tensor(y.shape) - 1)
        i, j = first_maximum(x.detach(), geometry, n, c, row, column)
        inside = divmod(int(index[n, c, row, column]), geometry.kernel[1])
        starts = (at * s - p for at, s, p in zip((row, column), geometry.stride, geometry.padding, strict=True))
        assert tuple(start + at for start, at in zip(starts, inside, strict=True)) == (i, j)


@pytest.mark.parametrize("spatial", [(), (3,), (2, 3), (2, 1, 3)], ids=len)
@pytest.mark.parametrize("made", [channels_last_buffer, kept_activation], ids=lambda f: f.__name__)
def test_a_channel_slice_is_those_channels(spatial: tuple[int, ...], made) -> None:  # type: ignore[no-untyped-def]
    """Every slice of a buffer, and every slice of a slice, reads and writes its own channels and no others; aliases are the tensor."""
    for n, c in product((1, 2), (1, 2, 5)):
        whole = made((n, c, *spatial), torch.float32, torch.device("cpu"))
        values = torch.arange(float(whole.numel())).view(whole.shape)
        assert whole.copy_(values).shape == (n, c, *spatial)
        assert torch.equal(alias(whole), values)
        for start, channels in ((a, b) for a in range(c) for b in range(1, c - a + 1)):
            one = channel_slice(whole, start, channels)
            assert torch.equal(one, values.narrow(1, start, channels))
            assert not one._is_view()
            for inner in range(channels):  # from a slice to any later channel of the buffer it lies in
                assert torch.equal(channel_slice(one, inner, c - start - inner), values.narrow(1, start + inner, c - start - inner))
            one.add_(1000)
            changed = values.clone()
            changed.narrow(1, start, channels).add_(1000)
            assert torch.equal(whole, changed)
            one.sub_(1000)
