"""Regions: the submodules that capture can follow, their rewritten programs, and the check that a program still fits."""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import fx, nn

from bnrestructure.capture.ambient import (
    compiled_autograd_is_on,
    is_recomputing,
    operations_are_overridden,
    parametrizations_are_cached,
    wants_the_module_itself,
)
from bnrestructure.capture.arguments import Arguments
from bnrestructure.capture.guess import guessed_arguments
from bnrestructure.capture.probation import Probation, own_forwards, wants_own_forwards
from bnrestructure.capture.program import Program, copied_graph
from bnrestructure.capture.reads import Reads
from bnrestructure.capture.recaptures import Recaptures
from bnrestructure.capture.replay import Replays, unrecordable
from bnrestructure.capture.side_effects import ambient_modes
from bnrestructure.capture.sizes import still_hold
from bnrestructure.capture.state import ModuleState
from bnrestructure.capture.tracer import Capture, capture, is_capturing
from bnrestructure.core.errors import AttributeWrittenError, BrokenGraphError, CaptureError, NotFollowedError, NotFullyFusedError
from bnrestructure.graph.boundaries import any_global_hooks
from bnrestructure.kernels import registry
from bnrestructure.passes import pipeline
from bnrestructure.passes.finish import finish
from bnrestructure.passes.prepare import prepare
from bnrestructure.patterns.batch_norm import site_names

__all__ = ["Options", "Ran", "Region", "captured", "holding_batch_norms"]

_CACHED_PROGRAMS = 32
_CAPTURES_TO_WARN_OF = 3
_CONSTANT = "a constant among its arguments"
#: Sizes of inputs for which a program is timed where kernels are proved first.
_SIZES_ON_PROBATION = 8


@dataclass(frozen=True)
class Options:
    """How a model is to be restructured."""

    backend: str = "auto"
    passes: tuple[str, ...] = pipeline.PASSES
    fuel: int | None = None
    strict: bool = False
    graphs: str = "off"


def holding_batch_norms(root: nn.Module) -> set[nn.Module]:
    """Every module of the tree with a batch norm layer inside of it, or code that calls the function."""
    known: dict[nn.Module, bool] = {}
    _holds(root, known)
    return {m for m, found in known.items() if found}


def _holds(m: nn.Module, known: dict[nn.Module, bool]) -> bool:
    if m not in known:
        known[m] = any([_is_batch_norm(type(m)), *[_holds(child, known) for child in m.children()]])
    return known[m]


def _is_batch_norm(kind: type[nn.Module]) -> bool:
    return issubclass(kind, nn.modules.batchnorm._BatchNorm) or _calls_batch_norm(kind)  # type: ignore[arg-type]


@cache
def _calls_batch_norm(cls: type[nn.Module]) -> bool:
    """Whether a method that this class does not have from torch.nn names ``batch_norm``, as F.batch_norm(...) does."""
    own = [vars(c) for c in cls.__mro__ if issubclass(c, nn.Module) and not c.__module__.startswith("torch.nn")]
    codes = [getattr(inspect.unwrap(f), "__code__", None) for methods in own for f in methods.values() if callable(f)]
    while codes:
        code = codes.pop()
        if code is not None and "batch_norm" in code.co_names:
            return True
        codes += [c for c in code.co_consts if inspect.iscode(c)] if code is not None else []
    return False


def captured(module: nn.Module, forward: Callable[..., Any], arguments: Arguments | None = None) -> Capture:
    """The capture of a module's forward, its graph made ready for patterns (passes/prepare.py).

    Without ``arguments`` it is followed with tensors that its first layer would take (capture/guess.py). Raises CaptureError.
    """
    found = capture(module, forward, arguments) if arguments is not None else _guessed(module, forward)
    prepare(found.graph_module)
    return found


def _guessed(module: nn.Module, forward: Callable[..., Any]) -> Capture:
    """The capture for the first guess that the forward takes. Raises CaptureError: that of the first guess, where it takes none."""
    first: CaptureError | None = None
    for arguments in guessed_arguments(module, forward):
        try:
            return capture(module, forward, arguments)
        except NotFollowedError as error:
            first = first or error
    raise first or CaptureError("nobody knows what to call its forward with: give example inputs")


@dataclass
class _Cached:
    """One program, or the lack of one, and what it holds for. ``sizes`` None: whatever the inputs' sizes, by these conditions.

    ``sites`` are the batch norm calls in it, by name, and ``graph`` is what the passes made of it.
    """

    key: Any
    structure: Any
    sizes: Any
    state: ModuleState
    program: Program | None
    sites: list[str] = field(default_factory=list)
    graph: fx.Graph | None = None
    conditions: dict[Any, Any] = field(default_factory=dict)
    again: bool = False  # the next call like this one is captured once more
    replays: Replays | None = None  # its recordings as graphs of its device, where these are wanted
    probations: dict[Any, Probation] = field(default_factory=dict)  # by the inputs' sizes, on devices whose kernels are proved first

    def takes(self, arguments: Arguments) -> bool:
        """Whether it holds for arguments of these sizes."""
        if self.sizes is not None:
            return bool(self.sizes == arguments.sizes)
        return not self.conditions or still_hold(self.conditions, [t.shape for t in arguments.tensors])


@dataclass
class Ran:
    """What of a region has run in training.

    captures    how often its forward was captured
    calls       how often a rewritten program ran
    sites       the batch norm calls of the latest call's program, by name, and ``graph``, what the passes made of it
    refusals    why calls ran the module's own forward
    probation   of the latest call, on a device whose kernels are proved first
    replays     of the latest call, where device graphs are wanted
    """

    captures: int = 0
    calls: int = 0
    sites: list[str] = field(default_factory=list)
    graph: fx.Graph | None = None
    refusals: list[str] = field(default_factory=list)
    probation: Probation | None = None
    replays: Replays | None = None


@dataclass
class Region:
    """What a swapped module carries: its options and its programs, one per structure of call and state of the module tree."""

    options: Options
    ran: Ran = field(default_factory=Ran)
    _programs: list[_Cached] = field(default_factory=list)
    _seen: Counter[Any] = field(default_factory=Counter)
    _recaptures: Recaptures = field(default_factory=Recaptures)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _owner: weakref.ref[nn.Module] | None = None

    def belongs_to(self, module: nn.Module) -> bool:
        """Whether it is this module's, which it is from the first call on; another one's programs know another one's parts."""
        if self._owner is None:
            self._owner = weakref.ref(module)
        return self._owner() is module

    @property
    def refusals(self) -> list[str]:
        """Why calls in training ran the module's own forward."""
        return self.ran.refusals

    def __deepcopy__(self, memo: dict[int, Any]) -> Region:
        """A copied model starts without programs: they are made again from its own modules."""
        return Region(self.options)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Region, (self.options,))

    def run(self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the module: its rewritten program, or ``forward``, its own, where no program fits."""
        if is_capturing() or wants_own_forwards() or wants_the_module_itself():
            return forward(module, *args, **kwargs)
        if any_global_hooks():
            self._refuse("hooks for every module are installed, and a rewritten forward calls none")
            return forward(module, *args, **kwargs)
        if (mode := operations_are_overridden()) is not None:
            self._refuse(f"a {mode} is active, and no operation of a fused node goes through it")
            return forward(module, *args, **kwargs)
        if getattr(module, "_is_replica", False):
            self._refuse("nn.DataParallel runs replicas of the module, whose tensors are not parameters: DistributedDataParallel's are")
            return forward(module, *args, **kwargs)
        if parametrizations_are_cached():
            self._refuse("parametrizations are cached (torch.nn.utils.parametrize.cached), and a rewritten forward would not see them")
            return forward(module, *args, **kwargs)
        if compiled_autograd_is_on():
            self._refuse("compiled autograd is on, which compiles the backward passes of PyTorch's own operations alone")
            return forward(module, *args, **kwargs)
        try:
            arguments = Arguments(args, kwargs)
        except CaptureError as error:
            self._refuse(str(error))
            return forward(module, *args, **kwargs)
        if arguments.without_data:
            return forward(module, *args, **kwargs)
        cached = self._fitting(module, forward, arguments)
        if cached is None:
            return forward(module, *args, **kwargs)
        if cached.program is None:
            return self._own(cached, module, forward, args, kwargs)
        self.ran.sites, self.ran.graph = cached.sites, cached.graph
        probation = self._probation(cached, module, arguments)
        if probation is not None and not probation.rewritten():
            if probation.reason is not None:
                self.ran.calls = 0  # those by which its kernels were known, and its steps timed
                self._refuse(probation.reason)
            with own_forwards():
                return forward(module, *args, **kwargs)
        self.ran.calls += 1
        self.ran.replays = cached.replays if torch.is_grad_enabled() else self.ran.replays
        settled = probation is None or probation.settled
        return cached.program(module, arguments.tensors, cached.replays if settled else None)

    def _own(self, cached: _Cached, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        again = True  # after an error, too: the call itself is at fault, perhaps, and not what the tracer can follow
        try:
            result = forward(module, *args, **kwargs)
            again = cached.again
            return result
        finally:
            if again:
                with self._lock, suppress(ValueError):
                    self._programs.remove(cached)

    def _probation(self, cached: _Cached, module: nn.Module, arguments: Arguments) -> Probation | None:
        """Where the program stands for inputs of these sizes, on a device whose kernels are proved first; None on others."""
        device = next((t.device for t in chain(arguments.tensors, module.parameters()) if t.is_floating_point()), None)
        kernels = None if device is None else registry.proving(self.options.backend, device.type)
        if kernels is None or device is None or cached.program is None:
            return None
        sizes = arguments.sizes
        with self._lock:
            found = cached.probations.get(sizes)
            if found is None:
                name = cached.program.digest((sizes, cached.key, [tuple(p.shape) for p in module.parameters()]))
                guarded = self.options.backend == "auto" and not self.options.strict
                found = Probation(kernels, name, guarded, cached.program.synchronises, device)
                if guarded and len(cached.probations) >= _SIZES_ON_PROBATION:
                    found.give_up(f"its inputs come in more than {_SIZES_ON_PROBATION} sizes, and steps are timed for each of them")
                else:
                    cached.probations[sizes] = found
        self.ran.probation = found
        return found

    def _fitting(self, module: nn.Module, forward: Callable[..., Any], arguments: Arguments) -> _Cached | None:
        """The program for this call, made if there is none; None where each call would need one of its own, and where an activation
        checkpoint recomputes a call that no program ran.
        """
        modes = ambient_modes()
        key, structure = (arguments.key, modes), (arguments.structure, modes)
        with self._lock:
            changed = attribute = constant = None
            for i, cached in enumerate(self._programs):
                if cached.key != key:
                    constant = constant or (_CONSTANT if cached.structure == structure else None)
                    continue
                if not cached.takes(arguments):
                    changed = changed or "the sizes of its input, by which it decides something"
                elif cached.state.matches():
                    if i:
                        self._programs.insert(0, self._programs.pop(i))
                    self._recaptures.used(key, structure)
                    return cached
                elif attribute is None:
                    attribute = cached.state.difference()
                    changed = changed or attribute
            if attribute is not None and not self._recaptures.worth_another(key):
                self.ran.calls = 0
                self._refuse(f"{attribute} is another one in each call, and each would need a capture of its own")
                return None
            if changed is None and constant is not None and not self._recaptures.worth_another(structure):
                self.ran.calls = 0
                self._refuse(f"{constant} is another one in each call, and each would need a capture of its own")
                return None
            if is_recomputing():
                return None
            self._count(key if changed is not None else structure, module, changed or constant)
            if changed is None:
                self._seen[key] += 1
            made = self._make(module, forward, arguments, key, structure)
            self._programs.insert(0, made)
            del self._programs[_CACHED_PROGRAMS:]
            return made

    def _count(self, key: Any, module: nn.Module, changed: str | None) -> None:
        """Warn, once, of a region that is captured again and again for calls of one structure."""
        self.ran.captures += 1
        self._seen[key] += 1
        if self._seen[key] == _CAPTURES_TO_WARN_OF and changed is not None:
            warnings.warn(
                f"bnrestructure: {type(module).__name__} is captured for the {_CAPTURES_TO_WARN_OF}rd time because of {changed}; "
                "each capture costs about a training step",
                stacklevel=5,
            )

    def _make(self, module: nn.Module, forward: Callable[..., Any], arguments: Arguments, key: Any, structure: Any) -> _Cached:
        try:
            before = captured(module, forward, arguments)
        except CaptureError as error:
            self._refuse(str(error))
            writes = isinstance(error, AttributeWrittenError)
            again = writes and self._seen[key] == 1  # perhaps the first call alone writes it
            reads = error.reads  # an attribute may have led to what cannot be followed, and be another one later
            if reads is None or writes or self._seen[key] >= _CAPTURES_TO_WARN_OF:
                reads = Reads()
            return _Cached(key, structure, None, ModuleState(module, reads, calls=[module] if writes else []), None, again=again)
        gm = before.graph_module
        sites = site_names(gm.graph)
        try:
            pipeline.rewrite(gm, self.options.passes, self.options.backend, self.options.fuel)
        except BrokenGraphError as error:
            warnings.warn(f"bnrestructure: {error}. Please report this fault; {type(module).__name__} runs as it was", stacklevel=6)
            self._refuse(str(error))
            return _Cached(key, structure, None, ModuleState(module, Reads()), None)
        graph = copied_graph(gm.graph)
        finish(gm)
        by_size = arguments.sizes if before.by_size else None
        program = Program(gm, before.rebuild, type(module).__name__)
        replays = None if self.options.graphs == "off" else Replays(unrecordable(gm))
        state = ModuleState(module, before.reads, before.opaque)
        return _Cached(key, structure, by_size, state, program, sites, graph, before.conditions, replays=replays)

    def _refuse(self, reason: str) -> None:
        if reason not in self.ran.refusals:
            self.ran.refusals.append(reason)
        if self.options.strict:
            raise NotFullyFusedError(f"a region refuses in training: {reason}")
