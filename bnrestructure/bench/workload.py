"""The work that is timed: one training step of a model, its phases timed apart."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from bnrestructure.core.errors import UsageError

__all__ = ["TrainingStep", "Workload", "training_loss"]


@dataclass
class Workload:
    """A model in training mode (float32, contiguous) and the arguments of one forward.

    ``make`` builds a torchvision model anew with options of its own; None for other models.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    make: Callable[..., nn.Module] | None = None

    def first(self, count: int) -> tuple[Any, ...]:
        """The arguments cut down to the first ``count`` samples of the batch."""
        return pytree.tree_map_only(Tensor, lambda t: t[:count] if t.dim() > 3 else t, _cut_lists(self.inputs, count))


def _cut_lists(tree: Any, count: int) -> Any:
    """Detection models take their batch as lists of images and of targets."""
    return tuple(arg[:count] if isinstance(arg, list) else arg for arg in tree)


class TrainingStep:
    """zero_grad, forward with the loss, backward. A call returns the seconds of ``forward``, ``backward`` and ``step``.

    ``dtype`` is None, or what autocast computes in.
    """

    def __init__(
        self, model: nn.Module, inputs: tuple[Any, ...], device: str, dtype: torch.dtype | None = None
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.device = device
        self.dtype = dtype

    def __call__(self) -> dict[str, float]:
        self._wait()
        start = time.perf_counter()
        self.model.zero_grad(set_to_none=True)
        self._wait()
        cleared = time.perf_counter()
        loss = self.forward()
        self._wait()
        middle = time.perf_counter()
        loss.backward()
        self._wait()
        end = time.perf_counter()
        return {"forward": middle - cleared, "backward": end - middle, "step": end - start}

    def forward(self) -> Tensor:
        """The loss of one forward pass."""
        autocast = contextlib.nullcontext() if self.dtype is None else torch.autocast(self.device, self.dtype)
        with autocast:
            return training_loss(self.model(*self.inputs))

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def training_loss(output: Any) -> Tensor:
    """Cross-entropy with class 0 of every [N, classes, ...] output, auxiliary ones too; a dict of losses is added up.

    What the targets are does not matter to the time. Raises UsageError when there is nothing of the kind.
    """
    leaves = [
        t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point() and t.requires_grad
    ]
    if leaves and all(t.dim() == 0 for t in leaves):
        return torch.stack(leaves).sum()
    scored = [t for t in leaves if t.dim() >= 2]
    if not scored:
        raise UsageError(
            "the model's output has no [N, classes, ...] tensor with a gradient, and no losses: nothing to train on"
        )
    losses = [F.cross_entropy(t, t.new_zeros((t.shape[0], *t.shape[2:]), dtype=torch.long)) for t in scored]
    return torch.stack(losses).sum()
