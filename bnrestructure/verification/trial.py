"""One side-by-side training of the original and the restructured model, and every distance to the float64 truth."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bnrestructure.core.errors import UsageError, first_line
from bnrestructure.verification.distance import distances, units
from bnrestructure.verification.rounding import RandomRounding
from bnrestructure.verification.run import Run, as_dtype

__all__ = ["Key", "Setting", "Trial", "name_of", "run_rounded", "run_trial"]

_TRAINING_KINDS = ("output", "buffer", "gradient", "input gradient")
_AFTER_STEP = ("parameter",)

#: (step, kind, tensor name)
Key = tuple[int, str, str]


@dataclass
class Trial:
    """Distances by tensor; ``ours`` and ``eager`` are in the training dtype and empty without that stage.

    ``raised`` is (stage, step, message) when the restructured model raised; distances are then those up to there.
    ``trained`` is the restructured copy after its last step.
    """

    double: dict[Key, float] = field(default_factory=dict)
    ours: dict[Key, float] = field(default_factory=dict)
    eager: dict[Key, float] = field(default_factory=dict)
    raised: tuple[str, int, str] | None = None
    trained: nn.Module | None = None


@dataclass(frozen=True)
class Setting:
    """What all trials share. ``cast``: dtype of parameters and inputs in training; ``autocast``: a narrower one."""

    loss: Callable[[Any], Tensor]
    steps: int
    seed: int
    cast: torch.dtype
    autocast: torch.dtype | None
    say: Callable[[str], None]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the training stage computes."""
        return self.autocast or self.cast


def run_trial(
    original: nn.Module,
    candidate: nn.Module,
    inputs: tuple[Any, ...],
    setting: Setting,
    *,
    double: bool,
    training: bool,
    eager_channels_last: bool = False,
) -> Trial:
    """Train copies in lockstep: the truth, our model in float64 and/or both models in the training dtype.

    ``eager_channels_last`` has the original in the training dtype run in that memory format.
    """
    # the truth is that of the values which the training dtype starts from
    values = as_dtype(inputs, setting.cast)
    truth = _run(original, values, setting, torch.float64)
    twin = _run(candidate, values, setting, torch.float64) if double else None
    eager = _run(original, values, setting, setting.cast) if training else None
    if eager is not None and eager_channels_last:
        eager.to_channels_last()
    ours = _run(candidate, values, setting, setting.cast) if training else None
    return _side_by_side(setting, truth, twin, eager, ours)


def run_rounded(original: nn.Module, inputs: tuple[Any, ...], setting: Setting, seed: int) -> Trial:
    """Train the original in float64 beside itself with every result rounded at random. ``double`` has the distances."""
    values = as_dtype(inputs, setting.cast)
    truth, rounded = (_run(original, values, setting, torch.float64) for _ in range(2))
    rounded.rounding = RandomRounding(seed)
    return _side_by_side(setting, truth, rounded, None, None)


def _side_by_side(setting: Setting, truth: Run, twin: Run | None, eager: Run | None, ours: Run | None) -> Trial:
    trial = Trial()
    for step in range(1, max(setting.steps, 1) + 1):
        seed = setting.seed + step
        for run, restructured in ((truth, False), (twin, True), (eager, False), (ours, True)):
            if run is None:
                continue
            stage = name_of(run.autocast or run.dtype)
            setting.say(
                f"step {step} of {max(setting.steps, 1)}: {'restructured' if restructured else 'original'} in {stage}"
            )
            if not restructured:
                _original_step(run, seed)
                continue
            message = _restructured_step(run, seed)
            if message is not None:
                trial.raised = (stage, step, message)
                return trial
        _measure(trial, step, _TRAINING_KINDS, truth, twin, eager, ours)
        if setting.steps:
            rate = truth.learning_rate()
            for run in (truth, twin, eager, ours):
                if run is not None:
                    run.step(rate)
            _measure(trial, step, _AFTER_STEP, truth, twin, eager, ours)
    last = twin if ours is None else ours
    trial.trained = None if last is None else last.model
    return trial


def _run(model: nn.Module, inputs: tuple[Any, ...], setting: Setting, dtype: torch.dtype) -> Run:
    autocast = None if dtype == torch.float64 else setting.autocast
    owned = copy.deepcopy(model).to(setting.cast).to(dtype)
    return Run(owned, as_dtype(inputs, dtype), setting.loss, dtype, autocast)


def _original_step(run: Run, seed: int) -> None:
    try:
        run.forward_backward(seed)
    except UsageError:
        raise
    except Exception as error:  # the user's forward and loss may raise anything; nothing can be verified then
        where = name_of(run.autocast or run.dtype)
        raise UsageError(
            f"the original model fails on these inputs in {where}: {type(error).__name__}: {first_line(error)}"
        ) from error


def _restructured_step(run: Run, seed: int) -> str | None:
    try:
        run.forward_backward(seed)
    except Exception as error:  # whatever it raises, the original did not: that is the finding
        return f"the restructured model raised {type(error).__name__}: {first_line(error)}"
    return None


def _measure(
    trial: Trial, step: int, kinds: tuple[str, ...], truth: Run, twin: Run | None, eager: Run | None, ours: Run | None
) -> None:
    for kind in kinds:
        expected = truth.tensors(kind)
        unit = units({name: t for name, t in expected.items() if t is not None})
        if twin is not None:
            found = twin.tensors(kind)
            for name in dict.fromkeys([*expected, *found]):
                trial.double[step, kind, name] = _distance(found.get(name), expected.get(name), unit.get(name, 0.0))
        if eager is None or ours is None:
            continue
        theirs, found = eager.tensors(kind), ours.tensors(kind)
        for name in dict.fromkeys([*theirs, *found]):
            key = (step, kind, name)
            trial.eager[key], trial.ours[key] = _both_distances(
                theirs.get(name), found.get(name), expected.get(name), unit.get(name, 0.0)
            )


def _distance(value: Tensor | None, truth: Tensor | None, unit: float) -> float:
    if value is None or truth is None:
        return 0.0 if value is truth else math.inf
    return distances(value, truth, unit)


def _both_distances(
    eager: Tensor | None, ours: Tensor | None, truth: Tensor | None, unit: float
) -> tuple[float, float]:
    """(eager's, ours). Where eager is not finite there is no distance; ours must then be the same NaN or infinity."""
    if eager is None or ours is None or truth is None or not eager.is_floating_point() or eager.shape != ours.shape:
        return _distance(eager, truth, unit), _distance(ours, truth if eager is not None else None, unit)
    bad = ~torch.isfinite(eager)
    if not bool(bad.any()) or eager.shape != truth.shape:
        return distances(eager, truth, unit), distances(ours, truth, unit)
    if not torch.equal(eager[bad].nan_to_num(), ours[bad].nan_to_num()) or not torch.equal(eager.isnan(), ours.isnan()):
        return 0.0, math.inf
    good = ~bad & torch.isfinite(truth)
    return distances(eager[good], truth[good], unit), distances(ours[good], truth[good], unit)


def name_of(dtype: torch.dtype) -> str:
    """``float32`` for torch.float32."""
    return str(dtype).removeprefix("torch.")
