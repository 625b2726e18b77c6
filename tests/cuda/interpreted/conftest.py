"""These tests run under Triton's interpreter. Its mode is fixed once triton is imported, and other tests import it compiling: so each
of the suite's processes has another one beside it that interprets, and runs these there (interpreting_process.py).

TRITON_INTERPRET=1: this very process interprets. BNR_EMULATED_PART=90: it is the code compiled for sm_90 that they run, in the emulator,
with the tiles that a device would get (make cuda-emulated).
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from needs import needs_triton

EMULATED_PART = int(os.environ.get("BNR_EMULATED_PART", "0"))
IN_THIS_PROCESS = os.environ.get("TRITON_INTERPRET") == "1" or EMULATED_PART > 0
FOLDER = Path(__file__).parent

if needs_triton.args[0]:
    collect_ignore_glob = ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "own_tiles: with the tiles that tiles.py chooses")
    if os.environ.get("TRITON_INTERPRET") == "1" and not needs_triton.args[0]:
        _patch_the_language_once_a_launch()
        _look_for_overflow_in_numpy()
        _remember_numpy_types()


def _patch_the_language_once_a_launch() -> None:
    """The interpreter exchanges all of ``triton.language`` at a launch, and again at each call of a function in it: a third of its time."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, compiled_range = interpreter._patch_lang, tl.range
    exchanged: set[int] = set()  # which of the two modules that have the language

    @functools.cache
    def seen_by(module: str) -> set[int]:
        return {id(value) for value in vars(sys.modules[module]).values() if value is tl or value is tl.core}

    def patch_once(function: Callable[..., Any]) -> Any:
        """What a launch puts back at its end; of a call inside, nobody reads it."""
        if tl.range is compiled_range:  # a launch
            exchanged.clear()
        missing = seen_by(function.__module__) - exchanged
        exchanged.update(missing)
        return patch(function) if missing else None

    interpreter._patch_lang = patch_once


def _look_for_overflow_in_numpy() -> None:
    """The interpreter looks for overflow after each sum and product of integers in a dozen operations of its own language: a third of its
    time. Here numpy takes the same sum or product in 64 bits, and the same assertion fails."""
    import numpy as np
    from triton.language.semantic import TritonSemantic

    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
    bounds = {np.dtype(kind): (np.iinfo(kind).min, np.iinfo(kind).max) for kind in ("i1", "i2", "i4", "u1", "u2", "u4")}
    original = TritonSemantic.binary_op_sanitize_overflow_impl

    def look(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
        if not self.builder.options.sanitize_overflow or lhs.type.scalar.int_bitwidth >= 64:
            return
        left, right = lhs.handle.data, rhs.handle.data
        if binary_op.__name__ not in operations or left.dtype not in bounds or left.dtype != right.dtype:
            original(self, lhs, rhs, binary_op)
            return
        exact = operations[binary_op.__name__](left, right, dtype=np.int64)
        lowest, highest = bounds[left.dtype]
        assert exact.size == 0 or (exact.min() >= lowest and exact.max() <= highest), (
            f"int{lhs.type.scalar.int_bitwidth} overflow detected for operation {binary_op.__name__}"
        )

    TritonSemantic.binary_op_sanitize_overflow_impl = look


def _remember_numpy_types() -> None:
    """The interpreter makes a table of all of Triton's types whenever it asks for the numpy type of one."""
    from triton.runtime import interpreter

    original, known = interpreter._get_np_dtype, dict[str, Any]()

    def remembered(dtype: Any) -> Any:
        found = known.get(dtype.name)  # types with an element type have no hash
        if found is None:
            found = known[dtype.name] = original(dtype)
        return found

    interpreter._get_np_dtype = remembered


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Have a test of this folder run by the process that interprets, and report what it says."""
    if IN_THIS_PROCESS or FOLDER not in item.path.parents:
        return None
    from interpreting_process import InterpretingProcess

    process = item.config.stash.setdefault(_PROCESS, InterpretingProcess())
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    try:
        reports = [item.config.hook.pytest_report_from_serializable(config=item.config, data=data) for data in process.run(item.nodeid)]
    except RuntimeError as error:
        reports = [pytest.TestReport(item.nodeid, item.location, {}, "failed", str(error), "call")]
    for report in reports:
        report.nodeid = item.nodeid
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


_PROCESS: pytest.StashKey[object] = pytest.StashKey()


def pytest_unconfigure(config: pytest.Config) -> None:
    process = config.stash.get(_PROCESS, None)
    if process is not None:
        process.close()


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Memory that a kernel should have written and did not is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _emulated() -> Iterator[None]:
    if not EMULATED_PART:
        yield
        return
    from emulator.run import emulate

    from bnrestructure.kernels.cuda.launch import received_by

    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # what the interpreter multiplies fp32 in, whatever is asked for
    with received_by(lambda launch: emulate(launch, EMULATED_PART)):
        yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.fixture(autouse=True)
def _small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that small shapes have several of them, and ragged ones. ``own_tiles`` leaves the rules' own."""
    if request.node.get_closest_marker("own_tiles") or EMULATED_PART:
        return
    from bnrestructure.kernels.cuda import tiles

    dot = tiles.DotTile(32, 16, 16, 4, 1)
    for name in ("dense_forward", "dense_dgrad", "dense_wgrad"):
        monkeypatch.setattr(tiles, name, lambda *_: dot)
    sweep = tiles.SweepTile(16, 4, 4)
    for name in ("depthwise_forward", "depthwise_dgrad", "depthwise_wgrad"):
        rule = getattr(tiles, name)
        monkeypatch.setattr(tiles, name, lambda *shape, rule=rule: rule(*shape)._replace(rows=4, channels=4))
    for name in ("sweep", "statistics", "max_pool", "max_pool_backward"):
        monkeypatch.setattr(tiles, name, lambda *_, **__: sweep)
    monkeypatch.setattr(tiles, "merge", lambda count, _: (tiles.SweepTile(2, 4, 4), min(count, 5)))
    monkeypatch.setattr(tiles, "splits", lambda programs, steps, least=8: min(steps, 3))
