"""Statistics from parts: Chan's formula for any partition, and the same across ranks with its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import sympy as sp
import torch
from algebra import Level, NotProved, expanded
from prove import edited, planted
from reverse import gradients
from symbolic import Symbolic
from torch import Tensor
from torch import distributed as dist

from bnrestructure.ops.synchronise import synchronise


def merged(one: tuple[sp.Expr, ...], two: tuple[sp.Expr, ...]) -> tuple[sp.Expr, ...]:
    """Chan's formula: (count, mean, M2) of two disjoint sets of values together."""
    (n, mean, m2), (k, other, more) = one, two
    distance = other - mean
    return n + k, mean + distance * k / (n + k), m2 + more + distance**2 * n * k / (n + k)


def sums(part: tuple[sp.Expr, ...]) -> tuple[sp.Expr, ...]:
    """(count, sum, sum of squares) of the values of which (count, mean, M2) are given."""
    n, mean, m2 = part
    return n, n * mean, m2 + n * mean**2


def test_merging_adds_sums() -> None:
    """The sums of a merged pair are the pair's sums added, and sums determine mean and M2: so any partition, merged in any order, gives
    the statistics of all values.
    """
    one, two = (sp.symbols(f"n{i} mean{i} m2_{i}", positive=True) for i in (1, 2))
    for total, a, b in zip(sums(merged(one, two)), sums(one), sums(two), strict=True):
        assert sp.simplify(total - a - b) == 0
    _, mean, m2 = one
    count, first, second = sums(one)
    assert (sp.simplify(first / count - mean), sp.simplify(second - first**2 / count - m2)) == (0, 0)


RANKS = 101


def synchronised() -> None:
    """Prove ``synchronise`` for any number of ranks with batches of any sizes: its results, and its gradients at each rank."""
    s = Symbolic(images=RANKS)
    a = s.algebra
    mean, var, count = (a.leaf(name, Level.IMAGE) for name in ("mean", "var", "n"))  # one value a rank
    with s.running(), pytest.MonkeyPatch.context() as patch:

        def all_gather(gathered: list[Tensor], own: Tensor, group: Any) -> None:
            for tensor in gathered:
                s.write(tensor, s.read(own))

        def all_reduce(tensor: Tensor, group: Any) -> None:
            s.write(tensor, tuple((n, a.sum_images(e)) for n, e in s.read(tensor)))

        patch.setattr(dist, "is_initialized", lambda: True)
        patch.setattr(dist, "get_world_size", lambda group: RANKS)
        patch.setattr(dist, "all_gather", all_gather)
        patch.setattr(dist, "all_reduce", all_reduce)
        inputs = [s.tensor(mean, 17), s.tensor(var, 17)]
        found = synchronise(*inputs, s.tensor(count, 1, grad=False), process_group="all")
        total = a.sum_images(count)
        of_all = expanded(a.sum_images(expanded(count * mean)) / total)
        squares = expanded(a.sum_images(expanded(count * (var + mean**2))) / total)
        expected = of_all, expanded(squares - of_all**2), total
        for what, truth, tensor in zip(("mean", "variance", "count"), expected, found, strict=True):
            if not a.is_zero(truth - s.expression(tensor)):
                raise NotProved(what)
        seeds = [a.leaf(name, Level.IMAGE) for name in ("dmean", "dvar")]  # each rank has a loss of its own
        truths = gradients(a, [(e, seed, Level.IMAGE, None) for e, seed in zip(expected[:2], seeds, strict=True)], [mean, var])
        claimed = torch.autograd.grad(found[:2], inputs, [s.tensor(seed, 17, grad=False) for seed in seeds])
        for leaf, gradient in zip((mean, var), claimed, strict=True):
            if not a.is_zero(truths[leaf] - s.expression(gradient)):
                raise NotProved(f"the gradient at {leaf}: {truths[leaf]} and not {s.expression(gradient)}")


def test_synchronise() -> None:
    synchronised()


@pytest.mark.parametrize(
    ("method", "old", "new"),
    [
        ("forward", "counts / total", "1 / counts.numel()"),
        ("forward", "+ (means - merged_mean).square()", ""),
        ("forward", "(weight * means).sum(0)", "means.mean(0)"),
        ("forward", "own[-1] / total", "own[-1]"),
        ("backward", "2 * dvar", "dvar"),
        ("backward", "(mean - merged_mean)", "mean"),
        ("backward", "dist.all_reduce(gradients, group=ctx.group)", "pass"),
        ("backward", "weight * dvar, None", "dvar, None"),
    ],
)
def test_an_error_in_synchronise_has_no_proof(method: str, old: str, new: str) -> None:
    with planted(f"_Synchronise.{method}", edited(old, new)), pytest.raises(NotProved):
        synchronised()
