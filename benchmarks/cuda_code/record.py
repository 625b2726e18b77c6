"""A training step of a restructured model on meta tensors: every kernel launch and every PyTorch operation that a GPU would be given.

Nothing is computed, so any batch fits. Autocast for a device that is not there does nothing in PyTorch; here it is pretended.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bnrestructure.capture import tracer
from bnrestructure.capture.program import Program
from bnrestructure.capture.regions import Options
from bnrestructure.core.memory_format import in_channels_last, is_channels_last, to_channels_last
from bnrestructure.kernels import cuda, registry
from bnrestructure.kernels.cuda.launch import Launch, received_by
from bnrestructure.passes.restore_formats import RESTORE_FORMATS
from bnrestructure.plan.survey import take_survey

__all__ = ["Product", "Step", "prepared", "pretending", "record", "rewritten"]

#: Operations that launch nothing.
_FREE = frozenset({
    "view", "_unsafe_view", "permute", "unbind", "select", "slice", "narrow", "as_strided", "detach", "alias", "t", "transpose", "expand",
    "unsqueeze", "empty", "empty_like", "new_empty", "empty_strided", "set_", "view_as", "reshape", "squeeze", "as_strided_", "resize_",
    "split", "split_with_sizes", "new_empty_strided", "is_same_size", "device",
})  # fmt: skip


@dataclass(frozen=True)
class Product:
    """A convolution that PyTorch itself runs: bytes that it must move, and its operations."""

    name: str
    moved: int
    operations: int


@dataclass
class Step:
    """What one training step launches. ``forward``: how many of ``launches`` the forward half has."""

    launches: list[Launch] = field(default_factory=list)
    forward: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    products: list[Product] = field(default_factory=list)

    def receive(self, launch: Launch) -> None:
        """Keep a launch, with other tensors for its arguments: a gradient that somebody holds would be copied by whoever keeps it."""
        arguments = tuple(a.detach() if isinstance(a, Tensor) else a for a in launch.arguments)
        self.launches.append(replace(launch, arguments=arguments))


class _Watch(TorchDispatchMode):
    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = function._schema.name.partition("::")[2]
        if name not in _FREE:
            self.step.operations[name] += _together(*args[:2]) if name == "_foreach_copy_" else 1
        found = function(*args, **(kwargs or {}))
        if name == "convolution":
            self.step.products.append(_product("forward", args[0], args[1], found))
            if is_channels_last(args[0]):  # cuDNN answers in its input's format, the meta device's convolution does not
                found = in_channels_last(found)
        elif name == "convolution_backward":
            halves = [half for half, wanted in zip(("dgrad", "wgrad"), args[-1], strict=False) if wanted]
            self.step.products.extend(_product(half, args[1], args[2], args[0]) for half in halves)
        return found


def _together(into: list[Tensor], of: list[Tensor]) -> int:
    """Launches of a foreach that copies: one each where strides differ, else one for 64 tensors, or 320 pieces of 65536 values."""
    if any(a.stride() != b.stride() for a, b in zip(into, of, strict=True)):
        return len(into)
    return max(math.ceil(len(into) / 64), math.ceil(sum(math.ceil(t.numel() / 65536) for t in into) / 320))


def _product(name: str, x: Tensor, weight: Tensor, y: Tensor) -> Product:
    moved = sum(t.numel() * t.element_size() for t in (x, y))
    return Product(name, moved, 2 * y.numel() * weight[0].numel())


@contextmanager
def pretending() -> Iterator[Callable[[bool], None]]:
    """Meta tensors get the CUDA kernels, and what is yielded switches autocast to bf16 on and off."""
    on = [False]
    conv2d, linear = F.conv2d, F.linear

    def cast(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
            dtype = torch.bfloat16 if on[0] else x.dtype
            return function(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), *args, **kwargs)

        return run

    with ExitStack() as stack:
        for patch in (
            mock.patch.dict(registry._DEVICES, {"meta": "bnrestructure.kernels.cuda"}),
            mock.patch.object(cuda.CudaKernels, "unavailable_reason", return_value=None),
            mock.patch.object(tracer, "_random_state", return_value=None),
            mock.patch.object(tracer, "_same_random_state", return_value=True),
            mock.patch.object(tracer, "_set_random_state", return_value=None),
            mock.patch.object(torch, "is_autocast_enabled", side_effect=lambda *_: on[0]),
            mock.patch.object(torch, "get_autocast_dtype", return_value=torch.bfloat16),
            mock.patch.object(torch, "set_autocast_enabled", side_effect=lambda _, value: on.__setitem__(0, value)),
            mock.patch.object(F, "conv2d", cast(conv2d)),
            mock.patch.object(F, "linear", cast(linear)),
        ):
            stack.enter_context(patch)
        registry.forget_answers()
        try:
            yield lambda value: on.__setitem__(0, value)
        finally:
            registry.forget_answers()


def prepared(name: str) -> nn.Module:
    """A torchvision model on meta, in channels_last and in training mode."""
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, **({"aux_logits": False} if name == "inception_v3" else {}))
    model, _ = to_channels_last(model, ())
    return model.train()


def rewritten(model: nn.Module, x: Tensor, switch: Callable[[bool], None]) -> Callable[[Tensor], Tensor]:
    """The forward of the rewritten graph of ``model`` (see :func:`prepared`), within :func:`pretending`, which has given ``switch``.

    On the meta device a restructured model runs its own forward, as exporters want it.
    """
    switch(True)
    (region,) = take_survey(model, Options(), (x,)).regions
    switch(False)
    RESTORE_FORMATS(region.after)
    program = Program(region.after, None, type(model).__name__)

    def forward(x: Tensor) -> Tensor:
        switch(True)
        try:
            found: Tensor = program(model, (x,))
        finally:
            switch(False)
        return found

    return forward


def record(model: nn.Module, batch: int, size: int = 224) -> Step:
    """One training step of ``model`` in bf16 autocast on images [batch, 3, size, size]."""
    x = torch.empty(batch, 3, size, size, device="meta").contiguous(memory_format=torch.channels_last)
    with pretending() as switch:
        forward = rewritten(model, x, switch)
        for _ in range(2):  # the first one makes known which weights are cast
            step = Step()
            for parameter in model.parameters():
                parameter.grad = None
            with received_by(step.receive), _Watch(step):
                y = forward(x)
                step.forward = len(step.launches)
                y.float().sum().backward()
    return step
