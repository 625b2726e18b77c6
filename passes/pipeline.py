"""The passes in order, the paper's ladder as selections of them, and running a selection."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import fx

from bnrestructure.core.errors import UsageError
from bnrestructure.passes.base import Fuel, Pass, PassResult
from bnrestructure.passes.eliminate_concat import EliminateConcat
from bnrestructure.passes.fission import Fission
from bnrestructure.passes.fuse_join import FuseJoin
from bnrestructure.passes.fuse_normalise import FuseNormalise
from bnrestructure.passes.fuse_residual import FuseResidual
from bnrestructure.passes.fuse_statistics import FuseStatistics
from bnrestructure.passes.select_kernels import SelectKernels
from bnrestructure.passes.share_statistics import ShareStatistics
from bnrestructure.passes.thread_forks import ThreadForks

__all__ = ["LADDER", "PASSES", "resolve", "run", "steps"]

_REWRITES = (
    Fission,
    ShareStatistics,
    FuseStatistics,
    FuseNormalise,
    FuseResidual,
    ThreadForks,
    EliminateConcat,
    FuseJoin,
)
#: Every pass by name, in the order of the full pipeline.
PASSES = (*(p.name for p in _REWRITES), SelectKernels.name)

#: The rungs of the paper's ablation: RCF fuses ReLU into CONV, MVF computes mean and variance in one sweep, BNFF fuses both halves
#: of BN onto convolutions, ICF crosses concats and residual joins. Fission gives a tensor two readers, whose gradients are added
#: where they arise (thread-forks) and not in memory: in bf16 a sum that was stored before it is complete loses the smaller part.
LADDER: dict[str, tuple[str, ...]] = {
    "baseline": (),
    "rcf": ("fuse-normalise",),
    "mvf": ("fuse-normalise", "fission", "thread-forks"),
    "bnff": ("fission", "fuse-statistics", "fuse-normalise", "thread-forks"),
    "icf": PASSES[:-1],
}


def resolve(passes: str | Sequence[str] | None) -> tuple[str, ...]:
    """Pass names from a rung of the ladder, a sequence of names, or None for all.

    Raises UsageError for an unknown name, and for a sequence that is neither in the pipeline's order nor a rung: a pass relies on what
    those behind it have not done yet (an activation is not moved once a tensor is threaded through its readers).
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
    """The pass objects for these names, sharing one tank of fuel; select-kernels always comes last, for nothing runs without it."""
    tank = Fuel(fuel)
    rewrites = {p.name: p for p in _REWRITES}
    for name in names:
        if name == Fission.name:
            yield Fission(fuel=tank)
        elif name != SelectKernels.name:
            yield rewrites[name](fuel=tank)
    if backend != "auto" or SelectKernels.name in names:
        yield SelectKernels(backend=backend)


def run(
    gm: fx.GraphModule, names: Sequence[str] = PASSES, backend: str = "auto", fuel: int | None = None
) -> list[tuple[str, PassResult]]:
    """Run passes on a captured graph, in place, and return what each did."""
    return [(step.name, step(gm)) for step in steps(names, backend, fuel)]
