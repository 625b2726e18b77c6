"""Capture of one module's forward() as a torch.fx graph, or a CaptureError that says what it could not follow.

The forward runs once, on fake tensors (capture/recorder.py), so the graph is what the forward does and no guess: the branches
taken are those that eager mode takes for inputs of this kind. Whatever the graph would silently freeze - random numbers drawn
outside of PyTorch, attributes written, activation checkpoints - makes the capture fail instead.
"""

from __future__ import annotations

import contextvars
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils import checkpoint as checkpoint_module

from bnrestructure.capture.arguments import Arguments
from bnrestructure.capture.calls import CustomFunction
from bnrestructure.capture.contents import state_of
from bnrestructure.capture.fakes import FaithfulFakeMode, without_log
from bnrestructure.capture.hooks import announcing_hooks, may_change_result, objection_to_hooks
from bnrestructure.capture.interrupts import interrupts_deferred
from bnrestructure.capture.kinds import telling_kinds
from bnrestructure.capture.layers import keeps_shape, known_result
from bnrestructure.capture.outputs import as_output
from bnrestructure.capture.parts import follow_from_sizes
from bnrestructure.capture.reads import Reads, not_recording, recording_reads
from bnrestructure.capture.recorder import Recorder
from bnrestructure.capture.side_effects import Around, Attributes
from bnrestructure.capture.spelling import article
from bnrestructure.capture.stand_ins import without_data
from bnrestructure.capture.surroundings import surroundings_of
from bnrestructure.capture.trial import AsBefore, trial
from bnrestructure.capture.written import Written, keeping_buffers_of_scripts
from bnrestructure.core.errors import AttributeWrittenError, CaptureError, NotFollowedError, first_line
from bnrestructure.graph.boundaries import boundary_reason, has_own_call, has_scripts, is_library_leaf

__all__ = ["Capture", "capture", "is_capturing"]

_active = threading.local()
_lock = threading.RLock()

#: What sets the state of PyTorch's generator; fork_rng() goes through it.
_SEEDING = ("manual_seed", "seed", "set_rng_state", "initial_seed")
_RANDOM = "its forward draws random numbers outside the graph (a frozen draw would be wrong)"


@dataclass
class Capture:
    """What one forward() turned out to do.

    graph_module    its graph; placeholders are the tensor leaves of the arguments, in order
    rebuild         what the forward returns, from what the graph returns; None: the same
    opaque          submodules that are called as they are, although they are no layers of PyTorch's, and why
    reads           the attributes that decided something
    by_size         whether the graph holds for inputs of these sizes alone
    conditions      otherwise, what the forward learnt of its inputs' sizes: the graph holds for inputs of which it is as true
    """

    graph_module: fx.GraphModule
    rebuild: Callable[[Sequence[Any]], Any] | None
    opaque: dict[nn.Module, str]
    reads: Reads
    by_size: bool
    conditions: dict[Any, Any]


def is_capturing() -> bool:
    """Whether this thread is inside a capture: restructured modules then run their own forward, to be followed."""
    return getattr(_active, "session", None) is not None


def capture(module: nn.Module, forward: Callable[..., Any], arguments: Arguments) -> Capture:
    """Capture ``forward(module, ...)`` for calls like this one, with its submodules' training flags as they are.

    torch's own layers and boundary modules stay calls; everything else is followed, but for submodules that cannot be: those stay
    calls too. The module is left as it was. Raises CaptureError naming what in the module's forward could not be followed.
    """
    watch = False
    with _lock, interrupts_deferred():
        around = Around(module)
        opaque = _asking(module) if around.going_on else {}
        while True:
            session = _Session(module, opaque, around, watch)
            try:
                return session.run(forward, arguments)
            except CaptureError as error:
                if (str(error) == _RANDOM or session.wrote_around) and not watch:
                    watch = True  # once more, looking after each submodule, to learn which one draws or writes
                elif session.blamed is not None and session.blamed not in opaque:
                    opaque[session.blamed] = str(error)
                else:
                    error.reads = session.reads
                    raise


def _asking(root: nn.Module) -> dict[nn.Module, str]:
    """Submodules whose code may ask what is something else each time, and why they stay calls.

    Raises CaptureError where it is the root's, and for an iterator, which could not be put back.
    """
    found: dict[nn.Module, str] = {}
    for module in [module for module in root.modules() if not is_library_leaf(module)]:
        for source in surroundings_of([module], kept=True).going_on:
            found[module] = f"its code may ask {article(type(source).__name__)}, which goes on by itself"
            if module is root or state_of(source) is None:
                raise CaptureError(found[module])
    return found


class _Session:
    """One run of the forward."""

    def __init__(self, root: nn.Module, opaque: dict[nn.Module, str], around: Around, watch: bool) -> None:
        self.root = root
        self.opaque = opaque
        self.watch = watch
        self.paths = {m: name for name, m in reversed(list(root.named_modules(remove_duplicate=False)))}
        self.attributes = Attributes(root)
        self.around = around
        self.context = contextvars.copy_context()  # what the forward sets in it goes with it
        self.wrote_around = False
        self.written = Written()  # by parts that are called as they are
        self.reads = Reads()
        self.followed = {root}  # the modules whose forwards the graph is made of
        self.recorder = Recorder(root, FaithfulFakeMode(allow_non_fake_inputs=True))
        self.recorder.sizes.decided = around.catches  # of other sizes it may catch something else
        self.random_before = _random_state()
        self.blamed: nn.Module | None = None  # the submodule to call as it is, if an error is its own
        self._error: BaseException | None = None  # the last one that left a module, and
        self._inside: list[tuple[str, nn.Module]] = []  # the modules that it arose in

    def run(self, forward: Callable[..., Any], arguments: Arguments) -> Capture:
        recorder = self.recorder
        for name, module in self.root.named_modules():
            if any(is_lazy(t) for t in (*module._parameters.values(), *module._buffers.values())):
                raise CaptureError(f"{name or 'it'} is lazy: its parameters are made at its first call")
        names = ["x"] if len(arguments.tensors) == 1 else [f"x{i}" for i in range(len(arguments.tensors))]
        doubles = [recorder.placeholder(n, t) for n, t in zip(names, arguments.tensors, strict=True)]
        args, kwargs = arguments.unflatten([doubles[i] for i in arguments.places])
        given = pytree.tree_leaves((args, kwargs))
        outer = getattr(_active, "session", None)
        _active.session = self
        try:
            with _patched(), recording_reads(self.reads), without_log(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with telling_kinds(self.around.asking, is_capturing), recorder:
                    result = self.context.run(forward, self.root, *args, **kwargs)
            if [id(a) for a in pytree.tree_leaves((args, kwargs))] != [id(g) for g in given]:
                raise CaptureError("its forward writes to a container that it is given")
            recorder.check_modes()
            output, rebuild = as_output(result, recorder)
        except CaptureError as error:
            own = [module for _, module in self._modules_of(error) if module in self.paths]
            self.blamed = own[-1] if own else None
            raise
        except Exception as error:  # whatever user code raises on fake tensors is a reason, not a fault of ours
            self.blamed = None
            inside = self._modules_of(error)
            where = f" in {inside[-1][0]}" if inside else ""
            raise NotFollowedError(f"its forward cannot be followed{where}: {type(error).__name__}: {first_line(error)}") from error
        finally:
            _active.session = outer
            self._undo()
        if (name := self.written.read_by(self.reads, self.followed)) is not None:
            raise AttributeWrittenError(f"its forward reads {name!r}, which a part that is called as it is writes")
        if (objection := objection_to_hooks(self.root, self.followed, self.reads)) is not None:
            raise AttributeWrittenError(objection)
        recorder.graph.output(output)
        gm = fx.GraphModule(self.root, recorder.graph, class_name=type(self.root).__name__)
        if not recorder.sizes.decided and follow_from_sizes(gm.graph):
            recorder.sizes.decide()
        return Capture(gm, rebuild, dict(self.opaque), self.reads, recorder.sizes.decided, recorder.sizes.conditions)

    @contextmanager
    def _within(self, path: str, module: nn.Module) -> Iterator[None]:
        """The forward is inside of this module. Of an error the innermost module is noted, for the forward may catch it."""
        modules = self.recorder.trail.modules
        modules.append((path, module))
        try:
            yield
        except BaseException as error:
            if error is not self._error:
                self._error, self._inside = error, list(modules)
            raise
        finally:
            modules.pop()

    def _modules_of(self, error: BaseException) -> list[tuple[str, nn.Module]]:
        return self._inside if error is self._error else []

    def _undo(self) -> None:
        """Put back what the forward wrote to attributes and drew of random numbers; raises CaptureError if it did either."""
        pending = sys.exc_info()[1]
        changed, around = self.attributes.restore(), self.context.run(self.around.restore)
        drawn = not _same_random_state(_random_state(), self.random_before)
        _set_random_state(self.random_before)
        if changed and not isinstance(pending, CaptureError):
            owner, key = changed[-1]
            self.blamed = owner if owner is not self.root else None
            raise AttributeWrittenError(f"its forward writes the attribute {key!r}")
        if around is not None and not isinstance(pending, CaptureError):
            self.wrote_around = True
            raise AttributeWrittenError(_writes(around))
        if drawn and pending is None:
            raise CaptureError(_RANDOM)

    def call_module(self, original: Callable[..., Any], m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module's ``__call__`` during the forward."""
        recorder = self.recorder
        if recorder.depth:
            return m.forward(*args, **kwargs)  # inside a call that is recorded as a whole; its hooks run when it really runs
        path = self.paths.get(m)
        if path is None and (any(True for _ in m.parameters()) or any(True for _ in m.buffers())):
            raise CaptureError(f"its forward calls a {type(m).__name__} that is not one of its submodules")
        if recorder.modes_differ():  # asked here, while the module that turned them is still the innermost one
            with recorder.unseen():
                depends = any(p.requires_grad for p in m.parameters()) or recorder.depends((args, kwargs))
            recorder.check_modes(depends)
        if path is not None and (is_library_leaf(m) or m in self.opaque or boundary_reason(m) is not None):
            if has_own_call(type(m)):
                raise CaptureError(f"its forward calls a {type(m).__name__} as it is, whose __call__ does more than its forward")
            return self._layer(m, path, args, kwargs)
        self.followed.add(m)
        with self._within(path or "", m):
            result = original(m, *args, **kwargs)
            if self.watch and not _same_random_state(_random_state(), self.random_before):
                raise CaptureError(_RANDOM)
            if self.watch and (name := self.around.changed()) is not None:
                raise AttributeWrittenError(_writes(name))
        return result

    def _layer(self, m: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.attributes.changed_on(m):
            raise CaptureError(f"its forward writes to attributes of a {type(m).__name__} before calling it")
        if not is_library_leaf(m) and (name := self.around.changed()) is not None:
            raise AttributeWrittenError(_writes(name))
        if not self.recorder.own.are_in_place(m):
            raise CaptureError(f"its forward calls a {type(m).__name__} with other parameters or buffers than its own")
        recorder = self.recorder
        with recorder.unseen():
            learns = any(p.requires_grad for p in m.parameters())

        def run(*values: Any, **options: Any) -> Any:
            found = known_result(m, values, options)
            if found is not None:
                return found
            if not has_scripts(m):  # what TorchScript compiles in its first runs is for what it is given then
                try:
                    with not_recording(), without_data(m, recorder.double_of, self.written) as stand_in:
                        return stand_in.forward(*values, **options)
                except (DataDependentOutputException, DynamicOutputShapeException):
                    if is_library_leaf(m):
                        raise
            with not_recording():
                found = trial(m, path, values, options, self.written)
            recorder.sizes.uncertain = path
            return pytree.tree_map_only(torch.Tensor, recorder.double, found)

        before, hooked = None if is_library_leaf(m) else _random_state(), may_change_result(m)
        with self._within(path, m), keeping_buffers_of_scripts(m, recorder.unseen):
            recorder.sizes.uncertain = path if hooked else recorder.sizes.uncertain
            result = recorder.call(
                "call_module", path, args, kwargs, run, learns=learns, opaque=before is not None, shape_stays=keeps_shape(m) and not hooked,
                check=lambda found: AsBefore(path, found) if recorder.sizes.uncertain == path else None,
            )  # fmt: skip
        if before is not None:
            _set_random_state(before)  # it draws again when it really runs, and writes again
            self.written.variables |= self.around.written()
            self.written.note_reach(m)
            self.around.restore()
        return result


def _writes(name: str) -> str:
    return f"its forward writes the variable {name!r}, or what is in it"


def _session() -> _Session | None:
    session: _Session | None = getattr(_active, "session", None)
    return session


@contextmanager
def _patched() -> Iterator[None]:
    """PyTorch with calls of modules, of custom Functions and of checkpoints announced to this thread's session."""
    call, apply = nn.Module.__call__, torch.autograd.Function.__dict__["apply"]

    def call_module(m: nn.Module, *args: Any, **kwargs: Any) -> Any:
        session = _session()
        return call(m, *args, **kwargs) if session is None else session.call_module(call, m, args, kwargs)

    def call_function(cls: Any, *args: Any, **kwargs: Any) -> Any:
        session = _session()
        own = apply.__get__(None, cls)
        if session is None or session.recorder.depth:
            return own(*args, **kwargs)
        return session.recorder.call("call_function", CustomFunction(cls), args, kwargs, own)

    nn.Module.__call__ = call_module  # type: ignore[method-assign]
    torch.autograd.Function.apply = classmethod(call_function)
    seeding = [(module, name, getattr(module, name)) for module in (torch, torch.random) for name in _SEEDING if hasattr(module, name)]
    for module, name, function in seeding:
        setattr(module, name, _not_seeding(function))
    try:
        with _no_checkpoints(), announcing_hooks(_refuse_hooks):
            yield
    finally:
        for module, name, function in seeding:
            setattr(module, name, function)
        nn.Module.__call__ = call  # type: ignore[method-assign]
        torch.autograd.Function.apply = apply


def _refuse_hooks(module: nn.Module) -> None:
    session = _session()
    if session is not None and not session.recorder.depth:
        raise CaptureError(f"its forward puts hooks on a {type(module).__name__}")


def _not_seeding(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, but a CaptureError in a forward that is captured: what it draws then is no draw of the graph's."""

    def refusing(*args: Any, **kwargs: Any) -> Any:
        session = _session()
        if session is not None and not session.recorder.depth:
            raise CaptureError(_RANDOM)
        return function(*args, **kwargs)

    return refusing


@contextmanager
def _no_checkpoints() -> Iterator[None]:
    """Make any activation checkpoint met while capturing a CaptureError, by whichever name the model imported it."""
    # What it goes through differs between PyTorch releases; a model may hold checkpoint() itself under a name of its own.
    names = (
        "_checkpoint_impl", "_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator",
        "CheckpointFunction", "checkpoint",
    )  # fmt: skip
    saved = {name: getattr(checkpoint_module, name) for name in names if hasattr(checkpoint_module, name)}

    class Refusing:
        apply = staticmethod(_refusing(checkpoint_module.CheckpointFunction.apply))

    for name, original in saved.items():
        setattr(checkpoint_module, name, Refusing if name == "CheckpointFunction" else _refusing(original))
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(checkpoint_module, name, value)


def _refusing(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """``checkpoint``, but a CaptureError in the thread that captures; others may train meanwhile."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        session = _session()
        if session is not None and not session.recorder.depth:
            raise CaptureError("it uses activation checkpointing (torch.utils.checkpoint)")
        return checkpoint(*args, **kwargs)

    return refuse


def _random_state() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    return (torch.get_rng_state(), random.getstate(), None if numpy is None else numpy.random.get_state(legacy=False))


def _same_random_state(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return torch.equal(a[0], b[0]) and a[1] == b[1] and str(a[2]) == str(b[2])


def _set_random_state(state: tuple[Any, ...]) -> None:
    torch.default_generator.set_state(state[0])
    random.setstate(state[1])
    if state[2] is not None:
        sys.modules["numpy"].random.set_state(state[2])

