"""Every test starts from the same random state, and with as many threads as it found. Random graphs take a new seed at each run."""

from __future__ import annotations

import os
import random

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate-golden", action="store_true", help="write the golden files anew instead of comparing")


def pytest_configure() -> None:
    """One seed for the whole run: pytest-xdist's workers start later and inherit it."""
    os.environ.setdefault("BNR_RANDOM_SEED", str(random.SystemRandom().randrange(2**31)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for of_one_kind in terminalreporter.stats.values() for report in of_one_kind]
    if any("test_random_graphs.py" in getattr(report, "nodeid", "") for report in reports):
        terminalreporter.write_line(f"random graphs: BNR_RANDOM_SEED={os.environ['BNR_RANDOM_SEED']}")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    random.seed(0)
