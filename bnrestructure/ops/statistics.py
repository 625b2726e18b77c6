"""Batch statistics as nodes of their own: of any tensor, of a concat from its segments', across ranks; and the finalize."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bnrestructure.core.activation import activate
from bnrestructure.core.edges import statistics_factors, values_per_channel
from bnrestructure.kernels import registry
from bnrestructure.kernels.calls import FinalizeBackward, FinalizeForward, StatisticsBackward, StatisticsForward
from bnrestructure.ops import library
from bnrestructure.ops.dispatch import guard_second_derivative, in_format_of, passed_on

__all__ = ["FinalizeOutputs", "StatisticsOutputs", "batch_norm", "finalize", "statistics"]


_NARROW = (torch.float32, torch.bfloat16, torch.float16)


class StatisticsOutputs(NamedTuple):
    """mean and var (biased) are [C] in the accumulation dtype, size is x's, passed is x for its next reader when chained."""

    mean: Tensor
    var: Tensor
    size: torch.Size
    passed: Tensor | None


def statistics(x: Tensor, *, chain: bool = False, backend: str = "auto") -> StatisticsOutputs:
    """Mean and biased variance of x [N, C, *spatial] over all but the channel, in one sweep (the paper's MVF, section 3.2)."""
    if torch.compiler.is_compiling() and not chain:
        mean, var = library.statistics(x, backend)
        return StatisticsOutputs(mean, var, x.shape, None)
    mean, var, passed = _Statistics.apply(x, chain, backend)
    return StatisticsOutputs(mean, var, x.shape, passed)


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, chain: bool, backend: str) -> Any:
        mean, var = registry.run(backend, StatisticsForward(x))
        ctx.backend = backend
        ctx.save_for_backward(x, mean)
        ctx.set_materialize_grads(False)
        return mean, var, passed_on(ctx, x) if chain else None

    @staticmethod
    def backward(ctx: Any, dmean: Any, dvar: Any, dpassed: Any) -> Any:
        x, mean = ctx.saved_tensors
        if dmean is None and dvar is None:
            return guard_second_derivative((dpassed, None, None))
        dx = registry.run(ctx.backend, StatisticsBackward(x, mean, *statistics_factors(x, mean, dmean, dvar), dpassed))
        return guard_second_derivative((in_format_of(x, dx), None, None))


class FinalizeOutputs(NamedTuple):
    """What normalisation multiplies by and adds, each [C] in the accumulation dtype."""

    scale: Tensor
    beta: Tensor


def finalize(
    mean: Tensor,
    var: Tensor,
    size: torch.Size | Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    *,
    dimensions: tuple[int, ...] = (),
    backend: str = "auto",
) -> FinalizeOutputs:
    """The per-channel step between the halves of a batch norm: (scale, beta), each [C]; running statistics updated in place.

    ``size`` is the size of the tensor that mean and var are of, or, for statistics merged across ranks, the number of values per
    channel as a tensor. ``momentum`` None is the cumulative average over ``num_batches_tracked``. The running variance takes the
    unbiased estimate var * M / (M - 1).

    Raises what PyTorch's layers raise: ValueError when a channel has a single value, ``eps`` is not positive or the input is not one of
    ``dimensions`` (empty: any) in number of dimensions, RuntimeError when a parameter or running statistic does not have C elements, is of
    a dtype that the input cannot have been of, or, a running statistic, requires a gradient.
    """
    eps, momentum = float(eps), None if momentum is None else float(momentum)  # a graph may compute them, even as tensors
    if not isinstance(size, Tensor):
        _check_dimensions(len(size), dimensions)
    momentum = _counted(num_batches_tracked, momentum)  # PyTorch's layer counts before it looks at anything else
    if eps <= 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if isinstance(size, Tensor):
        count: int | Tensor = size
    else:
        count = values_per_channel(size)
        if count == 1:
            shown = torch.Size((size[0], mean.shape[0], *size[2:]))
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {shown}")
        if count == 0:  # PyTorch's layer leaves the running statistics as they are, and looks at no dtype
            running_mean = running_var = None
    if isinstance(count, Tensor) or count:
        _check_vectors(mean, weight, bias, running_mean, running_var)
    return FinalizeOutputs(*_Finalize.apply(mean, var, count, weight, bias, running_mean, running_var, momentum, eps, backend))


def _counted(num_batches_tracked: Tensor | None, momentum: float | None) -> float:
    """The share of this batch in the running statistics, once it is counted; without a momentum all batches have equal shares."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if momentum is None:
        return 0.0 if num_batches_tracked is None else 1.0 / float(num_batches_tracked)
    return momentum


def _check_vectors(
    mean: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None
) -> None:
    """Raise PyTorch's errors about a batch norm's parameters and running statistics."""
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    channels, grad = mean.numel(), torch.is_grad_enabled()
    # Statistics are float64 for a float64 input alone; parameters are of the input's dtype, or float32 beside 16 bits.
    allowed = (torch.float64,) if mean.dtype is torch.float64 else _NARROW
    dtype = None
    for name, vector in (("running_mean", running_mean), ("running_var", running_var), ("weight", weight), ("bias", bias)):
        if vector is None:
            continue
        if vector.numel() != channels:
            raise RuntimeError(f"{name} should contain {channels} elements not {vector.numel()}")
        if vector.dim() != 1:
            raise RuntimeError(f"{name}: expected 1 dims but tensor has {vector.dim()}")
        found = vector.dtype
        if dtype is None and found in allowed:
            dtype = found
        if found is not dtype:
            raise RuntimeError(f"mixed dtype: {name} is {found}, where {allowed[0] if dtype is None else dtype} was expected")
        if grad and vector.requires_grad and name.startswith("running"):
            raise RuntimeError(
                f"The function 'native_batch_norm' is not differentiable with respect to argument '{name}'. "
                "This input cannot have requires_grad True."
            )


def _check_dimensions(found: int, allowed: tuple[int, ...]) -> None:
    if allowed and found not in allowed:
        raise ValueError(f"expected {' or '.join(f'{d}D' for d in allowed)} input (got {found}D input)")


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    *,
    dimensions: tuple[int, ...] = (),
    act: str = "identity",
) -> Tensor:
    """A batch norm left whole, with the activation that followed it: PyTorch's own operators, for sites that fission cannot help."""
    _check_dimensions(x.dim(), dimensions)
    momentum = _counted(num_batches_tracked, momentum)
    return activate(F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps), act)


class _Finalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mean: Tensor,
        var: Tensor,
        count: int | Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        call = FinalizeForward(mean, var, count, weight, bias, running_mean, running_var, momentum, eps)
        rstd, scale, beta = registry.run(backend, call)
        ctx.backend = backend
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(rstd, weight)
        ctx.set_materialize_grads(False)
        return scale, beta

    @staticmethod
    def backward(ctx: Any, dscale: Any, dbeta: Any) -> Any:
        rstd, weight = ctx.saved_tensors
        dvar = dweight = None
        if dscale is not None:
            dvar, dweight = registry.run(ctx.backend, FinalizeBackward(dscale, rstd, weight))
            dweight = None if weight is None else dweight.to(weight.dtype)
        dbias = None if dbeta is None or ctx.bias_dtype is None else dbeta.to(ctx.bias_dtype)
        return guard_second_derivative((None, dvar, None, dweight, dbias, None, None, None, None, None))
