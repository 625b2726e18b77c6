"""Squeeze-excite whatever reads the product: in every common spelling, with a gate of any shape and dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from equivalence import assert_same_training
from pass_tools import after
from torch import Tensor, nn
from torch.nn import functional as F

import bnrestructure
from bnrestructure import ops
from bnrestructure.core.edges import ConvGeometry, Transform
from bnrestructure.graph.ir import Normalise, Residual, Squeeze
from bnrestructure.passes.pipeline import PASSES

Gated = Callable[["_Block", Tensor], Tensor]


class _Block(nn.Module):
    """conv-bn-relu-conv-bn, gated, and what ``reader`` makes of the product and of the block's input."""

    def __init__(self, gated: Gated, reader: Callable[[_Block, Tensor, Tensor], Tensor], channels: int = 8) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(channels, 4, bias=False), nn.ReLU(inplace=True), nn.Linear(4, channels, bias=False))
        self.squeeze, self.spread, self.single = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1), nn.Conv2d(channels, 1, 1)
        self.last = nn.Conv2d(channels, 5, 1)
        self.gated, self.reader = gated, reader
        for vector in (self.bn1.weight, self.bn1.bias, self.bn2.weight, self.bn2.bias):
            nn.init.uniform_(vector, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return self.reader(self, self.gated(self, self.bn2(self.conv2(y))), x)


def _classic(m: _Block, z: Tensor) -> Tensor:
    """The squeeze-excite of a hundred repositories."""
    b, c, _, _ = z.size()
    gate = torch.sigmoid(m.fc(m.pool(z).view(b, c))).view(b, c, 1, 1)
    return z * gate.expand_as(z)


def _dropping(m: _Block, z: Tensor) -> Tensor:
    return torch.sigmoid(m.fc(z.mean((2, 3))))[:, :, None, None] * z


def _convolutions(m: _Block, z: Tensor) -> Tensor:
    return z.mul_(F.hardsigmoid(m.spread(F.silu(m.squeeze(z.mean((2, 3), keepdim=True))))))


SPELLINGS: dict[str, Gated] = {"expand_as": _classic, "dropped dimensions": _dropping, "convolutions": _convolutions}
READERS: dict[str, Callable[[_Block, Tensor, Tensor], Tensor]] = {
    "a residual": lambda m, p, x: F.relu(p + x),
    "an activation and a convolution": lambda m, p, x: m.last(F.relu6(p)),
    "a convolution": lambda m, p, x: m.last(p),
    "two convolutions": lambda m, p, x: m.last(p) + m.last(p * 2.0),
    "the caller": lambda m, p, x: p,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_normalised_tensor_is_not_kept(spelling: str, reader: str) -> None:
    model = _Block(SPELLINGS[spelling], READERS[reader]).double()
    graph = after(model, *PASSES).graph
    assert [squeeze.excite for squeeze in Squeeze.every(graph)] == [True]
    assert all(normalise.gate is not None for normalise in Normalise.every(graph))
    assert len(Normalise.every(graph)) == (reader not in ("a convolution", "a residual"))
    assert [residual.gate is not None for residual in Residual.every(graph)] == ([True] if reader == "a residual" else [])
    assert_same_training(model, torch.randn(4, 8, 9, 7, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_on_the_cpu_kernels(spelling: str, dtype: torch.dtype) -> None:
    """Where kernels answer: the product is one sweep's, and right to the dtype's precision."""
    model = _Block(SPELLINGS[spelling], READERS["a residual"], channels=24).to(dtype).train()
    x = torch.randn(4, 24, 17, 13, dtype=dtype)
    exact, rewritten = copy.deepcopy(model).double(), bnrestructure.restructure(copy.deepcopy(model), backend="cpu")
    found = []
    for m in (exact, model, rewritten):
        y = m(x.to(next(m.parameters()).dtype))
        y.double().square().mean().backward()
        found.append([y, *(p.grad for p in m.parameters() if p.grad is not None)])
    for truth, eager, ours in zip(*found, strict=True):
        scale = truth.abs().max()
        error, own = ((t.double() - truth).abs().max() / scale for t in (ours, eager))
        assert error <= max(3 * own, 2e-6 if dtype is torch.float32 else 2e-2)


#: Gates made of the average that are no numbers in its dtype, or not one a channel of each image.
ODD: dict[str, Callable[[_Block, Tensor, Tensor], Tensor]] = {
    "one number an image": lambda m, z, a: torch.sigmoid(m.single(a)),
    "one number": lambda m, z, a: a.mean(),
    "one a channel": lambda m, z, a: a.mean(0, keepdim=True),
    "one a pixel": lambda m, z, a: m.squeeze(a).mean(1, keepdim=True) + torch.arange(z.shape[3], dtype=a.dtype),
    "one a place": lambda m, z, a: a * torch.arange(z.shape[3], dtype=a.dtype),
    "another dtype": lambda m, z, a: a.float().sigmoid() if a.dtype is torch.float64 else a.double().sigmoid(),
    "truth": lambda m, z, a: a > 0.0,
    "whole numbers": lambda m, z, a: (a * 4).round().long(),
}


@pytest.mark.parametrize("reader", ["a residual", "a convolution"])
@pytest.mark.parametrize("gate", ODD)
def test_gates_of_any_shape(gate: str, reader: str) -> None:
    """The plan says "fused" of those alone that kernels apply."""
    model = _Block(lambda m, z: z * ODD[gate](m, z, m.pool(z)), READERS[reader]).double()
    excites = any(squeeze.excite for squeeze in Squeeze.every(after(model, *PASSES).graph))
    assert excites == (gate in ("another dtype", "truth", "whole numbers"))
    x = torch.randn(4, 8, 9, 7, dtype=torch.float64)
    assert_same_training(model, x)
    (site,) = [site for site in bnrestructure.explain(model, x).sites if site.name == "bn2"]
    assert site.status == ("fused" if excites else "partial")


@pytest.mark.parametrize("shape", [(4, 8, 1, 1), (4, 1, 1, 1), (1, 8, 1, 1), (), (4, 8, 9, 7), (9, 1)], ids=str)
@pytest.mark.parametrize("reader", ["normalise", "conv"])
def test_the_nodes_take_a_gate_of_any_shape(reader: str, shape: tuple[int, ...]) -> None:
    """A captured graph may meet another gate than the one that it was captured with."""
    x, gate = torch.randn(4, 8, 9, 7, dtype=torch.float64), torch.rand(shape, dtype=torch.float64)
    mean, scale, beta = torch.randn(3, 8, dtype=torch.float64).unbind()
    weight = torch.randn(5, 8, 1, 1, dtype=torch.float64)

    def plain(x: Tensor, gate: Tensor) -> Tensor:
        z = F.silu((x - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + beta.view(-1, 1, 1))
        product = z * (gate * z.mean((2, 3), keepdim=True).sigmoid().mean())
        return product if reader == "normalise" else F.conv2d(product, weight)

    def fused(x: Tensor, gate: Tensor) -> Tensor:
        transform = Transform(mean, scale, beta, "silu")
        pooled, z = ops.squeeze(x, transform, excite=True, backend="reference")
        transform = transform._replace(gate=gate * pooled.sigmoid().mean())
        if reader == "normalise":
            return ops.normalise(z, transform, backend="reference").z
        return ops.conv(z, transform, weight, None, ConvGeometry((1, 1), (0, 0), (1, 1), 1), backend="reference").y

    found = []
    for function in (plain, fused):
        inputs = [x.clone().requires_grad_(), gate.clone().requires_grad_()]
        y = function(*inputs)
        found.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(4, 8, 1, 1), (4, 1, 1, 1), (1, 8, 1, 1), (), (4, 8, 9, 7), (9, 1)], ids=str)
@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("normalised", [False, True], ids=["shortcut", "normalised shortcut"])
@pytest.mark.parametrize("reader", ["sum", "convolution of the sum"])
def test_a_join_takes_a_gate_of_any_shape(reader: str, normalised: bool, act: str, shape: tuple[int, ...]) -> None:
    x, r = torch.randn(2, 4, 8, 9, 7, dtype=torch.float64).unbind()
    gate, weight = torch.rand(shape, dtype=torch.float64), torch.randn(5, 8, 1, 1, dtype=torch.float64)
    of_x, of_r = torch.randn(2, 3, 8, dtype=torch.float64).unbind()

    def affine(x: Tensor, vectors: Tensor) -> Tensor:
        mean, scale, beta = vectors.view(3, -1, 1, 1)
        return (x - mean) * scale + beta

    def plain(x: Tensor, r: Tensor, gate: Tensor) -> Tensor:
        z = affine(x, of_x)
        shortcut = affine(r, of_r) if normalised else r
        joined = getattr(F, act)(z * (gate * z.mean((2, 3), keepdim=True).sigmoid().mean()) + shortcut)
        return joined if reader == "sum" else F.conv2d(joined, weight)

    def fused(x: Tensor, r: Tensor, gate: Tensor) -> Tensor:
        transform = Transform(*of_x.unbind())
        pooled, z = ops.squeeze(x, transform, excite=True, backend="reference")
        transform = transform._replace(act=act, gate=gate * pooled.sigmoid().mean())
        vectors = of_r.unbind() if normalised else (None, None, None)
        if reader == "sum":
            return ops.residual(z, transform, r, Transform(*vectors), act=act, backend="reference").out
        geometry, shortcut = ConvGeometry((1, 1), (0, 0), (1, 1), 1), ops.Shortcut(r, *vectors)
        return ops.conv(z, transform, weight, None, geometry, shortcut=shortcut, backend="reference").y

    found = []
    for function in (plain, fused):
        inputs = [t.clone().requires_grad_() for t in (x, r, gate)]
        y = function(*inputs)
        found.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


def test_a_wider_gate_widens_the_product() -> None:
    """As eager's product of float32 and float64: what reads it is of that dtype, too."""
    model = _Block(lambda m, z: z * m.pool(z).double().sigmoid(), READERS["the caller"]).train()
    x = torch.randn(4, 8, 9, 7)
    plain = model(x)
    found = bnrestructure.restructure(copy.deepcopy(model), backend="reference")(x)
    assert found.dtype is plain.dtype is torch.float64
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)


REFUSED: dict[str, Gated] = {
    "a product before its average": lambda m, z: (p := z * 2.0 * m.spread.bias.view(1, -1, 1, 1)) + z.mean((2, 3), keepdim=True) * p,
    "another reader": lambda m, z: z * m.pool(z).sigmoid() + z,
    "a gate of the tensor itself": lambda m, z: z * (m.pool(z) + z),
    "its square": lambda m, z: z * z + m.pool(z),
    "an expanded gate that others read": lambda m, z: (g := m.pool(z).sigmoid().expand_as(z)) * z + g,
}


@pytest.mark.parametrize("gated", REFUSED)
def test_no_squeeze_excite(gated: str) -> None:
    model = _Block(REFUSED[gated], READERS["a residual"]).double()
    assert not any(squeeze.excite for squeeze in Squeeze.every(after(model, *PASSES).graph))
    assert_same_training(model, torch.randn(4, 8, 9, 7, dtype=torch.float64))
