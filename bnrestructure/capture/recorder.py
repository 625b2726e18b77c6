"""Recording of one forward(): it runs on tensors without data, and every call of a PyTorch function or layer becomes a node of a graph.

Tensors are PyTorch's fake tensors, so Python code that asks what something is (isinstance, len, dim, dtype, a chunk's
parts) gets the answer that eager mode gives. What fake tensors cannot say, a tensor's *values*, ends the capture.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx.passes.shape_prop import TensorMetadata
from torch.overrides import TorchFunctionMode

from bnrestructure.capture.ambient import parametrizations_are_cached, saved_tensors_hooks
from bnrestructure.capture.calls import Constant
from bnrestructure.capture.containers import items, rebuilt, tensors_in
from bnrestructure.capture.own_tensors import OwnTensors
from bnrestructure.capture.side_effects import ambient_modes
from bnrestructure.capture.sizes import InputSize, SizeLog, TracedInt, TracedSize, is_traced
from bnrestructure.capture.spelling import (
    PLAIN_ANSWERS,
    PLAIN_FUNCTIONS,
    READS_VALUES,
    REFUSED,
    VALUES,
    article,
    call_keeps_shape,
    name_of,
    shown,
    spelt,
    takes_no_gradient,
)
from bnrestructure.capture.trail import Trail
from bnrestructure.core.errors import CaptureError
from bnrestructure.core.plain import plain
from bnrestructure.graph.provenance import provenance, remember
from bnrestructure.graph.targets import is_custom_call

__all__ = ["Recorder"]

_CONSTANTS = (
    int, float, bool, complex, str, type(None), type(Ellipsis), torch.dtype, torch.device, torch.memory_format, torch.layout,
)  # fmt: skip


@dataclasses.dataclass
class _Place:
    """Where a tensor of the forward comes from: a node, or a part of one that is looked up when the tensor is first used."""

    node: fx.Node
    steps: tuple[Any, ...] = ()


#: See :meth:`Recorder.call`.
Check = Callable[[Any], Callable[[Any], Any] | None]


class Recorder(TorchFunctionMode):
    """Adds a node to ``graph`` for each PyTorch function called while it is the active mode; ``call`` is for calls of other kinds."""

    def __init__(self, root: nn.Module, fake: FakeTensorMode) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.fake = fake
        self.sizes = SizeLog()
        self.trail = Trail()
        self.depth = 0
        self._modes, self._turned, self._hooks = ambient_modes(), False, saved_tensors_hooks()
        self._places: dict[int, _Place] = {}
        self._requires: dict[int, bool] = {}
        self._kept: list[Any] = []  # tensors whose id is a key above
        self._doubles: dict[int, Tensor] = {}  # id of a real tensor -> the fake one that stands for it
        self.own = OwnTensors(root)
        self._shaped_like: dict[int, Tensor] = {}
        self._given: dict[int, int] = {}  # which of the forward's tensors one is
        self._memory: dict[int, int] = {}  # a storage of ours -> the one that it stands for

    # --- what the forward is given --------------------------------------------------------------------------------------

    def placeholder(self, name: str, real: Tensor) -> Tensor:
        """An argument of the graph: a fake tensor like ``real``."""
        double = self.double(real)
        vars(double).update(vars(real), _is_param=isinstance(real, nn.Parameter))
        node = self.graph.placeholder(name)
        self._given[id(double)] = len(self._given)
        self._put(double, _Place(node), real.requires_grad)
        self._describe(node, double)
        return double

    def double(self, real: Tensor) -> Tensor:
        """A fake tensor like ``real``, that no node makes yet."""
        with torch.no_grad(), self.fake:
            if real.layout is not torch.strided:
                return self.fake.from_tensor(real.detach())
            return torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device=real.device)

    def _put(self, tensor: Tensor, place: _Place, requires_grad: bool) -> None:
        self._places[id(tensor)] = place
        self._requires[id(tensor)] = requires_grad
        self._kept.append(tensor)

    def _describe(self, node: fx.Node, tensor: Tensor) -> None:
        """What passes may know of the tensor that a node makes: its metadata, and whose memory it is."""
        node.meta["tensor_meta"] = _metadata(tensor)
        remember(node, storages=frozenset({self._storage(tensor)}))

    def _storage(self, tensor: Tensor) -> int:
        own = tensor.untyped_storage()._cdata
        return self._memory.get(own, own)

    # --- calls ----------------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.depth:
            return func(*args, **kwargs)
        name = name_of(func)
        if name == "_set_grad_enabled":  # announced as if it were an operation; check_modes() sees what it did
            self._turned = True
            return func(*args, **kwargs)
        if name in READS_VALUES:
            raise CaptureError(VALUES)
        if name in REFUSED:
            raise CaptureError(f"its forward {REFUSED[name]}")
        if kwargs.get("out") is not None:
            raise CaptureError(f"its forward calls {name} with memory to write to (out=)")
        if getattr(func, "__name__", "") == "__get__":
            return self._property(name, func, args[0])
        if getattr(func, "__name__", "") == "__set__":
            raise CaptureError(f"its forward assigns to {name} of a tensor")
        if args and isinstance(args[0], Tensor):
            if name in ("size", "numel", "nelement", "__len__"):
                return self._size(name, args, kwargs)
            if name in ("is_contiguous", "stride"):
                return self._decided(func, args, kwargs)
        if (name in PLAIN_ANSWERS and len(args) == 1 and not kwargs) or name in PLAIN_FUNCTIONS:
            return func(*self._concrete(args), **self._concrete(kwargs))
        op, target, operands, run = spelt(func, args, kwargs)
        return self._recorded(op, target, operands, kwargs, run)

    def _property(self, name: str, func: Any, tensor: Tensor) -> Any:
        if name == "shape":
            return self._shape(tensor)
        if name == "requires_grad":
            return self._requires[id(self._fake_of(tensor))]
        if name in PLAIN_ANSWERS:
            return func(self._fake_of(tensor))
        if name == "nbytes":
            return self._decided(func, (tensor,), {})
        return self._recorded("call_function", getattr, (tensor, name), {}, lambda t, _: func(t))

    def _decided(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.sizes.decide()
        return func(*self._concrete(args), **self._concrete(kwargs))

    def call(
        self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[..., Any], *,
        learns: bool = False, opaque: bool = True, shape_stays: bool = False, check: Check | None = None,
    ) -> Any:  # fmt: skip
        """Record a call that PyTorch does not announce (of a layer, of a custom Function), and ``run`` it on the fake tensors.

        learns    it has parameters that take gradients
        opaque    whose memory it hands back may differ from call to call
        shape_stays    its result has the shape of its first argument
        check     what makes a function of the result, or None, that is to be called with each later result before anybody gets it
        Raises CaptureError where it changes an argument's memory without handing it back: nothing in the graph would say so.
        """
        with self.unseen():
            given = [(t, t._version, self.node_of(t)) for t in map(self._fake_of, tensors_in((args, kwargs)))]
            node, result = self._run(op, target, args, kwargs, run, learns, shape_stays, check)
            if opaque and node is not None:
                called = node if node.op == op else node.all_input_nodes[0]  # what is checked
                for n in {called, node}:
                    remember(n, storages=(provenance(node).storages or frozenset()) | {self._storage(t) for t, *_ in given})
            for t, version, source in given:
                if t._version != version:
                    if node is None or not any(t is r for r in tensors_in(result)):
                        raise CaptureError(f"{shown(target)} changes a tensor in place that it is given")
                    remember(node, overwrites=node.all_input_nodes.index(source))
        return result

    def _recorded(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[..., Any]) -> Any:
        with self.unseen():
            return self._run(op, target, args, kwargs, run)[1]

    def _run(
        self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[..., Any], learns: bool = False,
        shape_stays: bool = False, check: Check | None = None,
    ) -> tuple[fx.Node | None, Any]:  # fmt: skip
        """(a call's node, or None where its result is a constant; the result on fake tensors)."""
        nodes, values = self._lowered(args, target)
        named, options = self._lowered(kwargs, target)
        given = {id(t): t._version for t in tensors_in((values, options))}
        gradients = torch.is_grad_enabled()
        depends = learns or any(self._requires.get(i, False) for i in given)
        self.check_modes(depends)
        requires = gradients and depends and not takes_no_gradient(op, target, args)
        torch._C._set_grad_enabled(False)
        try:
            with self.fake:
                result = run(*values, **options)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise CaptureError(f"{VALUES} ({shown(target)})") from error
        finally:
            torch._C._set_grad_enabled(gradients)
        if isinstance(result, _CONSTANTS) and result is not None:
            self.sizes.decide()
            return None, result
        node = self.graph.create_node(op, target, nodes, named)  # now, for an error that the forward catches leaves no node
        node.meta["nn_module_stack"] = self.trail.stack()
        if (checking := None if check is None else check(result)) is not None:
            node = self.graph.create_node("call_function", checking, (node,))
            node.meta["nn_module_stack"] = self.trail.stack()
        result = self._results(node, result, given, requires)
        if values and (shape_stays or call_keeps_shape(op, target)):
            self._note_shape(result, values[0])
        return node, result

    def check_modes(self, depends: bool = True) -> None:
        """Raise CaptureError where gradients, autocast or hooks are not what they were when the forward began.

        Gradients and hooks are no matter for a call that does not ``depend`` on a tensor that needs one.
        """
        modes = ambient_modes()
        if modes[1:] != self._modes[1:] or (depends and modes[0] != self._modes[0]):
            if not self._turned and modes[1:] == self._modes[1:] and not torch.is_inference_mode_enabled():
                raise CaptureError("its forward calls a custom autograd Function by another name than its apply()")
            raise CaptureError("its forward turns gradients or autocast on or off for a part of itself")
        if depends and saved_tensors_hooks() != self._hooks:
            raise CaptureError("its forward puts hooks on what a part of itself saves for backward")
        if parametrizations_are_cached():
            raise CaptureError("its forward caches parametrizations for a part of itself")

    def modes_differ(self) -> bool:
        """Whether gradients or autocast are not what they were when the forward began."""
        return ambient_modes() != self._modes

    def depends(self, values: Any) -> bool:
        """Whether a tensor among these needs a gradient."""
        return any(self._requires[id(self._fake_of(t))] for t in tensors_in(values))

    def _results(self, node: fx.Node, result: Any, given: dict[int, int], requires_grad: bool) -> Any:
        """``result`` with the place of every tensor in it noted. A tensor that was only handed through becomes one of its own."""
        remember(node, storages=frozenset(self._storage(t) for t in tensors_in(result)))
        if isinstance(result, Tensor):
            node.meta["tensor_meta"] = _metadata(result)
            called = node.op == "call_module" or is_custom_call(node)
            remember(node, hands_through=not called and given.get(id(result)) == result._version)

        def visit(value: Any, steps: tuple[Any, ...]) -> Any:
            if isinstance(value, Tensor):
                requires = requires_grad and (value.is_floating_point() or value.is_complex())
                if id(value) in given and value._version == given[id(value)]:
                    value = self._passed_on(value)
                self._put(value, _Place(node, steps), requires or self._requires.get(id(value), False))
                return value
            if isinstance(value, tuple | list | dict):
                return rebuilt(value, {key: visit(item, (*steps, key)) for key, item in items(value)})
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                for field in dataclasses.fields(value):
                    visit(getattr(value, field.name), (*steps, field))
            return value

        return visit(result, ())

    def _passed_on(self, tensor: Tensor) -> Tensor:
        """Another tensor for the same memory: what a call hands back as it was is the call's result all the same."""
        double = self.double(tensor)
        self._memory[double.untyped_storage()._cdata] = self._storage(tensor)
        return double

    # --- from what Python code has to what a graph holds ---------------------------------------------------------------------

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node of a tensor that the forward has. Raises CaptureError for one that came from elsewhere."""
        place = self._places.get(id(tensor)) or self._known(tensor)
        for step in place.steps:
            arguments = (place.node, step.name if isinstance(step, dataclasses.Field) else step)
            place.node = self.graph.call_function(getattr if isinstance(step, dataclasses.Field) else operator.getitem, arguments)
        if place.steps:
            place.steps = ()
            self._describe(place.node, tensor)
            place.node.meta["nn_module_stack"] = self.trail.stack()
        return place.node

    def _known(self, tensor: Tensor) -> _Place:
        """The place of a real tensor: an attribute of the module tree, or a constant that the forward has from somewhere else."""
        double = self._doubles.get(id(tensor))
        if double is not None:
            return self._places[id(double)]
        if isinstance(tensor, torch._subclasses.FakeTensor):
            raise CaptureError("its forward uses a tensor that was made where the tracer does not look")
        path = self.own.path_of(tensor)
        if path is not None:
            node = self.graph.create_node("get_attr", path)
        else:
            node = self.graph.create_node("call_function", Constant(tensor, f"constant_{len(self._doubles)}"), (), {})
        double = self.double(tensor)
        self._describe(node, double)
        self._doubles[id(tensor)] = double
        self._kept.append(tensor)
        self._put(double, _Place(node), tensor.requires_grad)
        return self._places[id(double)]

    def _fake_of(self, tensor: Tensor) -> Tensor:
        if id(tensor) in self._places:
            return tensor
        self._known(tensor)
        return self._doubles[id(tensor)]

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """What is called meanwhile is not part of the forward."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def double_of(self, real: Tensor) -> Tensor:
        """The fake tensor that stands for a real one, a new one where there is none yet."""
        return self._doubles[id(real)] if id(real) in self._doubles else self.double(real)

    def lowered(self, value: Any, what: str) -> Any:
        """``value`` for a node's arguments: nodes for tensors and for numbers that follow from sizes."""
        return self._lowered(value, what)[0]

    def _lowered(self, value: Any, target: Any) -> tuple[Any, Any]:
        """(for a node's arguments, for a call on fake tensors)."""
        if isinstance(value, Tensor):
            return self.node_of(value), self._fake_of(value)
        if is_traced(value):
            return value.fx_node, value.value
        if isinstance(value, tuple | list | dict):
            pairs = {key: self._lowered(item, target) for key, item in items(value)}
            first, second = ({k: p[i] for k, p in pairs.items()} for i in (0, 1))
            return rebuilt(value, first), rebuilt(value, second)
        if isinstance(value, slice):
            parts = [self._lowered(part, target) for part in (value.start, value.stop, value.step)]
            return slice(*[p[0] for p in parts]), slice(*[p[1] for p in parts])
        value = plain(value)
        if isinstance(value, _CONSTANTS):
            return value, value
        raise CaptureError(f"its forward calls {shown(target)} with {article(type(value).__name__)}")

    def _concrete(self, value: Any) -> Any:
        return self._lowered(value, "a question")[1] if value else value

    # --- sizes ----------------------------------------------------------------------------------------------------------

    def _note_shape(self, result: Any, source: Any) -> None:
        """Sizes of ``result`` are read from ``source``, where both have one shape: no tensor has to be in memory for its size alone."""
        if isinstance(result, Tensor) and isinstance(source, Tensor) and result is not source:
            self._shaped_like[id(result)] = self._shaped_like.get(id(source), source)

    def _shape(self, tensor: Tensor) -> TracedSize:
        fake = self._fake_of(tensor)
        source = self._shaped_like.get(id(fake), fake)
        return TracedSize(self._number(int(n), source, i) for i, n in enumerate(fake.shape))

    def _size(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        shape = self._shape(args[0])
        if name == "__len__":
            return shape[0] if shape else len(args[0])
        if name != "size":
            return shape.numel()
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        return shape if dim is None else shape[int(dim)]

    def _number(self, value: int, tensor: Tensor, dim: int) -> TracedInt:
        origin = InputSize(self._given[id(tensor)], dim) if id(tensor) in self._given else None
        return TracedInt(value, lambda: self.graph.call_method("size", (self.node_of(tensor), dim)), self.sizes, origin)


def _metadata(t: Tensor) -> TensorMetadata:
    return TensorMetadata(t.shape, t.dtype, t.requires_grad, t.stride() if t.layout is torch.strided else (), None, t.is_quantized, {})
