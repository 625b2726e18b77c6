"""Concats of normalised tensors, and average pools: who normalises, and where the normalised tensor has to stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from equivalence import assert_same_training
from pass_tools import after
from small_models import conv_bn
from torch import Tensor, nn
from torch.nn import functional as F

import bnrestructure
from bnrestructure import ops
from bnrestructure.core.edges import PoolGeometry, Transform
from bnrestructure.graph.ir import Normalise
from bnrestructure.passes.pipeline import PASSES

Body = Callable[["_Branches", Tensor], Tensor]


class _Branches(nn.Module):
    """Branches from a stem of 5 channels, of 4 and 3, and a convolution for each number of channels that a body makes of them."""

    def __init__(self, body: Body, act: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = conv_bn(3, 5, act=act)
        self.left, self.right, self.next = conv_bn(5, 4, act=act), conv_bn(5, 3, 1, act=act), conv_bn(4, 3, act=act)
        self.linear = nn.Sequential(nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4))
        self.tanh = conv_bn(5, 4, act=nn.Tanh())
        self.read4, self.read7, self.read8, self.read9, self.read12 = (nn.Conv2d(n, 3, 3, padding=1) for n in (4, 7, 8, 9, 12))
        self.plain = nn.Conv2d(5, 5, 1)
        self.average = nn.AvgPool2d((3, 2), (2, 1), (1, 0))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, self.stem(x))


def _both(m: _Branches, x: Tensor) -> Tensor:
    return torch.cat([m.left(x), m.right(x)], 1)


def _chained(m: _Branches, x: Tensor) -> Tensor:
    left = m.left(x)
    return m.read12(torch.cat([x, left, m.next(left)], 1))


def _read_after(m: _Branches, x: Tensor) -> Tensor:
    left = m.left(x)
    return m.read7(torch.cat([left, m.right(x)], 1)) + m.read4(left)


def _read_thrice(m: _Branches, z: Tensor) -> Tensor:
    return m.read7(z) + m.read7(F.avg_pool2d(z, 3, 1, 1)) + m.read7(F.max_pool2d(z, 3, 1, 1))


FUSED: dict[str, Body] = {
    "a convolution reads it": lambda m, x: m.read7(_both(m, x)),
    "a max pool reads it": lambda m, x: F.max_pool2d(_both(m, x), 2),
    "an average pool reads it": lambda m, x: F.avg_pool2d(_both(m, x), 3, 2, 1),
    "a global average reads it": lambda m, x: F.adaptive_avg_pool2d(_both(m, x), 1),
    "a mean reads it": lambda m, x: _both(m, x).mean((2, 3)),
    "all three read it": lambda m, x: _read_thrice(m, _both(m, x)),
    "a concat inside": lambda m, x: m.read12(torch.cat([m.left(x), torch.cat([m.right(x), x], 1)], 1)),
    "a segment that others read": _chained,
    "a segment that is read afterwards": _read_after,
    "a pooled segment": lambda m, x: m.read9(torch.cat([m.left(x), F.max_pool2d(x, 3, 1, 1)], 1)),
    "an activated segment": lambda m, x: m.read9(torch.cat([m.left(x), F.relu(m.plain(x))], 1)),
    "average pool alone": lambda m, x: F.avg_pool2d(m.left(x), 2),
    "average pool, padding left out where there is none": lambda m, x: F.avg_pool2d(m.left(x), 3, count_include_pad=False),
    "average pool as a module": lambda m, x: m.average(m.left(x)),
}  # fmt: skip

KEPT: dict[str, Body] = {
    "different activations": lambda m, x: m.read8(torch.cat([m.left(x), m.linear(x)], 1)),
    "a segment that is not activated": lambda m, x: m.read9(torch.cat([m.left(x), m.plain(x)], 1)),
    "a segment that is averaged": lambda m, x: m.read9(torch.cat([m.left(x), F.avg_pool2d(m.plain(x), 3, 1, 1)], 1)),
    "an activation that is none of ours": lambda m, x: m.read8(torch.cat([m.left(x), m.tanh(x)], 1)),
    "a segment that others need normalised": lambda m, x: (lambda z: m.read7(torch.cat([z, m.right(x)], 1)) + z.exp().sum())(m.left(x)),
    "nobody can normalise it": lambda m, x: torch.tanh(_both(m, x)),
}  # fmt: skip


def _normalises(body: Body, act: nn.Module | None = None) -> int:
    return len(Normalise.every(after(_Branches(body, act).double(), *PASSES).graph))


def _image() -> Tensor:
    return torch.randn(4, 3, 9, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("case", FUSED)
def test_nothing_is_normalised_in_memory(case: str) -> None:
    assert _normalises(FUSED[case]) == 0
    assert_same_training(_Branches(FUSED[case]).double(), _image())


@pytest.mark.parametrize("case", KEPT)
def test_what_is_normalised_in_memory(case: str) -> None:
    assert _normalises(KEPT[case]) > 0
    assert_same_training(_Branches(KEPT[case]).double(), _image())


@pytest.mark.parametrize("case", ["a pooled segment", "an activated segment", "a segment that others read"])
def test_a_segment_without_a_batch_norm_needs_an_activation_that_leaves_it_alone(case: str) -> None:
    """relu6 of relu6 is relu6; silu of silu is not silu."""
    for act, kept in ((nn.ReLU6(), "an activated segment"), (nn.SiLU(), case), (nn.LeakyReLU(), case)):
        if case == "a segment that others read":  # all of its segments have batch norms
            kept = ""
        assert (_normalises(FUSED[case], act) > 0) == (case == kept), act
        assert_same_training(_Branches(FUSED[case], act).double(), _image())


def test_an_average_needs_an_activation_of_which_a_multiple_is_one_of_its_input() -> None:
    for act, kept in ((nn.ReLU(), 0), (nn.LeakyReLU(), 0), (nn.Identity(), 0), (nn.ReLU6(), 1), (nn.SiLU(), 1)):
        assert _normalises(FUSED["average pool alone"], act) == kept, act
        assert_same_training(_Branches(FUSED["average pool alone"], act).double(), _image())


def test_a_segment_whose_values_are_exactly_zero_has_eagers_gradient() -> None:
    """A pooled segment passes an activation once more. Where it is zero, eager's gradient ends one activation earlier: at zero, too."""
    model = _Branches(FUSED["a pooled segment"]).double()
    with torch.no_grad():
        model.stem[1].bias.fill_(-2.0)  # most of the stem's output, and whole pooling windows, are zero
    assert_same_training(model, _image())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["all three read it", "a segment that others read", "a pooled segment", "average pool alone"])
def test_verify_with_the_kernels_that_users_get(case: str, dtype: torch.dtype) -> None:
    report = bnrestructure.verify(_Branches(FUSED[case]), torch.randn(8, 3, 33, 30), dtype=dtype)
    assert report.ok, report


def test_an_average_keeps_its_dtype_under_autocast() -> None:
    """Eager's average pool is no autocast operation: it answers in its input's dtype, whatever the convolutions use."""
    x, transform = torch.randn(2, 4, 8, 8), Transform(torch.zeros(4), torch.ones(4), torch.zeros(4), "relu")
    with torch.autocast("cpu", torch.bfloat16):
        z, _ = ops.avg_pool(x, transform, PoolGeometry((3, 3), (1, 1), (1, 1)))
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, F.avg_pool2d(F.relu(x), 3, 1, 1))


def test_an_average_of_bfloat16_is_not_off_by_the_rounding_of_a_ninth() -> None:
    x = torch.full((1, 8, 6, 6), 1.5, dtype=torch.bfloat16)
    z, _ = ops.avg_pool(x, Transform(torch.zeros(8), torch.ones(8), torch.zeros(8)), PoolGeometry((3, 3), (1, 1), (0, 0)))
    assert torch.equal(z, torch.full((1, 8, 4, 4), 1.5, dtype=torch.bfloat16))


def test_the_wrong_arguments_of_an_average() -> None:
    x, transform = torch.randn(2, 4, 8, 8), Transform(torch.zeros(4), torch.ones(4), torch.zeros(4))
    window = PoolGeometry((3, 3), (1, 1), (1, 1))
    with pytest.raises(ValueError, match="silu"):
        ops.avg_pool(x, transform._replace(act="silu"), window)
    with pytest.raises(ValueError, match="ceil_mode"):
        ops.avg_pool(x, transform, window._replace(ceil_mode=True))
    with pytest.raises(RuntimeError, match="too small"):
        ops.avg_pool(x, transform, PoolGeometry((9, 9), (1, 1), (0, 0)))
