"""Whether a restructured model draws the random numbers that the original draws from the same seed."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bnrestructure.core.errors import first_line
from bnrestructure.verification.distance import distances, units
from bnrestructure.verification.draws import seeded
from bnrestructure.verification.judge import FLOAT64_LIMIT
from bnrestructure.verification.loss import named_tensors
from bnrestructure.verification.report import Comparison, VerificationReport
from bnrestructure.verification.run import as_dtype
from bnrestructure.verification.trial import Setting
from bnrestructure.verification.widen import everything_in

__all__ = ["compare_draws"]

#: An element that one model drops and the other keeps is an error of its own size: no rounding comes near this.
_LIMIT = 1e3 * FLOAT64_LIMIT


def compare_draws(
    report: VerificationReport, original: nn.Module, candidate: nn.Module, inputs: tuple[Any, ...], setting: Setting
) -> None:
    """Add one training forward of each from one seed, in float64, to the report: nothing where the original draws none of PyTorch's
    random numbers, a note where it cannot be run so.
    """
    outputs, states = [], []
    for model in (original, candidate):
        twin = copy.deepcopy(model).to(setting.cast).double()
        arguments = pytree.tree_map_only(Tensor, torch.clone, as_dtype(as_dtype(inputs, setting.cast), torch.float64))
        seeded(setting.seed)
        before = torch.get_rng_state()
        try:
            with everything_in(torch.float64):
                outputs.append(named_tensors(twin(*arguments), "output"))
        except Exception as error:  # of the original: nothing to compare with; of the restructured model: that is the finding
            if model is original:
                report.notes.append(f"draws were not compared: the original fails there: {first_line(error)}")
            else:
                message = f"the restructured model raised {type(error).__name__}: {first_line(error)}"
                report.comparisons.append(Comparison("draws", 1, "error", message, math.inf, 0.0))
            return
        states.append(torch.get_rng_state())
        if torch.equal(states[0], before):
            return
    unit = units(outputs[0])
    for name, expected in outputs[0].items():
        actual = outputs[1].get(name)
        distance = math.inf if actual is None else distances(actual, expected, unit.get(name, 0.0))
        report.comparisons.append(Comparison("draws", 1, "output", name, distance, _LIMIT))
    if not torch.equal(*states):
        report.comparisons.append(Comparison("draws", 1, "error", "another number of random numbers was drawn", math.inf, 0.0))
