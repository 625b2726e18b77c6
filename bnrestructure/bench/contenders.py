"""The variants of one model that are timed against each other; all start from the same parameters."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bnrestructure.api import restructure
from bnrestructure.bench.rivals import BUDGETS, rebuilt
from bnrestructure.bench.settings import Settings
from bnrestructure.bench.workload import TrainingStep, Workload
from bnrestructure.core.memory_format import to_channels_last
from bnrestructure.passes.pipeline import LADDER

__all__ = [
    "COMPILED",
    "EAGER_CONTIGUOUS",
    "EAGER_LAST",
    "MEMORY_EFFICIENT",
    "RESTRUCTURED",
    "RIVALS",
    "autocast_dtype",
    "build",
    "compiles",
    "contenders",
    "drawn",
    "has_memory_efficient",
    "moved",
    "rungs",
]

EAGER_LAST = "eager channels_last"
EAGER_CONTIGUOUS = "eager contiguous"
COMPILED = "torch.compile"
MEMORY_EFFICIENT = "memory_efficient=True"
RESTRUCTURED = "restructured"

#: The restructured model is compared with the fastest of these. (memory_efficient=True is slower: it recomputes.)
RIVALS = (EAGER_LAST, EAGER_CONTIGUOUS, COMPILED)

_RUNG = "ladder "
#: The top rung is the whole pipeline: the restructured model itself.
_TOP = "icf"


def rungs(settings: Settings) -> dict[str, str]:
    """The variant that stands on each rung of the ladder, by the rung's name; empty unless the ladder was asked for."""
    if not settings.ladder:
        return {}
    return {rung: RESTRUCTURED if rung == _TOP else _RUNG + rung for rung in LADDER}


def contenders(settings: Settings, memory_efficient: bool) -> list[str]:
    """Every variant to be timed, in the order of a round."""
    names = [EAGER_LAST, EAGER_CONTIGUOUS]
    names += [COMPILED] if settings.compile else []
    names += [MEMORY_EFFICIENT] if memory_efficient else []
    names += [*settings.rivals, *settings.against]
    lower = [name for name in rungs(settings).values() if name != RESTRUCTURED]
    return [*names, *lower, RESTRUCTURED]


def drawn(settings: Settings, memory_efficient: bool) -> list[str]:
    """The variants whose memory over a step is drawn: eager and restructured, and with rivals everything but the rungs."""
    if not settings.rivals:
        return [EAGER_LAST, RESTRUCTURED]
    return [name for name in contenders(settings, memory_efficient) if not name.startswith(_RUNG)]


def has_memory_efficient(workload: Workload) -> bool:
    """Whether the model is one of torchvision's that can recompute instead of keeping (its DenseNets)."""
    return workload.make is not None and "memory_efficient" in inspect.signature(type(workload.model)).parameters


def build(name: str, workload: Workload, settings: Settings) -> TrainingStep:
    """The training step of one variant, with a model of its own. The workload is left as it is."""
    if name == MEMORY_EFFICIENT and workload.make is not None:
        model = workload.make(memory_efficient=True)
        model.load_state_dict(workload.model.state_dict())
    else:
        model = copy.deepcopy(workload.model)
    model = rebuilt(name, model).to(settings.device).train()
    inputs = moved(workload.inputs, settings.device)
    if name != EAGER_CONTIGUOUS:
        model, inputs = to_channels_last(model, inputs)
    if name == COMPILED:
        model.compile()
    elif name in BUDGETS:
        model.compile()
        return _Budgeted(model, inputs, settings.device, autocast_dtype(settings), BUDGETS[name])
    elif name == RESTRUCTURED:
        restructure(model, backend=settings.backend)
    elif name.startswith(_RUNG):
        restructure(model, backend=settings.backend, passes=name.removeprefix(_RUNG))
    return TrainingStep(model, inputs, settings.device, autocast_dtype(settings))


class _Budgeted(TrainingStep):
    """A compiled step, whose compiler is told how much it may keep whenever it may compile: at a first call, not at once."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], device: str, dtype: torch.dtype | None, budget: float) -> None:
        super().__init__(model, inputs, device, dtype)
        self._budget = budget

    def __call__(self) -> dict[str, float]:
        with torch._functorch.config.patch(activation_memory_budget=self._budget):
            return super().__call__()

    def forward(self) -> Tensor:
        with torch._functorch.config.patch(activation_memory_budget=self._budget):
            return super().forward()


def compiles(name: str) -> bool:
    """Whether a variant is torch.compile's."""
    return name == COMPILED or name in BUDGETS


def moved(inputs: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    """The arguments with their tensors on the device."""
    return pytree.tree_map_only(Tensor, lambda t: t.to(device), inputs)


def autocast_dtype(settings: Settings) -> torch.dtype | None:
    """What autocast computes in; None without autocast."""
    return torch.bfloat16 if settings.dtype == "bf16" else None
