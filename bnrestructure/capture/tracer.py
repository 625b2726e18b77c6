"""Symbolic capture of one module's forward() into a torch.fx graph, or a CaptureError that says what it could not follow.

Beyond torch.fx's own tracer: tensors say that they are tensors to ``isinstance``; buffers are read at run time; arguments keep their pytree
structure; and whatever tracing would silently freeze - random numbers drawn, attributes written, activation checkpoints -
makes the capture fail instead.
"""

from __future__ import annotations

import operator
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils import checkpoint as checkpoint_module

from bnrestructure.capture.side_effects import Attributes, ambient_modes
from bnrestructure.core.errors import CaptureError
from bnrestructure.graph.boundaries import boundary_reason, is_library_leaf

__all__ = ["Arguments", "capture", "is_capturing"]

_active = threading.local()
_lock = threading.RLock()

_RANDOM = "its forward draws random numbers outside the graph (a frozen draw would be wrong)"
_NOT_TENSOR_METHODS = {"size", "dim", "numel", "item", "stride", "tolist", "ndimension", "nelement", "element_size"}
_ARITHMETIC = {
    operator.add, operator.iadd, operator.sub, operator.isub, operator.mul, operator.imul, operator.truediv, operator.neg,
    operator.pow, operator.matmul,
}  # fmt: skip


def is_capturing() -> bool:
    """Whether this thread is inside a capture: restructured modules then run their own forward, to be traced through."""
    return getattr(_active, "depth", 0) > 0


class Arguments:
    """The structure of a call: which leaves of (args, kwargs) are tensors, which are constants of the captured graph.

    Two calls with equal ``key`` share a graph. Leaves that are neither tensors nor plain constants raise CaptureError.
    """

    _CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.memory_format)

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, self.spec = pytree.tree_flatten((args, kwargs))
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.is_tensor = tuple(isinstance(leaf, Tensor) for leaf in leaves)
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, *self._CONSTANTS)):
                raise CaptureError(f"an argument of type {type(leaf).__name__} is neither a tensor nor a plain constant")
        constants = tuple((type(c), c) for c in self.constants)
        self.key = (self.is_tensor, constants, self.spec)

    @classmethod
    def assumed(cls, forward: Callable[..., Any]) -> Arguments:
        """Where no call has been seen: each required parameter is one tensor, the others keep their defaults."""
        import inspect

        parameters = list(inspect.signature(forward).parameters.values())[1:]
        required = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        keyword = {p.name: torch.empty(0) for p in parameters if p.default is p.empty and p.kind is p.KEYWORD_ONLY}
        return cls(tuple(torch.empty(0) for _ in required), keyword)

    def unflatten(self, tensors: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with ``tensors`` in the places of the tensor leaves."""
        given = iter(tensors)
        leaves = [next(given) if t else c for t, c in zip(self.is_tensor, self.constants, strict=True)]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs


class _TensorProxy(fx.Proxy):
    """A proxy known to stand for a tensor, and that says so: ``isinstance(x, torch.Tensor)`` in a forward() takes the right branch."""

    _is_param = False
    __class__ = property(lambda self: Tensor)


class _Constant:
    """A tensor made inside forward() from constants alone, as a function that a graph can call."""

    def __init__(self, value: Tensor, name: str) -> None:
        self.value = value
        self.__name__ = self.__qualname__ = name
        self.__module__ = "bnrestructure.capture"

    def __call__(self) -> Tensor:
        return self.value.clone()  # forward() makes it anew in every call, and may write to it


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, root: nn.Module, arguments: Arguments, opaque: set[nn.Module], watch_random: bool) -> None:
        super().__init__()
        self.attributes = Attributes(root)
        self.modes = ambient_modes()
        self.output_spec: pytree.TreeSpec | None = None
        self.arguments = arguments
        self.opaque = opaque
        self.watch_random = watch_random
        self.random_before = _random_state() if watch_random else ()
        self.constants: list[_Constant] = []
        self.stack: list[nn.Module] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_library_leaf(m) or m in self.opaque or boundary_reason(m) is not None

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        count = sum(self.arguments.is_tensor)
        names = ["x"] if count == 1 else [f"x{i}" for i in range(count)]
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in names]
        args, kwargs = self.arguments.unflatten(proxies)

        def traced() -> Any:
            result = root_fn(self.root, *args, **kwargs)
            left, spec = pytree.tree_flatten((args, kwargs))
            if spec != self.arguments.spec or [id(a) for a in left if isinstance(a, fx.Proxy)] != [id(p) for p in proxies]:
                raise CaptureError("its forward writes to a container that it is given")
            return self._plain(result)

        return traced, []

    def _plain(self, result: Any) -> Any:
        """The result in containers that fx keeps; where it would not (an OrderedDict), its leaves, and the structure apart."""
        if _fx_keeps(result):
            return result
        leaves, self.output_spec = pytree.tree_flatten(result)
        return leaves

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self._check_modes()
        return super().create_node(*args, **kwargs)

    def _check_modes(self) -> None:
        if ambient_modes() != self.modes:
            raise CaptureError("its forward turns gradients or autocast on or off for a part of itself")

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if not is_capturing():  # another thread: torch.fx patches nn.Module for the whole process
            return forward(*args, **kwargs)
        self._check_modes()  # here, while the module that turned them is still the innermost on the stack
        if self.is_leaf_module(m, "") and self.attributes.changed_on(m):
            raise CaptureError(f"its forward writes to attributes of a {type(m).__name__} before calling it")
        self.stack.append(m)
        result = super().call_module(m, forward, args, kwargs)
        if self.watch_random and not _same_random_state(_random_state(), self.random_before):
            raise CaptureError(_RANDOM)
        self.stack.pop()  # not reached on an error: the innermost module being traced is then the one at fault
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if not is_capturing():
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        if not _stands_for_tensor(node, self.root):
            return fx.Proxy(node, self)
        node.meta["bnr_tensor"] = True
        return _TensorProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and not self._is_attribute(a):
            constant = _Constant(a, f"constant_{len(self.constants)}")
            self.constants.append(constant)
            return self.create_node("call_function", constant, (), {})
        return super().create_arg(a)

    def _is_attribute(self, tensor: Tensor) -> bool:
        return tensor in self.tensor_attrs or any(tensor is b for b in self.root.buffers())


def _fx_keeps(value: Any) -> bool:
    """Whether a graph's output can hold this nest of containers as it is (it would make a plain dict of an OrderedDict)."""
    if isinstance(value, fx.Proxy):
        return True
    if isinstance(value, dict):
        return type(value) is dict and all(_fx_keeps(v) for v in value.values())
    if isinstance(value, list | tuple):
        return (type(value) in (list, tuple) or hasattr(value, "_fields")) and all(_fx_keeps(v) for v in value)
    return type(value) not in pytree.SUPPORTED_NODES


def _stands_for_tensor(node: fx.Node, root: nn.Module) -> bool:
    if node.op in ("placeholder", "get_attr"):
        return True
    if node.op == "call_module":
        return is_library_leaf(root.get_submodule(str(node.target)))
    if node.op == "call_method":
        return node.target not in _NOT_TENSOR_METHODS and _known_tensor(node.args[0])
    if node.target in _ARITHMETIC or node.target is operator.getitem:
        return any(_known_tensor(a) for a in (node.args[:1] if node.target is operator.getitem else node.args))
    module = getattr(node.target, "__module__", None) or ""
    return node.op == "call_function" and (
        module.startswith(("torch.nn.functional", "torch._C._nn")) or node.target in (torch.cat, torch.relu, torch.flatten)
    )


def _known_tensor(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument.meta.get("bnr_tensor", False)


def _refusing(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """``checkpoint``, but a CaptureError in the thread that captures; others may train meanwhile."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if is_capturing():
            raise CaptureError("it uses activation checkpointing (torch.utils.checkpoint)")
        return checkpoint(*args, **kwargs)

    return refuse


@contextmanager
def _no_checkpoints() -> Iterator[None]:
    """Make any activation checkpoint met while tracing a CaptureError, by whichever name the model imported it."""
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


def _random_state() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    return (torch.get_rng_state(), random.getstate(), None if numpy is None else numpy.random.get_state(legacy=False))


def _same_random_state(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return torch.equal(a[0], b[0]) and a[1] == b[1] and str(a[2]) == str(b[2])


def _set_random_state(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    if state[2] is not None:
        sys.modules["numpy"].random.set_state(state[2])


def capture(
    module: nn.Module, forward: Callable[..., Any], arguments: Arguments
) -> tuple[fx.GraphModule, dict[nn.Module, str]]:
    """The graph of ``forward(module, ...)`` for calls of this structure, with its submodules' training flags as they are.

    Placeholders are the tensor leaves, in order. torch's own layers and boundary modules stay calls; everything else is traced
    through, but for submodules that cannot be: those stay calls too, and the second result says why for each. The module
    is left as it was. Raises CaptureError naming what in the module's *own* forward could not be followed.
    """
    opaque: dict[nn.Module, str] = {}
    watch_random = False
    with _lock:
        while True:
            tracer = _Tracer(module, arguments, set(opaque), watch_random)
            try:
                graph = _trace(tracer, module, forward)
                break
            except CaptureError as error:
                if str(error) == _RANDOM and not watch_random:
                    watch_random = True  # trace once more, looking after each submodule, to learn which one draws
                elif tracer.stack:
                    opaque[tracer.stack[-1]] = str(error)
                else:
                    raise
    gm = fx.GraphModule(module, graph, class_name=type(module).__name__)
    gm.meta["bnr_output_spec"] = tracer.output_spec
    return gm, opaque


def _trace(tracer: _Tracer, module: nn.Module, forward: Callable[..., Any]) -> fx.Graph:
    """torch.fx's tracing, of the given forward function instead of the (perhaps swapped) class's own, less its side effects."""
    create_args = tracer.create_args_for_root
    tracer.create_args_for_root = lambda _, is_module, concrete_args=None: create_args(forward, is_module)  # type: ignore[assignment]
    rng = _random_state()
    _active.depth = getattr(_active, "depth", 0) + 1
    try:
        with _no_checkpoints(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = tracer.trace(module)
    except CaptureError:
        raise
    except Exception as error:  # whatever user code raises under symbolic tracing is a reason, not a fault of ours
        lines = str(error).strip().splitlines()
        raise CaptureError(f"the tracer cannot follow its forward: {lines[0] if lines else type(error).__name__}") from error
    finally:
        _active.depth -= 1
        changed = tracer.attributes.restore()
        drawn = not _same_random_state(_random_state(), rng)
        _set_random_state(rng)
    if changed is not None:
        owner, key = changed
        tracer.stack[:] = [owner] if owner is not module else []
        raise CaptureError(f"its forward writes the attribute {key!r}")
    if drawn:
        raise CaptureError(_RANDOM)
    return graph
