"""A sample of ``python -m tests.mutations``: the faults can be planted, and one of them is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent))

from tests.mutations.__main__ import Planter
from tests.mutations.faults import FAULTS
from tests.mutations.tree import StaleFaultError, Tree, located


def test_every_fault_can_be_planted() -> None:
    """Code moves on: a fault whose text is gone has to move with it."""
    stale = []
    for fault in FAULTS:
        try:
            located(fault)
        except StaleFaultError as error:
            stale.append(str(error))
    assert stale == []
    assert len(FAULTS) >= 70


@pytest.mark.whole
def test_a_fault_is_noticed(tmp_path: Path) -> None:
    number, fault = next((i, fault) for i, fault in enumerate(FAULTS) if fault.where == "_Synchronise.backward")
    assert Planter(Tree(tmp_path), everyone=False).plant(fault, number) == [fault.guard]
