"""The functions that users call: restructure, unrestructure, explain. (``verify`` is in verification/.)"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bnrestructure.capture.regions import Options
from bnrestructure.capture.swap import region_of, swap_in, swap_out
from bnrestructure.core.errors import NotFullyFusedError, UsageError
from bnrestructure.kernels import registry
from bnrestructure.passes import pipeline
from bnrestructure.plan.plan import Plan
from bnrestructure.plan.planning import make_plan

__all__ = ["explain", "restructure", "unrestructure"]


def restructure(
    model: nn.Module,
    *,
    backend: str = "auto",
    passes: str | Sequence[str] | None = None,
    strict: bool = False,
    fuel: int | None = None,
    graphs: str = "off",
) -> nn.Module:
    """Rewrite the model's training step so that each batch norm's halves ride on its neighbours. Returns the same object.

    The model keeps its class (by isinstance), attributes, Parameters, state_dict keys and hooks. ``model.eval()`` runs its own
    forward, bit for bit. What cannot be rewritten runs as it was; :func:`explain` says what and why.

    backend    auto (the device's kernels where they apply, else the reference), reference, cpu or cuda
    passes     names of passes, or a rung of the paper's ladder (baseline, rcf, mvf, bnff, icf); None for all
    strict     raise NotFullyFusedError, leaving the model as it was, unless every batch norm is fully fused; in training, too, where a
               part of the model turns out to run as it was
    fuel       stop after this many rewrites in each graph (for bisecting)
    graphs     auto: a part's forward and backward are recorded as CUDA graphs after a few steps, and repeated where they turn out to do
               what a step does (docs/gpus.md); :func:`explain` says which are, and why others are not

    Raises UsageError, leaving the model as it was, for arguments that cannot be used.
    """
    options = replace(_options(model, backend, passes, fuel, strict=strict), graphs=graphs)
    if graphs not in ("auto", "off"):
        raise UsageError(f"graphs is 'auto' or 'off', got {graphs!r}")
    if strict:
        plan = make_plan(model, options)
        loose = [site for site in plan.sites if site.status != "fused"]
        if loose:
            raise NotFullyFusedError(
                f"{len(loose)} of {len(plan.sites)} batch norms are not fully fused; first {loose[0].name}: {loose[0].reason}"
            )
    swap_out(model)
    swap_in(model, options)
    return model


def unrestructure(model: nn.Module) -> nn.Module:
    """Give the model its original forward back. Returns the same object; a model that was never restructured is left alone."""
    _check_model(model)
    swap_out(model)
    return model


def explain(
    model: nn.Module,
    inputs: Any = None,
    *,
    backend: str = "auto",
    passes: str | Sequence[str] | None = None,
) -> Plan:
    """What restructuring would do to the model, or did: one :class:`Site` per batch norm. Changes nothing.

    ``inputs`` (a tensor or a tuple of arguments) adds shapes and bytes, and which kernel each fused convolution runs and why. A
    restructured model is explained with its own options. backend "cuda" is explained without a GPU, too.
    """
    options = _options(model, backend, passes, None, runs=False)
    if backend == "auto" and passes is None:
        for module in model.modules():
            region = region_of(module)
            if region is not None:
                options = region.options
                break
    if inputs is not None and not isinstance(inputs, tuple):
        inputs = (inputs,)
    return make_plan(model, options, inputs)


def _check_model(model: Any) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError("the model is a ScriptModule: restructure it before torch.jit.script or torch.jit.trace")
    if not isinstance(model, nn.Module):
        raise UsageError(f"expected a torch.nn.Module, got {type(model).__name__}")


def _options(
    model: Any, backend: str, passes: str | Sequence[str] | None, fuel: int | None, runs: bool = True, strict: bool = False
) -> Options:
    """The options, checked; ``runs``: the backend must be able to run here."""
    _check_model(model)
    if backend not in registry.BACKENDS:
        near = difflib.get_close_matches(str(backend), registry.BACKENDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"unknown backend {backend!r}{hint} (backends: {', '.join(registry.BACKENDS)})")
    if fuel is not None and (not isinstance(fuel, int) or fuel < 0):
        raise UsageError(f"fuel is a number of rewrites, at least 0, or None, got {fuel!r}")
    if not runs and backend == "cuda":
        return Options(backend, pipeline.resolve(passes), fuel, strict)
    if backend == "cuda" and not torch.cuda.is_available():
        raise UsageError("backend 'cuda' was asked for, but PyTorch sees no CUDA device here")
    if backend in ("cpu", "cuda") and registry.unavailable_reason(backend) is not None:
        raise UsageError(f"backend {backend!r} was asked for, but {registry.unavailable_reason(backend)}")
    if backend == "auto" and registry.unavailable_reason("cpu") is not None:
        warnings.warn(
            f"bnrestructure: CPU models will use the slow reference kernels: {registry.unavailable_reason('cpu')}",
            stacklevel=3,
        )
    return Options(backend, pipeline.resolve(passes), fuel, strict)
