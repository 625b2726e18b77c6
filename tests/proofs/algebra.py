"""Exact algebra over tensors of no particular size: what a proof's expressions are made of.

A tensor [N, C, *spatial] is one sympy polynomial, the value at a pixel, for all of its channels at once. Its symbols are *atoms*, each of a
level: a number, or one value for a channel, an image of a channel, a pixel, or a convolution's weight. Sums over pixels and images, and
convolutions, are linear and otherwise unknown: their result on a monomial is an atom of its own, made once for each monomial
(so that equal things are the same symbol). No axiom but linearity is used, and for sums that what does not depend on the pixel comes out.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import reduce
from math import gcd

import sympy as sp

__all__ = ["HOMOGENEOUS", "Algebra", "Atom", "Level", "NotProved", "expanded"]

#: Activations with act(k * u) = k * act(u) for k > 0.
HOMOGENEOUS = ("relu", "leaky_relu")


class NotProved(AssertionError):
    """The claim is false, or a program does what the algebra has no words for."""


class Level(IntEnum):
    """What an expression depends on; each level includes those before it, but for a weight's, which meets numbers only."""

    NUMBER = 0
    CHANNEL = 1
    IMAGE = 2
    PIXEL = 3
    WEIGHT = 4


def expanded(expression: sp.Expr) -> sp.Expr:
    """Multiplied out: a sum of monomials, which is the same for equal expressions."""
    return sp.expand(expression, mul=True, multinomial=True, power_base=False, power_exp=False, log=False, basic=False)


@dataclass(frozen=True)
class Atom:
    """What a symbol stands for: ``kind`` of ``arguments`` (expressions) and ``data`` (anything else that tells it from others)."""

    kind: str
    level: Level
    arguments: tuple[sp.Expr, ...] = ()
    data: tuple[Hashable, ...] = ()
    space: sp.Expr | None = None  # of a pixel's: how many pixels an image has


class Algebra:
    """A table of atoms; expressions of different tables must not meet. ``images`` is the number of images, N.

    ``defined``: means and variances are spelt out as sums. Otherwise they are atoms, whose derivatives are those that were proved of the
    spelt-out ones (test_nodes.py): expressions of whole models stay small.
    """

    def __init__(self, defined: bool = True) -> None:
        self.defined = defined
        self.images = sp.Symbol("N", positive=True)
        self.atoms: dict[sp.Symbol, Atom] = {}
        self.order: dict[sp.Symbol, int] = {}
        self._of: dict[Atom, sp.Symbol] = {}

    def atom(self, atom: Atom, name: str) -> sp.Symbol:
        """The symbol of this atom: the same for an equal one."""
        if atom not in self._of:
            symbol = sp.Symbol(f"{name}{len(self.atoms)}" if atom.kind != "leaf" else name)
            assert symbol not in self.atoms, name
            self.order[symbol] = len(self.order)
            self._of[atom] = symbol
            self.atoms[symbol] = atom
        return self._of[atom]

    def leaf(self, name: str, level: Level, space: sp.Expr | None = None) -> sp.Symbol:
        """An unknown."""
        return self.atom(Atom("leaf", level, data=(name,), space=space), name)

    def level(self, expression: sp.Expr) -> Level:
        """The highest level of the expression's atoms."""
        return max((self.atoms[s].level for s in expression.free_symbols if s in self.atoms), default=Level.NUMBER)

    def space(self, *expressions: sp.Expr) -> sp.Expr | None:
        """How many pixels an image has where these are tensors; they must agree. None where none of them is."""
        symbols = {s for e in expressions for s in e.free_symbols if s in self.atoms}
        found = {self.atoms[s].space for s in symbols if self.atoms[s].level is Level.PIXEL}
        if len(found) > 1:
            raise NotProved(f"tensors of different sizes in {expressions}")
        return next(iter(found), None)

    def terms(self, expression: sp.Expr, inner: Level) -> Iterator[tuple[sp.Expr, sp.Expr]]:
        """(factor below level ``inner``, monomial of atoms from ``inner`` up) of each term of an expression that is multiplied out."""
        for term in sp.Add.make_args(expression):
            outside, inside = sp.Integer(1), sp.Integer(1)
            for factor in sp.Mul.make_args(term):
                if self.level(factor) >= inner:
                    if factor.as_base_exp()[0] not in self.atoms:
                        raise NotProved(f"{factor} is no power of an atom")
                    inside *= factor
                else:
                    outside *= factor
            if outside != 0:
                yield outside, inside

    def sum_pixels(self, expression: sp.Expr, space: sp.Expr) -> sp.Expr:
        """Sum over the pixels of each image."""
        return self._sum(expression, Level.PIXEL, space, Level.IMAGE, "pixels")

    def sum_images(self, expression: sp.Expr) -> sp.Expr:
        """Sum over the images of something that is one value an image."""
        if self.level(expression) > Level.IMAGE:
            raise NotProved(f"a sum over images of single pixels: {expression}")
        return self._sum(expression, Level.IMAGE, self.images, Level.CHANNEL, "images")

    def sum_batch(self, expression: sp.Expr, space: sp.Expr | None) -> sp.Expr:
        """Sum over all but the channels; ``space`` None: images have one pixel."""
        return self.sum_images(expression if space is None else self.sum_pixels(expression, space))

    def _sum(self, expression: sp.Expr, inner: Level, count: sp.Expr, outer: Level, kind: str) -> sp.Expr:
        return sp.Add(*(
            factor * (count if monomial == 1 else self.atom(Atom(kind, outer, (monomial,), (count,)), kind[0]))
            for factor, monomial in self.terms(expression, inner)
        ))  # fmt: skip

    def convolution(self, weight: sp.Expr, z: sp.Expr, part: Hashable, geometry: Hashable, space: sp.Expr | None) -> sp.Expr:
        """What the channels ``part`` of a convolution's input bring to its output; ``space`` is the output's (None: one pixel)."""
        return self._bilinear("convolution", Level.IMAGE if space is None else Level.PIXEL, (weight, z), (part, geometry), space)

    def convolution_transposed(
        self, weight: sp.Expr, d: sp.Expr, part: Hashable, geometry: Hashable, space: sp.Expr | None
    ) -> sp.Expr:
        """The adjoint of :meth:`convolution`: from output gradient ``d`` to that of the channels ``part`` of the input, of ``space``."""
        return self._bilinear("transposed", Level.IMAGE if space is None else Level.PIXEL, (weight, d), (part, geometry), space)

    def weight_gradient(self, d: sp.Expr, z: sp.Expr, part: Hashable, geometry: Hashable) -> sp.Expr:
        """The adjoint of :meth:`convolution` in its weight."""
        return self._bilinear("weight gradient", Level.WEIGHT, (d, z), (part, geometry), None)

    def _bilinear(
        self, kind: str, level: Level, operands: tuple[sp.Expr, sp.Expr], data: tuple[Hashable, ...], space: sp.Expr | None
    ) -> sp.Expr:
        """An unknown bilinear map of expressions that are multiplied out. Numbers come out of it: the proofs use no other linearity."""
        (left, a), (right, b) = (_content(e) for e in operands)
        return left * right * self.atom(Atom(kind, level, (a, b), data, space), kind[0]) if left and right else sp.Integer(0)

    def maximum(self, x: sp.Expr, window: Hashable, space: sp.Expr | None) -> sp.Expr:
        """The largest of each window of x: an unknown function of all of x."""
        return self.atom(Atom("maximum", Level.PIXEL, (x,), (window,), space), "y")

    def scattered(self, x: sp.Expr, d: sp.Expr, window: Hashable, space: sp.Expr | None) -> sp.Expr:
        """``d`` carried back to where the maxima of x's windows lie: linear in d, and the gradient of :meth:`maximum`."""
        factor, d = _content(d)
        return factor * self.atom(Atom("scattered", Level.PIXEL, (x, d), (window,), space), "g") if factor else factor

    def mean(self, x: sp.Expr, space: sp.Expr | None) -> sp.Expr:
        """The mean over all but the channels."""
        count = self.images if space is None else self.images * space
        if self.defined:
            return expanded(self.sum_batch(x, space) / count)
        return self.atom(Atom("mean", Level.CHANNEL, (x,), (count,)), "m")

    def variance(self, x: sp.Expr, space: sp.Expr | None) -> sp.Expr:
        """The mean of the squared distances from the mean."""
        count = self.images if space is None else self.images * space
        if self.defined:
            return expanded(self.sum_batch(expanded((x - self.mean(x, space)) ** 2), space) / count)
        return self.atom(Atom("variance", Level.CHANNEL, (x,), (count, self.mean(x, space))), "v")

    def reciprocal_root(self, base: sp.Expr) -> sp.Expr:
        """1 / sqrt(base), of one value a channel."""
        return self.atom(Atom("reciprocal root", Level.CHANNEL, (base,)), "r")

    def activation(self, name: str, u: sp.Expr) -> sp.Expr:
        """An unknown function of u; homogeneous where the name is one of :data:`HOMOGENEOUS`. relu(relu(v)) is relu(v)."""
        factor, u = self._primitive(name, u)
        if factor == 0 or self._is_result_of("relu", name, u):
            return factor * u
        return factor * self.atom(Atom("activation", self.level(u), (u,), (name,), self.space(u)), "z")

    def derivative(self, name: str, u: sp.Expr) -> sp.Expr:
        """The derivative of :meth:`activation` at u. relu'(relu(v)) is relu'(v)."""
        _, u = self._primitive(name, u)
        if self._is_result_of("relu", name, u):
            u = self.atoms[u].arguments[0]
        return self.atom(Atom("derivative", self.level(u), (u,), (name,), self.space(u)), "q")

    def chain_rule(self, gradient: sp.Expr, name: str, u: sp.Expr) -> sp.Expr:
        """``gradient`` times the derivative at u; relu's is 0 or 1, so that its square is itself."""
        slope = self.derivative(name, u)
        product = expanded(gradient * slope)
        return product.subs(slope**2, slope) if name == "relu" else product

    def _is_result_of(self, wanted: str, name: str, u: sp.Expr) -> bool:
        atom = self.atoms.get(u)
        return name == wanted and atom is not None and (atom.kind, atom.data) == ("activation", (name,))

    def _primitive(self, name: str, u: sp.Expr) -> tuple[sp.Expr, sp.Expr]:
        """A positive number and what is left of u, where the activation lets it out."""
        if not name.startswith(HOMOGENEOUS):
            return sp.Integer(1), u
        factor, u = _content(u)
        return (factor, u) if factor >= 0 else (-factor, -u)

    def is_zero(self, expression: sp.Expr) -> bool:
        """Whether the expression is 0 whatever its atoms are."""
        rest = expanded(expression)
        return bool(rest == 0 or expanded(sp.together(rest).as_numer_denom()[0]) == 0)

    def explained(self, expression: sp.Expr) -> str:
        """The expression with what its symbols stand for, one a line: for whoever reads why a proof failed."""
        lines, seen = [str(expression)], set()
        waiting = sorted(expression.free_symbols, key=str)
        while waiting:
            symbol = waiting.pop(0)
            if symbol in seen or symbol not in self.atoms or self.atoms[symbol].kind == "leaf":
                continue
            seen.add(symbol)
            atom = self.atoms[symbol]
            lines.append(f"  {symbol} = {atom.kind}{atom.data or ''} of {', '.join(map(str, atom.arguments))}")
            waiting += sorted({s for e in atom.arguments for s in e.free_symbols}, key=str)
        return "\n".join(lines[:40])



def _content(expression: sp.Expr) -> tuple[sp.Rational, sp.Expr]:
    """A number and an expression without a common factor of its coefficients, the first of them positive; their product is what came."""
    if expression == 0:
        return sp.Integer(0), expression
    terms = sorted((term.as_coeff_Mul() for term in sp.Add.make_args(expression)), key=lambda term: sp.default_sort_key(term[1]))
    numbers = [number for number, _ in terms]
    content = sp.Rational(reduce(gcd, (abs(n.p) for n in numbers)), reduce(sp.ilcm, (n.q for n in numbers)))
    if numbers[0] < 0:
        content = -content
    return content, sp.Add(*(number / content * monomial for number, monomial in terms))
