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
from bnrestructure.verification.report import Comparison
from bnrestructure.verification.run import as_dtype
from bnrestructure.verification.trial import Setting
from bnrestructure.verification.widen import everything_in

__all__ = ["compare_draws"]

#: An element that one model drops and the other keeps is an error of its own size: no rounding comes near this.
_LIMIT = 1e3 * FLOAT64_LIMIT


def compare_draws(original: nn.Module, candidate: nn.Module, inputs: tuple[Any, ...], setting: Setting) -> list[Comparison]:
    """One training forward of each from one seed, in float64: nothing where the original draws no random numbers of PyTorch's.

    A model that cannot be run so is not compared: the trials have run it.
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
        except Exception as error:  # whatever the restructured model raises, the original did not: that is the finding
            message = f"the restructured model raised {type(error).__name__}: {first_line(error)}"
            return [] if model is original else [Comparison("draws", 1, "error", message, math.inf, 0.0)]
        states.append(torch.get_rng_state())
        if torch.equal(states[0], before):
            return []
    unit = units(outputs[0])
    found = []
    for name, expected in outputs[0].items():
        actual = outputs[1].get(name)
        distance = math.inf if actual is None else distances(actual, expected, unit.get(name, 0.0))
        found.append(Comparison("draws", 1, "output", name, distance, _LIMIT))
    if not torch.equal(*states):
        found.append(Comparison("draws", 1, "error", "another number of random numbers was drawn", math.inf, 0.0))
    return found
