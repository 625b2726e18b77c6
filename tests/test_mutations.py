"""A sample of ``python -m tests.mutations``: the faults can be planted, and one of them is."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))

from tests.mutations.__main__ import Planter
from tests.mutations.faults import FAULTS
from tests.mutations.tree import StaleFaultError, Tree, located


def test_most_faults_can_be_planted() -> None:
    """Code moves on; ``make mutations`` names the faults whose text is gone."""
    applicable = 0
    for fault in FAULTS:
        try:
            located(fault)
            applicable += 1
        except StaleFaultError:
            pass
    assert applicable >= 40


def test_a_fault_is_noticed(tmp_path: Path) -> None:
    number, fault = next((i, fault) for i, fault in enumerate(FAULTS) if fault.where == "_Synchronise.backward")
    assert Planter(Tree(tmp_path), everyone=False).plant(fault, number) == [fault.guard]
