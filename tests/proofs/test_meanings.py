"""What the algebra takes PyTorch's operators for, on numbers: expressions and their gradients equal PyTorch's own, in float64.

And the activations: that the derivative which the project names is that of the function which it names.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy as sp
import torch
from algebra import Level
from evaluation import Evaluation
from prove import EPS, IMAGES, symbolic
from reverse import gradients
from torch import Tensor
from torch.nn import functional as F

from bnrestructure.core.activation import PLAIN_ACTIVATIONS, activate, activation_gradient

#: Unknowns of a program, with the sizes of a tensor that stands for each.
SHAPES = {"x": (3, 4, 7, 6), "w": (5, 4, 3, 3), "v": (2, 5, 3, 3), "gamma": (5,), "beta": (5,)}


def chain(x: Tensor, w: Tensor, v: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Everything at once: convolutions, batch norm, a max pool, a gate, an average."""
    y = F.conv2d(x, w, padding=1)
    z = F.relu(F.batch_norm(y, None, None, gamma, beta, True, 0.0, EPS))
    z = F.max_pool2d(z, 3, 1, 1)
    z = F.silu(z) * torch.sigmoid(z.mean((2, 3))).view(*z.shape[:2], 1, 1)
    var, mean = torch.var_mean(z, (0, 2, 3), correction=0)
    return F.conv2d((z - mean.view(1, -1, 1, 1)) * torch.rsqrt(var + 0.5).view(1, -1, 1, 1), v, stride=2, padding=1)


@pytest.mark.parametrize("defined", [True, False], ids=["sums", "atoms"])
def test_expressions_are_what_pytorch_computes(defined: bool) -> None:
    size = (101, 109)
    s = symbolic(defined=defined)
    with s.running(), torch.no_grad():
        shapes = {n: (IMAGES, *shape[1:2], *size) if n == "x" else shape for n, shape in SHAPES.items()}
        inputs = [s.tensor(name, *shape) for name, shape in shapes.items()]
        output = chain(*inputs)
        expression = s.expression(output)
        space = s.space(output.shape)
        seed = s.algebra.leaf("P", Level.PIXEL, space)
    found = gradients(s.algebra, [(expression, seed, Level.PIXEL, space)], [s.expression(x) for x in inputs])

    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for n, shape in SHAPES.items()}
    expected = chain(*tensors.values())
    p = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    leaves = {n: t.detach().view(1, -1, 1, 1) if t.dim() == 1 else t.detach() for n, t in tensors.items()} | {"P": p}
    numbers: dict[sp.Symbol, float] = {s.algebra.images: 3, s.space((0, 0, *size)): 42, space: 12, sp.Symbol("eps", positive=True): EPS}
    evaluate = Evaluation(s.algebra, leaves, numbers)
    evaluate.sizes = ((7, 6), (4, 3))
    torch.testing.assert_close(evaluate(expression), expected.detach(), rtol=1e-11, atol=1e-11)
    for (name, tensor), gradient in zip(tensors.items(), torch.autograd.grad(expected, list(tensors.values()), p), strict=True):
        value = evaluate(found[sp.Symbol(name)])
        torch.testing.assert_close(value.reshape(tensor.shape), gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("act", [*PLAIN_ACTIVATIONS, "leaky_relu(0.2)", "leaky_relu(-0.5)"])
def test_derivative_of_an_activation(act: str) -> None:
    """``activation_gradient`` is PyTorch's derivative of ``activate``, kinks included."""
    special = torch.tensor([0.0, -0.0, 3.0, -3.0, 6.0, 1e30, -1e30], dtype=torch.float64)
    u = torch.cat([torch.linspace(-8, 8, 4001, dtype=torch.float64), special]).requires_grad_()
    g = torch.linspace(-2, 3, u.numel(), dtype=torch.float64)
    expected = torch.autograd.grad(activate(u, act), u, g)[0]
    assert torch.equal(activation_gradient(g, u.detach(), act), expected)


U = sp.Symbol("u", real=True)
SMOOTH: dict[str, Callable[[sp.Symbol], sp.Expr]] = {
    "silu": lambda u: u / (1 + sp.exp(-u)),
    "gelu": lambda u: u * (1 + sp.erf(u / sp.sqrt(2))) / 2,
    "gelu_tanh": lambda u: u / 2 * (1 + sp.tanh(sp.sqrt(2 / sp.pi) * (u + sp.Rational("0.044715") * u**3))),
}


@pytest.mark.parametrize("act", SMOOTH)
def test_derivative_of_a_definition(act: str) -> None:
    """The smooth activations against sympy's derivative of their definitions."""
    points = torch.linspace(-6, 6, 41, dtype=torch.float64)
    slope = sp.lambdify(U, sp.diff(SMOOTH[act](U), U), "mpmath")
    expected = torch.tensor([float(slope(float(u))) for u in points], dtype=torch.float64)
    torch.testing.assert_close(activation_gradient(torch.ones_like(points), points, act), expected, rtol=1e-12, atol=1e-14)
