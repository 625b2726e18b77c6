"""No program reads or overwrites what another one writes, all of every result is written, and the programs' order changes no bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from access_sets import LaunchSets, shuffled, watched
from test_convolution import CASES, draw, draw_edge
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, Join, PoolGeometry, Transform
from bnrestructure.kernels.calls import (
    ConvBackward,
    ConvForward,
    FinalizeBackward,
    FinalizeForward,
    JoinBackward,
    JoinForward,
    MaxPoolBackward,
    MaxPoolForward,
    NormaliseBackward,
    NormaliseForward,
    OutputGradient,
    SqueezeBackward,
    SqueezeForward,
    StatisticsBackward,
    StatisticsForward,
)
from bnrestructure.kernels.cuda import KERNELS

Results = list[Tensor]


def _convolution(name: str, *, implementation: str = "fused", gated: bool = False) -> Results:
    case, dtype = CASES[name], torch.float32
    torch.manual_seed(1)
    a = draw(case, "relu", dtype, gated=gated)
    p, edge = draw_edge(case, dtype)
    kernels: Any = KERNELS.convolutions.by("depthwise" if name.startswith("depthwise") else implementation)
    of = a["x"], a["transform"], a["weight"]
    y, mean, var = kernels.run(ConvForward(*of, a["bias"], case.geometry, dtype, True))
    found = kernels.run(ConvBackward(p, edge, *of, case.geometry, dtype))
    into = torch.randn_like(a["x"]).contiguous(memory_format=torch.channels_last)
    added = kernels.run(ConvBackward(p, edge, *of, case.geometry, dtype, (True, False, False), into))
    return [y, mean, var, *found, added.dx.clone()]  # pixels that meet no tap are left as they were


def _join(name: str, gated: bool = False) -> Results:
    case, dtype = CASES[name], torch.float32
    torch.manual_seed(1)
    y, r = (torch.randn(case.n, case.c, *case.size).contiguous(memory_format=torch.channels_last) for _ in range(2))
    own, shortcut = (Transform(torch.randn(case.c), torch.rand(case.c), torch.randn(case.c)) for _ in range(2))
    own = own._replace(gate=torch.rand(case.n, case.c)) if gated else own
    join = Join(y, own, r, shortcut, "relu")
    weight = torch.randn(case.out, case.c, *case.kernel)
    z = torch.empty_like(y)
    kernels: Any = KERNELS.convolutions.by("fused")
    out, mean, var = kernels.run(ConvForward(z, Transform(), weight, None, case.geometry, dtype, True, join=join))
    p, edge = draw_edge(case, dtype)
    found = kernels.run(ConvBackward(p, edge, z, Transform(), weight, case.geometry, dtype, (True, True, False), join=join))
    return [z, out, mean, var, *found]


def _sweeps() -> Results:
    torch.manual_seed(1)
    c = 6
    x, r = (torch.randn(2, c, 5, 7).contiguous(memory_format=torch.channels_last) for _ in range(2))
    vectors = Transform(torch.randn(c), torch.rand(c), torch.randn(c), "relu")
    plain = Transform(vectors.mean, vectors.scale, vectors.beta)
    gated = vectors._replace(gate=torch.rand(2, c))
    a, b = torch.randn(c), torch.randn(c)
    run: Any = KERNELS.run
    join = Join(x, plain, r, plain, "relu")
    gated_join = Join(x, plain._replace(gate=gated.gate), r, plain, "relu")
    z = run(NormaliseForward(x, vectors, x.dtype))
    pooled = run(SqueezeForward(x, vectors, x.dtype))
    out, mean, var = run(JoinForward(join, x.dtype, True))
    window = PoolGeometry((3, 3), (2, 2), (1, 1), False)
    y, index = run(MaxPoolForward(x, vectors, window, x.dtype))
    running, batches = (torch.zeros(c), torch.ones(c)), torch.tensor(3)
    return [
        z, pooled, out, mean, var, y, index, *running, batches,
        *run(StatisticsForward(x)), *run(StatisticsForward(x, torch.empty_like(x))),
        run(StatisticsBackward(x, mean, a, b, x.clone(memory_format=torch.preserve_format))),
        *run(NormaliseBackward(r, x, vectors)), *run(NormaliseBackward(r, x, gated)), run(NormaliseForward(x, gated, x.dtype, r=r)),
        *run(SqueezeBackward(pooled, r.clone(memory_format=torch.preserve_format), x, vectors)),
        *run(JoinBackward(r, (a, b, mean), join, out)),
        *run(JoinForward(gated_join, x.dtype, True)), *run(JoinBackward(r, (a, b, mean), gated_join, out)),
        *run(MaxPoolBackward(y, index, x, vectors, window)),
        *run(FinalizeForward(mean, var, 70, a, b, *running, 0.1, 1e-5, batches)), *run(FinalizeBackward(a, b, b, mean)),
        *run(FinalizeForward(mean[:3], var[:3], 70, a, b, *running, 0.1, 1e-5, batches, (mean[3:], var[3:]))),
        *run(FinalizeBackward(a, b, b, mean, a, b)),
        *run(OutputGradient(r, BackwardEdge(a, a, b, x, mean), x.dtype, bias=True)),
    ]  # fmt: skip


CALLS: dict[str, Callable[[], Results]] = {
    **{
        name: (lambda name=name: _convolution(name))
        for name in ("1x1", "1x1, stride 2", "3x3", "3x3, stride 2", "3x3, few channels", "3x3, groups", "1x1, stride 3 and padding",
                     "uneven strides", "depthwise 3x3", "depthwise 3x3, stride 2", "depthwise 7x7", "depthwise 2x3, uneven")
    },
    "1x1, gate": lambda: _convolution("1x1", gated=True),
    "depthwise 3x3, gate": lambda: _convolution("depthwise 3x3", gated=True),
    "hybrid 3x3": lambda: _convolution("3x3", implementation="hybrid"),
    "join 1x1": lambda: _join("1x1"),
    "join 3x3": lambda: _join("3x3"),
    "join 1x1, gate": lambda: _join("1x1", gated=True),
    "sweeps": _sweeps,
}  # fmt: skip


def _unwritten(result: Tensor, launches: list[LaunchSets]) -> int:
    """Bytes of a result that begins in memory that some launch wrote to, and that none of them wrote."""
    written = np.unique(np.concatenate([launch.written for launch in launches]))
    size = result.element_size()
    steps = [np.arange(n, dtype=np.int64) * stride * size for n, stride in zip(result.shape, result.stride(), strict=True)]
    at = np.array([result.data_ptr()], np.int64)
    for step in steps:
        at = (at[:, None] + step).reshape(-1)
    bytes_ = (at[:, None] + np.arange(size)).reshape(-1).astype(np.uint64)
    inside = np.isin(bytes_, written)
    return int((~inside).sum()) if inside.any() else 0


@pytest.mark.parametrize("name", CALLS)
def test_programs_are_independent(name: str) -> None:
    with watched() as launches:
        results = [result for result in CALLS[name]() if result is not None]
    assert launches
    assert [fault for launch in launches for fault in launch.faults()] == []
    assert [tuple(result.shape) for result in results if _unwritten(result, launches)] == []
    for seed in (0, 1):
        with shuffled(seed):
            again = [result for result in CALLS[name]() if result is not None]
        for value, expected in zip(again, results, strict=True):
            assert torch.equal(value, expected)
            assert not value.is_floating_point() or not value.isnan().any()


def test_what_depends_on_the_order_is_seen() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def _overlapping(x_ptr, READS: tl.constexpr, STEP: tl.constexpr):
        at = tl.program_id(0) * STEP + tl.arange(0, 4)
        value = tl.load(x_ptr + at) if READS else tl.zeros((4,), tl.float32)
        tl.store(x_ptr + tl.program_id(0) * 4 + tl.arange(0, 4) if READS else x_ptr + at, value + 1.0)

    written_twice, read_elsewhere = (False, 3, "write the same byte"), (True, 3, "reads what another program writes")
    for reads, step, what in (written_twice, read_elsewhere, (False, 4, None), (True, 4, None)):
        with watched() as launches:
            _overlapping[(3,)](torch.zeros(16), READS=reads, STEP=step)
        faults = launches[0].faults()
        assert (faults == []) if what is None else (len(faults) == 1 and what in faults[0]), (reads, step)
    x = torch.zeros(16)
    _overlapping[(3,)](x, READS=False, STEP=3)
    assert _unwritten(x, launches) == 0  # nothing of it was written while it was watched
    with watched() as launches:
        _overlapping[(3,)](x, READS=False, STEP=4)
    assert _unwritten(x, launches) == 16  # its last four numbers
