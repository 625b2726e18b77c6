"""What a function that PyTorch announces to a mode is to a graph: a question, an operation and its spelling, or a reason to refuse."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnrestructure.graph import activations

__all__ = [
    "PLAIN_ANSWERS",
    "PLAIN_FUNCTIONS",
    "READS_VALUES",
    "REFUSED",
    "VALUES",
    "article",
    "call_keeps_shape",
    "name_of",
    "shown",
    "spelt",
    "takes_no_gradient",
]

#: What is said of a forward that calls any of those below, or something that does.
VALUES = "its forward reads the values of a tensor"
#: Methods and properties whose result follows from the values of a tensor.
READS_VALUES = {
    "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__", "data_ptr", "__contains__",
    "is_nonzero", "equal", "allclose",
}  # fmt: skip
#: What a graph cannot take over from a forward.
REFUSED = {
    "register_hook": "puts a hook on a tensor", "register_post_accumulate_grad_hook": "puts a hook on a tensor",
    "backward": "runs a backward pass", "grad": "reads a gradient", "grad_fn": "asks how a tensor came about",
    "is_leaf": "asks how a tensor came about",
    "_version": "asks for a tensor's version", "set_": "gives a tensor new memory", "untyped_storage": "reaches for a tensor's memory",
    "storage": "reaches for a tensor's memory",
    "storage_offset": "asks where in its memory a tensor begins", "requires_grad_": "changes requires_grad",
}  # fmt: skip
#: Questions whose answer no size decides: properties, and methods without arguments.
PLAIN_ANSWERS = {
    "dim", "ndimension", "ndim", "dtype", "device", "layout", "itemsize", "element_size", "type", "get_device", "names", "has_names",
    "is_floating_point", "is_complex", "is_signed", "is_conj", "is_neg", "is_inference", "is_pinned", "is_shared", "is_coalesced",
    "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_sparse_csr", "is_quantized", "is_nested", "is_mkldnn", "is_mps", "is_xla", "is_xpu",
    "is_vulkan", "is_ipu", "is_mtia", "is_maia",
}  # fmt: skip
#: Functions of several tensors of which the same is true.
PLAIN_FUNCTIONS = {"result_type", "can_cast", "is_same_size"}
#: How the names of functions end whose result takes no gradient.
_CONSTANT_RESULTS = ("detach", "_like")
#: Methods as torch.fx spells them where an expression stands for them.
_OPERATORS = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "matmul": operator.matmul, "neg": operator.neg,
    "__getitem__": operator.getitem, "__setitem__": operator.setitem, "__eq__": operator.eq, "__ne__": operator.ne,
    "__truediv__": operator.truediv, "div": operator.truediv, "__floordiv__": operator.floordiv, "__mod__": operator.mod,
    "__pow__": operator.pow, "__and__": operator.and_, "__or__": operator.or_, "__xor__": operator.xor, "__invert__": operator.invert,
    "__lshift__": operator.lshift, "__rshift__": operator.rshift,
}  # fmt: skip
_REFLECTED = {
    "__rsub__": operator.sub, "__rdiv__": operator.truediv, "__rtruediv__": operator.truediv, "__rpow__": operator.pow,
    "__rmatmul__": operator.matmul, "__rfloordiv__": operator.floordiv,
    "__rmod__": operator.mod, "__rmul__": operator.mul, "__radd__": operator.add,
}  # fmt: skip
#: Functions whose result has the shape of their first argument.
_SAME_SHAPE = activations.NAMES | {"batch_norm", "dropout", "clone", "contiguous", "detach"}


def name_of(func: Any) -> str:
    """A method's or function's name; a property's own, not that of its getter or setter."""
    name = getattr(func, "__name__", type(func).__name__)
    if name in ("__get__", "__set__"):
        return getattr(func.__self__, "__name__", name)
    return name


def takes_no_gradient(op: str, target: Any, args: tuple[Any, ...]) -> bool:
    """Whether the result of such a node needs no gradient, whatever it is called with."""
    if target is getattr and len(args) == 2 and args[1] == "data":
        return True
    name = _name_in_pytorch(op, target)
    return name.endswith(_CONSTANT_RESULTS) or name.startswith("new_")


def call_keeps_shape(op: str, target: Any) -> bool:
    """Whether the result of such a node has the shape of its first argument, whatever it is called with. It knows nothing of layers."""
    return _name_in_pytorch(op, target) in _SAME_SHAPE


def _name_in_pytorch(op: str, target: Any) -> str:
    """The name of a function or method of PyTorch's own that a node calls; "" of any other, and of a layer, whose target is its path."""
    if op == "call_method":
        return str(target)
    is_operator = isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket)
    foreign = not str(target).startswith("aten.") if is_operator else not _is_pytorchs(target)
    return "" if op != "call_function" or foreign else str(getattr(target, "__name__", "")).partition(".")[0]


def _is_pytorchs(function: Any) -> bool:
    package = (getattr(function, "__module__", None) or "torch").partition(".")[0]
    return package in ("torch", "_operator", "operator", "builtins", "math")


def spelt(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any, tuple[Any, ...], Callable[..., Any]]:
    """(a node's op, its target, its arguments, the function to call with these), as torch.fx would record the expression."""
    name = name_of(func)
    if name in _REFLECTED and len(args) == 2:
        return "call_function", _REFLECTED[name], args[::-1], lambda a, b: func(b, a)
    if not _is_method(func, name):
        return "call_function", func, args, func
    if func is vars(Tensor).get(f"__{name}__"):
        name = f"__{name}__"  # an operator that PyTorch wraps: __pow__ calls itself pow
    if name in _OPERATORS and not kwargs and len(args) <= (3 if name == "__setitem__" else 2):
        return "call_function", _OPERATORS[name], args, func
    return "call_method", name, args, func


def _is_method(func: Any, name: str) -> bool:
    if isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return False
    own = getattr(func, "__objclass__", None) in (torch._C.TensorBase, Tensor)
    return own or func in (vars(Tensor).get(name), vars(Tensor).get(f"__{name}__"))


def shown(target: Any) -> str:
    """A node's target as a reason names it."""
    return target if isinstance(target, str) else str(getattr(target, "__qualname__", None) or getattr(target, "__name__", target))


def article(name: str) -> str:
    """``an int``, ``a dict``."""
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
