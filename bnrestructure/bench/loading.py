"""From the settings to a workload: MODEL and its inputs are found as in every other subcommand."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from bnrestructure.bench.settings import Settings
from bnrestructure.bench.workload import Workload
from bnrestructure.models.inputs import example_inputs
from bnrestructure.models.models import load_model

__all__ = ["load_workload"]


def load_workload(settings: Settings) -> Workload:
    """The model in training mode with its inputs.

    Raises UsageError for a model that cannot be had.
    """
    model = load_model(settings.model).train()
    inputs = example_inputs(
        settings.model, model, batch=settings.batch, size=settings.input_size, source=settings.inputs
    )
    make = None if ":" in settings.model else partial(_torchvision, settings.model)
    return Workload(model, inputs, make)


def _torchvision(name: str, **options: Any) -> nn.Module:
    """A torchvision model with options of its own, in training mode."""
    from torchvision import models

    return models.get_model(name, weights=None, **options).train()
