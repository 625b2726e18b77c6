"""The check before any timing: forward, gradients and buffers of one step, held against float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from bnrestructure.api import explain, restructure
from bnrestructure.bench.contenders import autocast_dtype
from bnrestructure.bench.settings import Settings
from bnrestructure.verification import VerificationReport, verify
from bnrestructure.verification.judge import judge_training
from bnrestructure.verification.loss import default_loss
from bnrestructure.verification.trial import Setting, run_trial

__all__ = ["check_numbers"]

_FACTOR = 2.0


def check_numbers(
    model: nn.Module, inputs: tuple[Any, ...], settings: Settings, passes: str | None
) -> VerificationReport:
    """Whether a restructured step is, in the dtype that is timed, as near to the truth as eager's up to a factor of 2.

    The rule and the measure of ``bnrestructure.verify``, without its float64 and eval stages, which say nothing about
    the kernels that are timed and take most of its time. A tensor beyond its limit may be the rounding of one unlucky
    draw: the whole of ``verify`` then decides.
    """
    candidate = restructure(copy.deepcopy(model), backend=settings.backend, passes=passes)
    plan = explain(candidate, backend=settings.backend, passes=passes)
    setting = Setting(default_loss, 0, 0, torch.float32, autocast_dtype(settings), lambda _: None)
    trial = run_trial(model, candidate, inputs, setting, double=False, training=True)
    report = VerificationReport(
        type(model).__name__, _FACTOR, judge_training([trial], setting.dtype, _FACTOR), plan.counts
    )
    if report.ok and trial.raised is None:
        return report
    return verify(
        model, inputs, backend=settings.backend, passes=passes, steps=0, dtype=autocast_dtype(settings), factor=_FACTOR
    )
