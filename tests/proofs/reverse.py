"""Gradients from definitions: reverse-mode differentiation of the algebra's expressions, with no formula of batch norm's in it.

What it knows: the product rule (sympy's), that a sum's gradient is the same at each of its terms, that the gradient at a linear map's
argument is the adjoint of that at its result, that an activation has a derivative, and that of x**(-1/2). Where the algebra does not spell
means and variances out, it knows their derivatives, too: 1 / M and 2 (x - mean) / M.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import sympy as sp
from algebra import Algebra, Level, expanded

__all__ = ["gradients"]


def gradients(
    algebra: Algebra, outputs: Sequence[tuple[sp.Expr, sp.Expr, Level, sp.Expr | None]], leaves: Sequence[sp.Symbol]
) -> dict[sp.Symbol, sp.Expr]:
    """The gradients at ``leaves`` of the sum of <seed, output> over ``outputs``, each (output, seed, their level, pixels an image has)."""
    found: defaultdict[sp.Symbol, sp.Expr] = defaultdict(lambda: sp.Integer(0))

    def spread(expression: sp.Expr, cofactor: sp.Expr, level: Level, space: sp.Expr | None) -> None:
        """Add to each atom of ``expression`` its share of the gradient ``cofactor`` at ``expression``, a tensor of ``level``."""
        for symbol in expression.free_symbols & algebra.atoms.keys():
            share = expanded(cofactor * sp.diff(expression, symbol))
            own = algebra.atoms[symbol].level
            if level is Level.PIXEL and own < Level.PIXEL and space is not None:
                share = algebra.sum_pixels(share, space)
            if level >= Level.IMAGE and own < Level.IMAGE:
                share = algebra.sum_images(share)
            found[symbol] += share

    for output, seed, level, space in outputs:
        spread(output, seed, level, space)
    while pending := [s for s in found if algebra.atoms[s].kind != "leaf"]:
        symbol = max(pending, key=lambda s: algebra.order[s])  # an atom is made after those that it is made of
        own = found.pop(symbol)
        atom = algebra.atoms[symbol]
        match atom.kind:
            case "pixels":
                spread(atom.arguments[0], own, Level.PIXEL, atom.data[0])
            case "images":
                spread(atom.arguments[0], own, Level.IMAGE, None)
            case "reciprocal root":
                spread(atom.arguments[0], -own * symbol**3 / 2, Level.CHANNEL, None)
            case "maximum":
                x = atom.arguments[0]
                spread(x, algebra.scattered(x, own, *atom.data, algebra.space(x)), Level.PIXEL, algebra.space(x))
            case "mean":
                spread(atom.arguments[0], own / atom.data[0], Level.PIXEL, algebra.space(atom.arguments[0]))
            case "variance":
                count, mean = atom.data
                slope = 2 * own / count * (atom.arguments[0] - mean)
                spread(atom.arguments[0], expanded(slope), Level.PIXEL, algebra.space(atom.arguments[0]))
            case "activation":
                u = atom.arguments[0]
                spread(u, algebra.chain_rule(own, atom.data[0], u), atom.level, atom.space)
            case "convolution":
                weight, z = atom.arguments
                spread(z, algebra.convolution_transposed(weight, own, *atom.data, algebra.space(z)), Level.PIXEL, algebra.space(z))
                spread(weight, algebra.weight_gradient(own, z, *atom.data), Level.WEIGHT, None)
            case _:
                raise AssertionError(f"no derivative of {atom.kind}")
    return {leaf: found[leaf] for leaf in leaves}
