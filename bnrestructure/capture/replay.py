"""Rewritten programs as graphs of their device: forward and backward recorded once each, then repeated without Python.

Calls of one signature (sizes, strides, dtypes, where the parameters are) have this life. A few run as they are, by which kernels are
compiled and cuDNN chooses. Then forward and backward are recorded, and *proved*: one step runs as it is, its recording beside it on the
same values. Where results, buffers and gradients agree, later steps are repetitions. Whatever fails leaves the program as it was, with
a reason in the plan.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from bnrestructure.capture.device_graphs import DeviceGraphs, graphs_on
from bnrestructure.capture.probation import saves_by_hooks
from bnrestructure.core.errors import first_line
from bnrestructure.core.generators import preserved_generators
from bnrestructure.graph.boundaries import boundary_reason, is_library_leaf
from bnrestructure.graph.ir import BatchNorm, Finalize, Synchronise

__all__ = ["Replays", "unrecordable"]

Function = Callable[..., Any]

#: Calls of a signature that run as they are before it is recorded; signatures that are recorded; and that are told apart.
_WARM_UP, _RECORDED, _SEEN = 3, 8, 64
#: By how much a repetition may be off, of the largest value: cuDNN's own sums differ from run to run.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
#: Whose functions compute on tensors and do nothing else.
_PURE = ("torch", "_operator", "operator", "math", "builtins", "bnrestructure.ops")


def unrecordable(gm: fx.GraphModule) -> str | None:
    """Why a program must not be recorded, or None: what Python does in it would happen once, and not in each step."""
    for node in gm.graph.nodes:
        if node.op == "call_module":
            layer = gm.get_submodule(str(node.target))
            if not is_library_leaf(layer) or boundary_reason(layer) is not None:
                return f"it calls {node.target} as it is, and what that does in Python would happen once"
        if Synchronise.of(node) is not None:
            return "it merges statistics across processes"
        layer_of = Finalize.of(node) or BatchNorm.of(node)
        if layer_of is not None and layer_of.momentum is None and layer_of.running_mean is not None:
            return "a batch norm averages over all batches (momentum=None), whose number Python may read"
        if node.op == "call_function":
            owner = getattr(node.target, "__self__", None)
            home = getattr(owner if isinstance(owner, type) else node.target, "__module__", None) or "torch"
            if not any(home == pure or home.startswith(f"{pure}.") for pure in _PURE):
                return f"it calls {getattr(node.target, '__name__', node.target)}, and what that does in Python would happen once"
    return None


class _Ticket:
    """Held by the backward pass of a call. Until that has run or is forgotten, the recording's memory is taken."""

    used = False


@dataclass
class _Recording:
    """Forward and backward of one signature, and the memory that repetitions read and write.

    outputs     the leaves of the program's result, and ``differentiable``, the one that gradients come from
    gradients   of ``needed``, those of the inputs and own tensors that need one; None where they get none
    """

    inputs: list[Tensor]
    outputs: list[Any]
    spec: pytree.TreeSpec
    differentiable: int
    needed: list[int]
    forward: Callable[[], None]
    dout: Tensor
    gradients: tuple[Tensor | None, ...]
    backward: Callable[[], None]
    proved: bool = False
    fault: str | None = None
    _holder: Callable[[], _Ticket | None] = field(default=lambda: None)

    @property
    def is_free(self) -> bool:
        """Whether no backward pass is to come that reads what the last repetition kept."""
        holder = self._holder()
        return holder is None or holder.used

    def take(self) -> _Ticket:
        ticket = _Ticket()
        self._holder = weakref.ref(ticket)
        return ticket

    def repeat_forward(self, given: Sequence[Tensor]) -> None:
        for own, value in zip(self.inputs, given, strict=False):
            own.detach().copy_(value)
        self.forward()

    def repeat_backward(self, dout: Tensor) -> None:
        self.dout.copy_(dout)
        self.backward()


class Replays:
    """The recordings of one program. Called with its function, inputs and own tensors it returns what the function does.

    ``reason``: why nothing more is recorded; None as long as nothing speaks against it.
    """

    def __init__(self, reason: str | None = None) -> None:
        self.reason = reason
        self._seen: Counter[Any] = Counter()
        self._recordings: dict[Any, _Recording] = {}
        self._thread = threading.get_ident()

    def __call__(self, function: Function, tensors: Sequence[Tensor], own: Sequence[Tensor]) -> Any:
        recording = self._recording(function, tensors, own)
        if recording is None:
            return function(*tensors, *own)
        found = iter(_Repeated.apply(recording, function, len(tensors), *tensors, *own))
        leaves = [next(found) if isinstance(leaf, Tensor) else leaf for leaf in recording.outputs]
        return pytree.tree_unflatten(leaves, recording.spec)

    def __str__(self) -> str:
        """How far it is, in a line."""
        proved = sum(recording.proved for recording in self._recordings.values())
        if proved:
            others = "" if self.reason is None else f"; other calls are not: {self.reason}"
            return f"its steps are repeated as device graphs ({proved} recorded){others}"
        return f"no device graphs: {self.reason}" if self.reason is not None else "its steps are to be recorded as device graphs"

    def _recording(self, function: Function, tensors: Sequence[Tensor], own: Sequence[Tensor]) -> _Recording | None:
        """What this call may be a repetition of; None where it runs as it is."""
        if not torch.is_grad_enabled() or threading.get_ident() != self._thread or saves_by_hooks():
            return None
        device = next((t.device for t in (*tensors, *own) if t.is_floating_point()), None)
        graphs = None if device is None else graphs_on(device)
        if graphs is None or device is None:
            self.reason = self.reason or f"{'nothing' if device is None else device.type} has none"
            return None
        if graphs.is_recording():
            return None
        key = _signature(tensors, own, graphs)
        found = self._recordings.get(key)
        if found is None:
            if self.reason is not None or not self._is_warm(key):
                return None
            try:
                made = _recorded(function, tensors, own, device, graphs)
            except Exception as error:  # whatever cannot be recorded runs as it is
                made = first_line(error)
            if isinstance(made, str):
                self.reason = made
                return None
            found = self._recordings[key] = made
        if found.fault is not None:
            self.reason = found.fault
            del self._recordings[key]
            return None
        return found if found.is_free else None

    def _is_warm(self, key: Any) -> bool:
        self._seen[key] += 1
        if self._seen[key] <= _WARM_UP:
            if len(self._seen) > _SEEN:
                self.reason = "the sizes of its inputs, or where its parameters are, change again and again"
            return False
        if len(self._recordings) >= _RECORDED:
            self.reason = f"{_RECORDED} kinds of calls are recorded already, and each keeps memory"
        return self.reason is None


def _signature(tensors: Sequence[Tensor], own: Sequence[Tensor], graphs: DeviceGraphs) -> tuple[Any, ...]:
    """What a recording takes for granted: kernels are recorded with their sizes and the addresses of the program's own tensors.

    Autocast, and whether gradients are on, decide which program it is (capture/regions.py).
    """
    return (
        tuple((t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors),
        tuple((t.data_ptr(), t.shape, t.dtype, t.device, t.requires_grad) for t in own),
        torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
        torch.backends.cudnn.enabled, torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark,
        graphs.stream(),
    )  # fmt: skip


def _recorded(
    function: Function, tensors: Sequence[Tensor], own: Sequence[Tensor], device: torch.device, graphs: DeviceGraphs
) -> _Recording | str:
    """The recording of a call like this one, or why there is none."""
    if any(t.device != device for t in (*tensors, *own)):
        return "it reads tensors of several devices"
    if len({t.untyped_storage().data_ptr() for t in tensors}) < len(tensors):
        return "two of its inputs share memory"
    inputs = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    if any(a.stride() != b.stride() for a, b in zip(inputs, tensors, strict=True)):
        return "an input has gaps between its elements"
    with _fresh_casts():
        result, forward = graphs.record(lambda: function(*inputs, *own))
    outputs, spec = pytree.tree_flatten(result)
    found = [t for t in outputs if isinstance(t, Tensor)]
    differentiable = [i for i, t in enumerate(outputs) if isinstance(t, Tensor) and t.requires_grad]
    read = {t.untyped_storage().data_ptr() for t in (*inputs, *own)}
    storages = [t.untyped_storage().data_ptr() for t in found]
    if len(differentiable) != 1:
        return "gradients come from several of its results, or none: which of them a loss reads is known too late"
    if len(read.union(storages)) < len(read) + len(storages):
        return "its results share memory with each other, or with what it reads"
    if any(t._version for t in inputs):
        return "it changes its input in place"
    of = outputs[differentiable[0]]
    dout = torch.zeros_like(of)
    everything = (*inputs, *own)
    places = {id(t): i for i, t in reversed(list(enumerate(everything))) if t.requires_grad}  # of a tied weight the first one
    needed = sorted(places.values())
    with torch.autocast(device.type, enabled=False), torch.enable_grad():
        gradients, backward = graphs.record(
            lambda: torch.autograd.grad(of, [everything[i] for i in needed], dout, allow_unused=True)
        )  # fmt: skip
    leaves = [t.detach() if isinstance(t, Tensor) else t for t in outputs]
    return _Recording(inputs, leaves, spec, differentiable[0], needed, forward, dout, gradients, backward)


@contextmanager
def _fresh_casts() -> Iterator[None]:
    """Weights are cast to autocast's dtype within the recording: a cast from before would be repeated with its old values."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class _Repeated(torch.autograd.Function):
    """A call as a repetition. One whose recording is not proved yet runs as it is, and the recording beside it."""

    @staticmethod
    def forward(ctx: Any, recording: _Recording, function: Function, inputs: int, *given: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.recording, ctx.ticket, ctx.step = recording, recording.take(), None
        if recording.proved:
            recording.repeat_forward(given[:inputs])
            leaves = [t.clone() if isinstance(t, Tensor) else t for t in recording.outputs]
        else:
            ctx.step = _Step(recording, function, given, inputs)
            leaves = [t.detach().clone() if isinstance(t, Tensor) else t for t in ctx.step.outputs]
        found = [(i, t) for i, t in enumerate(leaves) if isinstance(t, Tensor)]
        ctx.mark_non_differentiable(*(t for i, t in found if i != recording.differentiable))
        ctx.position = [i for i, _ in found].index(recording.differentiable)
        return tuple(t for _, t in found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *douts: Tensor | None) -> Any:
        recording, dout = ctx.recording, douts[ctx.position]
        if ctx.ticket.used:
            raise RuntimeError(
                "bnrestructure: backward through a device graph for the second time: what it kept is overwritten. "
                "Call bnrestructure.restructure(model) without graphs where retain_graph=True is needed"
            )
        ctx.ticket.used = True
        gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if dout is None:
            return tuple(gradients)
        if ctx.step is None:
            recording.repeat_backward(dout)
            found = [None if g is None else g.clone() for g in recording.gradients]
        else:
            found = ctx.step.gradients(dout)
        for i, gradient in zip(recording.needed, found, strict=True):
            gradients[3 + i] = gradient
        return tuple(gradients)


class _Step:
    """A step that runs as it is, by which a recording is proved: repeated first, for it must leave nothing behind."""

    def __init__(self, recording: _Recording, function: Function, given: Sequence[Tensor], inputs: int) -> None:
        self._recording = recording
        read = [t.detach().requires_grad_(t.requires_grad) if i < inputs else t for i, t in enumerate(given)]
        self._needed = [read[i] for i in recording.needed]
        buffers = [t for t in given[inputs:] if not t.requires_grad]
        before = [t.detach().clone() for t in buffers]
        with preserved_generators(given):  # the step is to draw the same numbers
            _poison(recording.outputs)
            recording.repeat_forward(given[:inputs])
        repeated = [t.detach().clone() for t in buffers]
        for t, value in zip(buffers, before, strict=True):
            t.data.copy_(value)
        with torch.enable_grad():
            self.outputs: list[Any] = pytree.tree_leaves(function(*read))
        recording.fault = _difference("result", self.outputs, recording.outputs) or _difference("buffer", buffers, repeated)

    def gradients(self, dout: Tensor) -> list[Tensor | None]:
        """Those of the step; where its recording's are the same, it is proved."""
        recording = self._recording
        of = self.outputs[recording.differentiable]
        found: list[Tensor | None] = list(torch.autograd.grad(of, self._needed, dout, allow_unused=True))
        if recording.fault is None:
            _poison(recording.gradients)
            recording.repeat_backward(dout)
            recording.fault = _difference("gradient", found, recording.gradients)
            recording.proved = recording.fault is None
        return found


def _poison(results: Sequence[Any]) -> None:
    """What a repetition leaves alone must not look right."""
    for t in results:
        if isinstance(t, Tensor) and t.is_floating_point():
            t.data.fill_(torch.nan)


def _difference(what: str, wanted: Sequence[Any], found: Sequence[Any]) -> str | None:
    """Where a repetition is not the step, in words; None where it is."""
    same = all(_agree(a, b) for a, b in zip(wanted, found, strict=True))
    return None if same else f"a repeated step has another {what} than the step itself"


def _agree(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is b or (type(a) is type(b) and a == b)
    if not a.is_floating_point() or not a.numel():
        return torch.equal(a, b)
    limit = _TOLERANCE[a.dtype] * float(a.detach().double().abs().nan_to_num().max())
    return torch.allclose(a.detach().double(), b.detach().double(), rtol=0.0, atol=limit, equal_nan=True)
