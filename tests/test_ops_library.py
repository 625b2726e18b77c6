"""The registered operators: schema, fake function and autograd agree with what runs; torch.compile sees through them in one graph."""

from __future__ import annotations

import pytest
import torch

from bnrestructure import ops
from bnrestructure.core.edges import ConvGeometry, PoolGeometry, Transform
from bnrestructure.ops import library


def _tensors() -> tuple[torch.Tensor, ...]:
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    vectors = [torch.randn(4, requires_grad=True) for _ in range(3)]
    return (x, *vectors, torch.randn(5, 4, 3, 3, requires_grad=True))


#: Kernels that make several sums in one allocation hand out parts of it, which an operator may not.
_BACKENDS = ["reference", "cpu"]


@pytest.mark.parametrize("backend", _BACKENDS)
@pytest.mark.parametrize(("prologue", "statistics", "stride"), [(True, True, 1), (False, False, 2), (True, False, 2)])
def test_conv_operator_is_registered_consistently(prologue: bool, statistics: bool, stride: int, backend: str) -> None:
    x, mean, scale, beta, weight = _tensors()
    vectors = (mean, scale, beta, "relu") if prologue else (None, None, None, "identity")
    bias = None if prologue else torch.randn(5, requires_grad=True)
    geometry = ConvGeometry((stride, stride), (1, 1), (1, 1), 1)
    arguments = (x, *vectors, None, weight, bias, geometry.flat, statistics, torch.float32, backend)
    assert set(torch.library.opcheck(library.conv, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", _BACKENDS)
def test_a_bias_gradient_has_the_dtype_that_its_fake_promises(backend: str) -> None:
    x, mean, scale, beta, weight = (t.detach() for t in _tensors())
    x, weight, dy = x.bfloat16(), weight.bfloat16(), torch.randn(2, 5, 6, 6).bfloat16()
    geometry = ConvGeometry((1, 1), (1, 1), (1, 1), 1)
    arguments = (dy, [], x, [mean, scale, beta], "relu", None, weight, geometry.flat, torch.bfloat16, True, backend)
    assert set(torch.library.opcheck(library.conv_backward, arguments).values()) == {"SUCCESS"}
    *_, dbias = library.conv_backward(*arguments)
    assert dbias.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", _BACKENDS)
def test_sweep_operators_are_registered_consistently(backend: str) -> None:
    x, mean, scale, beta, _ = _tensors()
    assert set(torch.library.opcheck(library.statistics, (x, backend)).values()) == {"SUCCESS"}
    assert set(torch.library.opcheck(library.normalise, (x, mean, scale, beta, "silu", backend)).values()) == {"SUCCESS"}


def test_nodes_compile_in_one_graph_and_agree_with_eager() -> None:
    x, *_, weight = _tensors()
    second = torch.randn(3, 5, 1, 1, requires_grad=True)

    def step(x: torch.Tensor) -> torch.Tensor:
        first = ops.conv(x, Transform(), weight, None, ConvGeometry((1, 1), (1, 1), (1, 1), 1), statistics=True, backend="reference")
        assert first.mean is not None
        assert first.var is not None
        scale = torch.rsqrt(first.var + 1e-5)
        transform = Transform(first.mean, scale, -first.mean, "relu")
        return ops.conv(first.y, transform, second, None, ConvGeometry((1, 1), (0, 0), (1, 1), 1), backend="reference").y

    expected = step(x)
    wanted = torch.autograd.grad(expected.square().sum(), [x, weight, second])
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(got, expected)
    found = torch.autograd.grad(got.square().sum(), [x, weight, second])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_an_average_pool_compiles_in_one_graph_and_agrees_with_eager() -> None:
    x, mean, scale, beta, _ = _tensors()

    def step(x: torch.Tensor) -> torch.Tensor:
        return ops.avg_pool(x, Transform(mean, scale, beta, "relu"), PoolGeometry((3, 3), (2, 2), (1, 1)), backend="reference")[0]

    expected = step(x)
    wanted = torch.autograd.grad(expected.square().sum(), [x, mean, scale, beta])
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(got, expected)
    found = torch.autograd.grad(got.square().sum(), [x, mean, scale, beta])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
