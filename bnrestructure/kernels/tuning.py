"""Measured choices between implementations of one kernel call, kept on disk for later processes.

A kernel with several implementations asks :func:`measured` which of them was the fastest on its arguments' sizes. Within
:func:`measuring` (see bnrestructure/measure_kernels.py) it calls :func:`measure` for sizes that were not measured yet.

The file is ``choices-<digest>.json`` in ``$BNRESTRUCTURE_CACHE`` (``~/.cache/bnrestructure`` by default; ``off`` keeps nothing
on disk). The digest is of what a time depends on beside the sizes: the processor or GPU, the versions and the kernels' sources.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bnrestructure.core.files import replace_file

__all__ = [
    "Measurement",
    "adopt",
    "cache_file",
    "cache_folder",
    "choices",
    "choices_digest",
    "decided",
    "discard",
    "forget",
    "is_measuring",
    "machine_digest",
    "machine_facts",
    "measure",
    "measured",
    "measuring",
    "note",
    "renew",
    "set_machine",
    "shortest_times",
    "wall_clock",
    "where_kept",
]

#: Turns in which each candidate runs once; the first is a warm-up.
_TURNS = 6
#: A candidate must beat the first one, the one that needs no extra memory, by this factor: nearer ones are noise.
_MARGIN = 0.97


@dataclass(frozen=True)
class Measurement:
    """The fastest candidate for one ``call`` (kernel, dtype, sizes, threads), and the shortest milliseconds of each: noise only adds.

    ``faults``: candidates that could not be timed, being wrong, and what is wrong with them. Times are missing where one alone is right.
    """

    call: str
    choice: str
    milliseconds: dict[str, float]
    faults: dict[str, str] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """``measured: fused 1.20 ms, hybrid 1.51 ms``."""
        times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in self.milliseconds.items())
        wrong = "; ".join(f"{name} is wrong here: {fault}" for name, fault in self.faults.items())
        return "; ".join(part for part in (f"measured: {times}" if times else "no other is right here", wrong) if part)


_machine: dict[str, str] = {}
#: This machine's measurements; None before the file was read.
_known: dict[str, Measurement] | None = None
#: Those of other machines: a process may go to and fro between a processor and its GPUs.
_others: dict[str, dict[str, Measurement] | None] = {}
_recorder: list[Measurement] | None = None
#: Changes whenever a choice that was made before might be another one now.
generation = 0
_listener: Callable[[Measurement], None] | None = None


def set_machine(**facts: str) -> None:
    """What times depend on beside the sizes; measurements made under other facts are not used."""
    global _known
    if facts != _machine:
        _others[machine_digest()] = _known
        _machine.clear()
        _machine.update(facts)
        _known = _others.get(machine_digest())


def machine_digest() -> str:
    """Of what :func:`set_machine` was told."""
    return hashlib.sha256(json.dumps(_machine, sort_keys=True).encode()).hexdigest()[:12]


def machine_facts() -> dict[str, str]:
    """What :func:`set_machine` was told."""
    return dict(_machine)


def choices() -> dict[str, str]:
    """What is chosen by measurements on this machine, by call."""
    return {call: found.choice for call, found in _loaded().items()}


def choices_digest() -> str:
    """Of :func:`choices`: another one where any kernel call may be answered otherwise."""
    return hashlib.sha256(json.dumps(sorted(choices().items())).encode()).hexdigest()[:12]


def adopt(chosen: dict[str, str]) -> None:
    """Choose in this process as another one does, whatever is on disk."""
    global _known
    if chosen != choices():
        _known = {call: Measurement(call, choice, {}) for call, choice in chosen.items()}
        renew()


def cache_folder() -> Path | None:
    """Where what was found on this machine is kept, or None for nowhere."""
    folder = os.environ.get("BNRESTRUCTURE_CACHE", "")
    if folder == "off":
        return None
    return Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bnrestructure"


def cache_file() -> Path | None:
    """Where this machine's measurements are kept, or None for nowhere."""
    folder = cache_folder()
    return None if folder is None else folder / f"choices-{machine_digest()}.json"


def where_kept() -> str:
    """Where this machine's measurements are, in words, for ``doctor``: no file is named before there is one."""
    file = cache_file()
    if file is None:
        return "measured choices are not kept"
    return f"measured choices in {file}" if file.exists() else "nothing measured yet (tune)"


def measured(call: str) -> Measurement | None:
    """The measurement of this call on this machine, or None."""
    return _loaded().get(call)


def discard(call: str) -> None:
    """Forget the measurement of this call, in this process: it cannot be used."""
    if _known is not None:
        _known.pop(call, None)


def renew() -> None:
    """Have every choice made anew."""
    global generation
    generation += 1


def forget() -> None:
    """Read the files again at the next question."""
    global _known
    _known = None
    _others.clear()
    renew()


def is_measuring() -> bool:
    """Whether a call within :func:`measuring` is under way."""
    return _recorder is not None


@contextmanager
def measuring(listener: Callable[[Measurement], None] | None = None) -> Iterator[list[Measurement]]:
    """Measure every call that has no measurement yet; the list holds the new ones, which are written to disk at the end.

    ``listener`` is told of each as it is made. Raises RuntimeError when another thread is measuring: neither would see true times.
    """
    global _recorder, _listener
    if _recorder is not None:
        raise RuntimeError("tuning is under way already")
    _recorder, _listener = [], listener
    renew()
    try:
        yield _recorder
    finally:
        _recorder, _listener, found = None, None, _recorder
        renew()
        if found:
            _write(cache_file())


def wall_clock(run: Callable[[], Any]) -> float:
    """Milliseconds of one run, on the host."""
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def measure(
    call: str, candidates: dict[str, Callable[[], Any]], timer: Callable[[Callable[[], Any]], float] = wall_clock
) -> Measurement:
    """Run the candidates in turns, and keep the shortest time of each. The first is preferred to one that is hardly faster.

    ``timer`` runs a candidate and returns milliseconds. A candidate that runs out of the GPU's memory is out, unless it is the
    first: then nothing could run, and torch.OutOfMemoryError is raised.
    """
    assert _recorder is not None
    found = decided(call, shortest_times(candidates, timer, _TURNS))
    _loaded()[call] = found
    _recorder.append(found)
    if _listener is not None:
        _listener(found)
    return found


def shortest_times(
    candidates: dict[str, Callable[[], Any]], timer: Callable[[Callable[[], Any]], float], turns: int
) -> dict[str, float]:
    """The shortest milliseconds of each candidate in so many turns, the first one left out; errors are those of :func:`measure`."""
    first = next(iter(candidates))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(turns):
        for name in list(times):
            try:
                taken = timer(candidates[name])
            except torch.OutOfMemoryError:
                if name == first:
                    raise
                del times[name]
                continue
            if turn:
                times[name].append(taken)
    return {name: min(values) for name, values in times.items()}


def decided(call: str, shortest: dict[str, float], faults: dict[str, str] | None = None) -> Measurement:
    """The first candidate, or one that is clearly faster."""
    first = next(iter(shortest))
    fastest = min(shortest, key=lambda name: shortest[name])
    choice = fastest if shortest[fastest] < _MARGIN * shortest[first] else first
    return Measurement(call, choice, {name: round(ms, 4) for name, ms in shortest.items()}, faults or {})


def note(found: Iterable[Measurement]) -> None:
    """Choose by these from now on, in later processes too."""
    _loaded().update({one.call: one for one in found})
    _write(cache_file())
    renew()


def _loaded() -> dict[str, Measurement]:
    """This machine's measurements, from the file where it was not read yet."""
    global _known
    if _known is None:
        _known = _read(cache_file())
    return _known


def _read(path: Path | None) -> dict[str, Measurement]:
    if path is None or not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text())["measurements"]
        return {entry["call"]: Measurement(**entry) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"bnrestructure: measurements in {path} are ignored: {type(error).__name__}: {error}", stacklevel=2)
        return {}


def _write(path: Path | None) -> None:
    """Merge what this process knows into the file; another process may have written to it since."""
    if path is None or _known is None:
        return
    everything = {**_read(path), **_known}
    try:
        replace_file(path, json.dumps({"machine": _machine, "measurements": [asdict(m) for m in everything.values()]}, indent=1))
    except OSError as error:
        warnings.warn(f"bnrestructure: measurements are not kept: {error}", stacklevel=2)
