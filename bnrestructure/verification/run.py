"""One copy of a model in training: it takes steps and hands out everything that is to be compared."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bnrestructure.core.memory_format import to_channels_last
from bnrestructure.verification.draws import SameDraws, seeded
from bnrestructure.verification.loss import named_tensors
from bnrestructure.verification.widen import everything_in

__all__ = ["Run", "as_dtype"]

_STEP_LENGTH = (
    1e-3  # of an SGD step, relative to the parameters: longer ones make deep nets chaotic, and then rounding decides
)
_MOMENTUM = 0.9
_HALF_SCALE = 2.0**10  # loss scale for float16, whose small gradients underflow


def as_dtype(tree: Any, dtype: torch.dtype) -> Any:
    """The pytree with its floating tensors cast; other leaves as they are."""
    return pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, tree)


class Run:
    """Trains ``model`` (which it owns) with SGD. ``autocast`` is None or a dtype below float32."""

    def __init__(
        self,
        model: nn.Module,
        inputs: tuple[Any, ...],
        loss: Callable[[Any], Tensor],
        dtype: torch.dtype,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.loss = loss
        self.dtype = dtype
        self.autocast = autocast
        model.zero_grad(set_to_none=True)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.SGD(trained, lr=0.0, momentum=_MOMENTUM) if trained else None
        #: Around the forward and backward passes, outside of everything else.
        self.rounding: AbstractContextManager[Any] = nullcontext()
        self.output: Any = None
        self.leaves: dict[str, Tensor] = {}

    def forward_backward(self, seed: int) -> None:
        """One forward and backward pass with these random numbers; what is to be compared can then be asked for."""
        self.model.zero_grad(set_to_none=True)
        arguments, self.leaves = _with_gradients(self.inputs)
        seeded(seed)
        with self.rounding, everything_in(self.dtype), SameDraws():
            with self._autocast():
                self.output = self.model(*arguments)
            loss = self.loss(self.output)
            if self.autocast is torch.float16:
                (loss * _HALF_SCALE).backward()
                for t in [*self.model.parameters(), *self.leaves.values()]:
                    if t.grad is not None:
                        t.grad /= _HALF_SCALE
            else:
                loss.backward()

    def to_channels_last(self) -> None:
        """The same model and inputs with their 4-D and 5-D tensors laid out so: other kernels, other rounding, the same function."""
        _, self.inputs = to_channels_last(self.model, self.inputs)

    def learning_rate(self) -> float:
        """The rate at which a step with the present gradients changes the parameters by 1e-3 of their length."""
        with torch.no_grad():
            pairs = [(p, p.grad) for p in self.model.parameters() if p.grad is not None]
            length = sum(float(p.double().square().sum()) for p, _ in pairs)
            slope = sum(float(g.double().square().sum()) for _, g in pairs)
        rate = _STEP_LENGTH * math.sqrt(length / slope) if slope > 0 else 0.0
        return rate if math.isfinite(rate) else _STEP_LENGTH

    def step(self, learning_rate: float) -> None:
        """One SGD step with the gradients of the last backward pass."""
        if self.optimiser is not None:
            for group in self.optimiser.param_groups:
                group["lr"] = learning_rate
            self.optimiser.step()

    def tensors(self, kind: str) -> dict[str, Tensor | None]:
        """Name -> tensor of one kind, see report.KINDS. A gradient is None where there is none."""
        match kind:
            case "output":
                return dict(named_tensors(self.output, "output"))
            case "gradient":
                return {name: p.grad for name, p in self.model.named_parameters()}
            case "input gradient":
                return {name: leaf.grad for name, leaf in self.leaves.items()}
            case "buffer":
                return dict(self.model.named_buffers())
            case _:
                return dict(self.model.named_parameters())

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        if self.autocast is None:
            yield
            return
        device = next((p.device.type for p in self.model.parameters()), "cpu")
        with torch.autocast(device, dtype=self.autocast):
            yield


def _with_gradients(inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    """(fresh arguments, leaf tensors whose .grad will be the floating inputs' gradients, by place)."""
    inputs = copy.copy(pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), inputs))
    leaves = {}
    for name, t in named_tensors(inputs, "input").items():
        if t.is_floating_point():
            leaves[name] = t.requires_grad_()
    # A clone of each leaf: a model may write to its input in place, which autograd forbids on the leaf itself.
    return pytree.tree_map_only(Tensor, lambda t: t.clone() if t.requires_grad else t, inputs), leaves
