"""The passes in order, the paper's ladder as selections of them, and running a selection."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from torch import fx

from bnrestructure.core.errors import UsageError
from bnrestructure.passes.base import Fuel, Pass, PassResult
from bnrestructure.passes.chain_readers import CHAIN_READERS
from bnrestructure.passes.eliminate_concat import ELIMINATE_CONCAT
from bnrestructure.passes.fission import FISSION
from bnrestructure.passes.fuse_join import FUSE_JOIN
from bnrestructure.passes.fuse_normalise import FUSE_NORMALISE
from bnrestructure.passes.fuse_residual import FUSE_RESIDUAL
from bnrestructure.passes.fuse_statistics import FUSE_STATISTICS
from bnrestructure.passes.select_kernels import SELECT_KERNELS, select_kernels
from bnrestructure.passes.share_statistics import SHARE_STATISTICS

__all__ = ["LADDER", "PASSES", "resolve", "rewrite", "run", "steps"]

_REWRITES = {
    step.name: step
    for step in (
        FISSION,
        SHARE_STATISTICS,
        FUSE_STATISTICS,
        FUSE_NORMALISE,
        FUSE_RESIDUAL,
        CHAIN_READERS,
        ELIMINATE_CONCAT,
        FUSE_JOIN,
    )
}
#: Every pass by name, in the order of the full pipeline.
PASSES = (*_REWRITES, SELECT_KERNELS)

#: The rungs of the paper's ablation: RCF fuses ReLU into CONV, MVF computes mean and variance in one sweep, BNFF fuses both halves
#: of BN onto convolutions, ICF crosses concats and residuals. Fission gives a tensor two readers, whose gradients are added
#: where they arise (chain-readers) and not in memory: in bf16 a sum that was stored before it is complete loses the smaller part.
LADDER: dict[str, tuple[str, ...]] = {
    "baseline": (),
    "rcf": ("fuse-normalise",),
    "mvf": ("fuse-normalise", "fission", "chain-readers"),
    "bnff": ("fission", "fuse-statistics", "fuse-normalise", "chain-readers"),
    "icf": PASSES[:-1],
}


def resolve(passes: str | Sequence[str] | None) -> tuple[str, ...]:
    """Pass names from a rung of the ladder, a sequence of names, or None for all.

    Raises UsageError for an unknown name, and for a sequence that is neither in the pipeline's order nor a rung: a pass relies on what
    those behind it have not done yet (an activation is not moved once a tensor is passed on from reader to reader).
    """
    if passes is None:
        return PASSES
    try:
        names = LADDER.get(passes, (passes,)) if isinstance(passes, str) else tuple(passes)
    except TypeError as error:
        raise UsageError(f"passes are names, or a rung of the ladder, got {passes!r}") from error
    for name in names:
        if name not in PASSES:
            near = difflib.get_close_matches(str(name), [*PASSES, *LADDER], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"unknown pass {name!r}{hint} (passes: {', '.join(PASSES)}; ladder: {', '.join(LADDER)})")
    if tuple(names) not in LADDER.values():
        for before, after in pairwise(names):
            if PASSES.index(before) > PASSES.index(after):
                raise UsageError(f"pass {after!r} comes before {before!r}: the order is {', '.join(PASSES)}")
    return tuple(names)


def steps(names: Sequence[str], backend: str = "auto", fuel: int | None = None) -> Iterator[Pass]:
    """The passes of these names, sharing one tank of fuel; select-kernels always comes last, for nothing runs without it."""
    tank = Fuel(fuel)
    for name in names:
        if name != SELECT_KERNELS:
            yield replace(_REWRITES[name], fuel=tank)
    if backend != "auto" or SELECT_KERNELS in names:
        yield select_kernels(backend)


def run(
    gm: fx.GraphModule, names: Sequence[str] = PASSES, backend: str = "auto", fuel: int | None = None
) -> list[tuple[str, PassResult]]:
    """Run passes on a captured graph, in place, and return what each did."""
    results = rewrite(gm, names, backend, fuel)
    if any(result.modified for _, result in results):
        gm.recompile()
    return results


def rewrite(
    gm: fx.GraphModule, names: Sequence[str] = PASSES, backend: str = "auto", fuel: int | None = None
) -> list[tuple[str, PassResult]]:
    """:func:`run` for those who want the graph and do not call ``gm``: its forward stays as it was until ``gm.recompile()``."""
    return [(step.name, step.rewrite(gm)) for step in steps(names, backend, fuel)]
