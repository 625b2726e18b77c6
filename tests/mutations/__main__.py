"""``python -m tests.mutations``: plants every fault, one at a time, and says what took notice of it. Exit status 1 if nothing did.

Each runs in a copy of the repository, C++ compiled for one instruction set. A name or a number picks faults: ``python -m tests.mutations
statistics 7``. ``--everyone`` asks all the guards of every fault, not only the first that takes notice.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.mutations.faults import FAULTS
from tests.mutations.guards import noticed, others
from tests.mutations.tree import Fault, StaleFaultError, Tree, located


class Planter:
    """Plants faults and asks guards, each of which must be silent where there is no fault."""

    def __init__(self, tree: Tree, everyone: bool) -> None:
        self.tree, self.everyone = tree, everyone
        self._silent: dict[tuple[str, bool], str | None] = {}

    def plant(self, fault: Fault, number: int) -> list[str]:
        """The guards that take notice: the fault's own first, then the others, up to the first that does."""
        root = self.tree.with_fault(fault, f"fault{number}")
        found = []
        for guard in dict.fromkeys((fault.guard, *others(fault))):
            if noticed(guard, fault, root) is not None:
                self._check(guard, fault)
                found.append(guard)
                if not self.everyone:
                    break
        shutil.rmtree(root)
        return found

    def _check(self, guard: str, fault: Fault) -> None:
        key = guard, fault.is_compiled
        if key not in self._silent:
            self._silent[key] = noticed(guard, fault, self.tree.without_fault(fault.is_compiled))
        if self._silent[key] is not None:
            raise StaleFaultError(f"{guard} complains where there is no fault: {self._silent[key]}")


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("chosen", nargs="*", help="numbers of faults, or parts of their names")
    parser.add_argument("--everyone", action="store_true", help="ask every guard")
    parser.add_argument("--list", action="store_true", help="only show the faults")
    options = parser.parse_args(arguments)
    wanted = options.chosen or [""]
    chosen = [(i, fault) for i, fault in enumerate(FAULTS, 1) if any(c == str(i) or c in fault.shown for c in wanted)]
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        planter = Planter(Tree(Path(folder)), options.everyone)
        for i, fault in chosen:
            started = time.monotonic()
            try:
                if options.list:
                    located(fault)
                    outcome = fault.guard
                else:
                    found = planter.plant(fault, i)
                    outcome = ", ".join(found) if found else "SURVIVED"
                    failures += not found
            except StaleFaultError as error:
                outcome, failures = f"STALE: {error}", failures + 1
            print(f"{i:3} {fault.shown:110.110} {outcome} ({time.monotonic() - started:.0f} s)", flush=True)
    print(f"{len(chosen)} faults, {failures} not noticed" if not options.list else f"{len(chosen)} faults")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
