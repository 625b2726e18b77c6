"""An expression of the algebra on real tensors: what every atom means to PyTorch."""

from __future__ import annotations

from typing import Any

import sympy as sp
import torch
from algebra import Algebra, Level
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Evaluation"]

_FUNCTIONS: dict[str, Any] = {"relu": F.relu, "silu": F.silu, "sigmoid": torch.sigmoid, "gelu": F.gelu, "tanh": torch.tanh}


class Evaluation:
    """``leaves``: tensors for the algebra's unknowns, [C] viewed as [1, C, 1, 1]; ``numbers``: values for N and sizes of images."""

    def __init__(self, algebra: Algebra, leaves: dict[str, Tensor], numbers: dict[sp.Symbol, float]) -> None:
        self.algebra, self.leaves, self.numbers = algebra, leaves, numbers
        self._found: dict[sp.Symbol, Any] = {}

    def __call__(self, expression: sp.Expr) -> Any:
        """The value: [N, C, H, W], or with sizes of 1 where it does not depend on them; a weight's shape for a weight's."""
        total: Any = 0
        for term in sp.Add.make_args(expression):
            product: Any = 1.0
            for factor in sp.Mul.make_args(term):
                base, exponent = factor.as_base_exp()
                product = product * self._value(base) ** float(exponent)
            total = total + product
        return total

    def _value(self, base: sp.Expr) -> Any:
        if base not in self.algebra.atoms:
            return float(base.subs(self.numbers))
        if base not in self._found:
            self._found[base] = self._atom(base)
        return self._found[base]

    def _atom(self, symbol: sp.Symbol) -> Any:
        atom = self.algebra.atoms[symbol]
        of = atom.arguments
        match atom.kind:
            case "leaf":
                return self.leaves[str(symbol)]
            case "pixels":
                return self(of[0]).sum((2, 3), keepdim=True)
            case "images":
                return self(of[0]).sum(0, keepdim=True)
            case "mean":
                return self(of[0]).mean((0, 2, 3), keepdim=True)
            case "variance":
                return self(of[0]).var((0, 2, 3), correction=0, keepdim=True)
            case "reciprocal root":
                return self(of[0]).rsqrt()
            case "activation":
                return _FUNCTIONS[atom.data[0]](self(of[0]))  # type: ignore[index]
            case "derivative":
                u = self(of[0]).detach().requires_grad_()
                return torch.autograd.grad(_FUNCTIONS[atom.data[0]](u).sum(), u)[0]  # type: ignore[index]
            case "convolution":
                return self._convolve(self(of[1]), self(of[0]), atom.data)
            case "transposed":
                x = torch.zeros(self._input_of(self(of[1]), self(of[0]), atom), dtype=torch.float64, requires_grad=True)
                return torch.autograd.grad(self._convolve(x, self(of[0]), atom.data), x, self(of[1]))[0]
            case "weight gradient":
                d, z = self(of[0]), self(of[1])
                weight = torch.zeros(self.weights[atom.data[1]], dtype=torch.float64, requires_grad=True)
                return torch.autograd.grad(self._convolve(z, weight, atom.data), weight, d)[0]
            case "maximum":
                kernel, stride, padding, rounds_up = atom.data[0]  # type: ignore[misc]
                return F.max_pool2d(self(of[0]), kernel, stride, padding, ceil_mode=rounds_up)
            case "scattered":
                x = self(of[0]).detach().requires_grad_()
                kernel, stride, padding, rounds_up = atom.data[0]  # type: ignore[misc]
                return torch.autograd.grad(F.max_pool2d(x, kernel, stride, padding, ceil_mode=rounds_up), x, self(of[1]))[0]
        raise AssertionError(atom.kind)

    @property
    def weights(self) -> dict[Any, tuple[int, ...]]:
        """Each convolution's weight's shape, by its geometry."""
        atoms = self.algebra.atoms.values()
        named = {a.data[1]: str(a.arguments[0]) for a in atoms if a.kind == "convolution"}
        return {geometry: tuple(self.leaves[name].shape) for geometry, name in named.items()}

    def _convolve(self, x: Tensor, weight: Tensor, data: Any) -> Tensor:
        (first, last), (_, stride, padding, dilation, groups) = data
        return F.conv2d(x, weight[:, first:last] if groups == 1 else weight, None, stride, padding, dilation, groups)

    def _input_of(self, d: Tensor, weight: Tensor, atom: Any) -> tuple[int, ...]:
        """The shape of the input that the output gradient ``d`` leads to."""
        (first, last), _ = atom.data
        pixels = int(atom.space.subs(self.numbers))
        height, width = next(size for size in self.sizes if size[0] * size[1] == pixels)
        return d.shape[0], last - first, height, width

    #: The sizes of images that occur.
    sizes: tuple[tuple[int, int], ...] = ()
    level = Level
