"""These tests run in a process of their own, under Triton's interpreter: see ../test_interpreted.py."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

#: A compute capability: then it is the compiled code that these tests run, in the emulator, with the tiles that a device would get.
EMULATED_PART = int(os.environ.get("BNR_EMULATED_PART", "0"))

if os.environ.get("TRITON_INTERPRET") != "1" and not EMULATED_PART:
    collect_ignore_glob = ["test_*.py"]  # the mode is fixed once triton is imported, and other tests import it compiled


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "own_tiles: with the tiles that tiles.py chooses")
    config.addinivalue_line("markers", "whole: whole models, minutes each (-m whole)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "whole" not in config.option.markexpr:
        items[:] = [item for item in items if not item.get_closest_marker("whole")]


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
    from bnrestructure.kernels.cuda.emulator.run import emulate
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
    monkeypatch.setattr(tiles, "merge", lambda *_: tiles.SweepTile(2, 4, 4))
    monkeypatch.setattr(tiles, "splits", lambda programs, steps, least=8: min(steps, 3))
