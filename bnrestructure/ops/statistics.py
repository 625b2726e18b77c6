"""Batch statistics as nodes of their own: of any tensor, of a concat from its segments', across ranks; and the finalize."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bnrestructure.core.activation import activate
from bnrestructure.core.aliases import alias
from bnrestructure.core.edges import statistics_count, statistics_factors, values_per_channel
from bnrestructure.kernels import registry
from bnrestructure.kernels.calls import FinalizeBackward, FinalizeForward, StatisticsBackward, StatisticsForward
from bnrestructure.kernels.momentum import counted
from bnrestructure.kernels.unmerged import Unmerged
from bnrestructure.ops import library
from bnrestructure.ops.dispatch import guard_second_derivative, in_format_of, passed_on, with_room

__all__ = ["FinalizeOutputs", "More", "Running", "StatisticsOutputs", "batch_norm", "finalize", "statistics"]


_NARROW = (torch.float32, torch.bfloat16, torch.float16)


class StatisticsOutputs(NamedTuple):
    """mean and var (biased) are [C] in the accumulation dtype, size is x's, passed is x for its next reader when chained.

    unmerged is what a finalize has to merge into mean and var before anyone reads them; mostly None, for they are merged.
    """

    mean: Tensor
    var: Tensor
    size: torch.Size
    passed: Tensor | None
    unmerged: Unmerged | None = None


def statistics(x: Tensor, *, chain: bool = False, unmerged: bool = False, backend: str = "auto") -> StatisticsOutputs:
    """Mean and biased variance of x [N, C, *spatial] over all but the channel, in one sweep (the paper's MVF, section 3.2).

    ``unmerged`` allows the output of that name.
    """
    if torch.compiler.is_compiling() and not chain:
        mean, var = library.statistics(x, backend)
        return StatisticsOutputs(mean, var, x.shape, None)
    mean, var, passed, left = _Statistics.apply(x, chain, unmerged, backend)
    return StatisticsOutputs(mean, var, x.shape, passed, left)


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, chain: bool, unmerged: bool, backend: str) -> Any:
        mean, var = registry.run(backend, StatisticsForward(x, unmerged=unmerged))
        left = None
        if type(mean) is Unmerged:
            mean, var, left = with_room(mean)
        ctx.backend = backend
        ctx.save_for_backward(x, mean)
        ctx.set_materialize_grads(False)
        return mean, var, passed_on(ctx, x) if chain else None, left

    @staticmethod
    def backward(ctx: Any, dmean: Any, dvar: Any, dpassed: Any, _: Any) -> Any:
        x, mean = ctx.saved_tensors
        if dmean is None and dvar is None:
            return guard_second_derivative((dpassed, None, None, None))
        if dmean is None or dvar is None:
            call = StatisticsBackward(x, mean, *statistics_factors(x, mean, dmean, dvar), dpassed)
        else:
            call = StatisticsBackward(x, mean, dvar, dmean, dpassed, statistics_count(x))
        dx = registry.run(ctx.backend, call)
        return guard_second_derivative((in_format_of(x, dx), None, None, None))


class Running(NamedTuple):
    """A batch norm's running statistics, [C], and its counter, which are updated in place; None where it has none."""

    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None


class More(NamedTuple):
    """Mean and biased variance, each [C2], of channels that follow others in a concat; None where none do.

    ``unmerged`` statistics are merged into these two, or, where none follow, into the first channels' mean and variance.
    """

    behind_mean: Tensor | None = None
    behind_var: Tensor | None = None
    unmerged: Unmerged | None = None


_NO_MORE = More()


class FinalizeOutputs(NamedTuple):
    """The vectors of an edge, each [C] in the accumulation dtype, and the statistics themselves for their next reader when chained.

    ``mean`` takes no gradient of its own: its readers read beta, too, and what is due follows from beta's. ``passed_mean`` and
    ``passed_var`` take theirs.
    """

    mean: Tensor
    scale: Tensor
    beta: Tensor
    passed_mean: Tensor | None
    passed_var: Tensor | None


def finalize(
    mean: Tensor,
    var: Tensor,
    size: torch.Size | Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running,
    momentum: float | None,
    eps: float,
    *,
    more: More = _NO_MORE,
    chain: bool = False,
    dimensions: tuple[int, ...] = (),
    backend: str = "auto",
) -> FinalizeOutputs:
    """The per-channel step between the halves of a batch norm: (mean, scale, beta), each [C], which are read together, in
    ``(x - mean) * scale + beta``. Running statistics and counter are updated in place.

    With ``more`` channels C counts all of them. ``chain`` returns the statistics for their next reader, whose gradients of them are added
    to this one's.
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
    running_mean, running_var, num_batches_tracked = running
    # Eager counts on any device, and raises where the counter needs a gradient.
    if num_batches_tracked is not None and (num_batches_tracked.device != mean.device or num_batches_tracked.requires_grad):
        momentum, num_batches_tracked = counted(num_batches_tracked, momentum), None
    count = size if isinstance(size, Tensor) else values_per_channel(size)
    channels = mean.numel() + (0 if more.behind_mean is None else more.behind_mean.numel())
    try:
        _check_values(channels, size, count, eps)
        if isinstance(count, int) and count == 0:  # PyTorch's layer leaves the running statistics as they are, and looks at no dtype
            running_mean = running_var = None
        else:
            _check_vectors(mean.dtype, channels, weight, bias, running_mean, running_var)
    except (ValueError, RuntimeError):
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)  # PyTorch's layer counts before it looks at anything else
        raise
    running = Running(running_mean, running_var, num_batches_tracked)
    return FinalizeOutputs(*_Finalize.apply(mean, var, *more, count, weight, bias, *running, momentum, eps, chain, backend))


def _check_values(channels: int, size: torch.Size | Tensor, count: int | Tensor, eps: float) -> None:
    """Raise PyTorch's errors about eps and about a channel of one value."""
    if eps <= 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if not isinstance(size, Tensor) and count == 1:
        shown = torch.Size((size[0], channels, *size[2:]))
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shown}")


def _check_vectors(
    statistics: torch.dtype,
    channels: int,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
) -> None:
    """Raise PyTorch's errors about a batch norm's parameters and running statistics."""
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    grad = torch.is_grad_enabled()
    # Statistics are float64 for a float64 input alone; parameters are of the input's dtype, or float32 beside 16 bits.
    allowed = (torch.float64,) if statistics is torch.float64 else _NARROW
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
    momentum = counted(num_batches_tracked, momentum)
    return activate(F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps), act)


class _Finalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mean: Tensor,
        var: Tensor,
        behind_mean: Tensor | None,
        behind_var: Tensor | None,
        unmerged: Unmerged | None,
        count: int | Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        batches: Tensor | None,
        momentum: float | None,
        eps: float,
        chain: bool,
        backend: str,
    ) -> Any:
        behind = None if behind_mean is None or behind_var is None else (behind_mean, behind_var)
        call = FinalizeForward(mean, var, count, weight, bias, running_mean, running_var, momentum, eps, batches, behind, unmerged)
        rstd, scale, beta, whole_mean, whole_var = registry.run(backend, call)
        ctx.backend = backend
        ctx.channels = None if behind_mean is None else (mean.numel(), behind_mean.numel())
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(rstd, scale, weight)  # the weight: as in eager, it is an error to overwrite it before backward
        ctx.set_materialize_grads(False)
        constant = whole_mean.detach()
        if not chain:
            ctx.mark_non_differentiable(constant)
            return constant, scale, beta, None, None
        passed = (whole_mean, whole_var) if behind is not None else (alias(mean), alias(var))
        learnt = any(ctx.needs_input_grad[:4])  # else the parameters would have the statistics need a gradient
        ctx.mark_non_differentiable(constant, *(() if learnt else passed))
        return constant, scale, beta, *passed

    @staticmethod
    def backward(ctx: Any, _: Any, dscale: Any, dbeta: Any, of_mean: Any, of_var: Any) -> Any:
        rstd, scale, weight = ctx.saved_tensors
        if dscale is None and dbeta is None:
            return guard_second_derivative((*_halves(ctx.channels, of_mean, of_var), *[None] * 11))
        of_scale = torch.zeros_like(rstd) if dscale is None else dscale
        of_beta = torch.zeros_like(rstd) if dbeta is None else dbeta
        dmean, dvar, of_weight = registry.run(ctx.backend, FinalizeBackward(of_scale, of_beta, rstd, scale, of_mean, of_var))
        dweight = None if dscale is None or weight is None else of_weight.to(weight.dtype)
        dbias = None if dbeta is None or ctx.bias_dtype is None else dbeta.to(ctx.bias_dtype)
        return guard_second_derivative((*_halves(ctx.channels, dmean, dvar), None, None, dweight, dbias, *[None] * 7))


def _halves(channels: tuple[int, int] | None, dmean: Tensor | None, dvar: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of (mean, var, what is behind the mean, what is behind the variance)."""
    if channels is None:
        return dmean, dvar, None, None
    none = None, None
    (mean, behind_mean), (var, behind_var) = (none if d is None else d.split(channels) for d in (dmean, dvar))
    return mean, var, behind_mean, behind_var
