"""The dense fused convolution on CPU: 2-D, channels_last, float32 and bfloat16.

:func:`conv_forward` and :func:`conv_backward` mean what their namesakes in kernels/reference mean; for each node they
run the implementation that convolution_choice.py expects to be the faster one. Tensors of another layout are copied to
channels_last first: correct, and slower.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from bnrestructure.core.activation import unsupported_activation
from bnrestructure.core.edges import BackwardEdge, ConvGeometry, ConvGradients, Join, Transform
from bnrestructure.kernels import tuning
from bnrestructure.kernels.choice import Choice
from bnrestructure.kernels.cpu import convolution_fused, convolution_hybrid, convolution_winograd, layout, library
from bnrestructure.kernels.cpu.convolution_choice import (
    IMPLEMENTATIONS,
    Node,
    call_of,
    candidates,
    choose,
    identify_machine,
    instruction_set,
)
from bnrestructure.kernels.rounding import narrowed

__all__ = ["choice", "conv_backward", "conv_forward", "forget_choices", "node_of", "supports"]

_MODULES: dict[str, Any] = {"fused": convolution_fused, "hybrid": convolution_hybrid, "winograd": convolution_winograd}


def supports(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why these kernels cannot run ``conv_forward`` or ``conv_backward`` on these arguments, or None."""
    x, transform, weight = args[0:3] if name == "conv_forward" else args[2:5]
    geometry = args[4] if name == "conv_forward" else args[5]
    if weight.dim() != 4:
        return f"{weight.dim() - 2}-D convolution"
    codes = layout.ELEMENT_CODES
    if not (kwargs["dtype"] in codes and x.dtype in codes and weight.dtype in codes):
        return f"computing in {kwargs['dtype']} with an input in {x.dtype} and a weight in {weight.dtype}"
    if x.numel() == 0 or weight.numel() == 0 or args[0].numel() == 0:
        return "an empty tensor"
    return narrowed(x, transform, kwargs["dtype"]) or geometry.misfit(x.shape, weight.shape) or unsupported_activation(transform.act)


def choice(
    x: Tensor,
    transform: Transform,
    weight: Tensor,
    geometry: ConvGeometry,
    dtype: torch.dtype,
    direction: str,
    joined: bool = False,
) -> Choice:
    """Which implementation runs this node in ``direction`` ("forward" or "backward"), and why."""
    how = not transform.is_identity, joined
    return _choice(x.shape, weight.shape, geometry, how, dtype, direction, instruction_set(), library.threads())


@lru_cache(maxsize=4096)
def _choice(
    x: tuple[int, ...],
    weight: tuple[int, ...],
    geometry: ConvGeometry,
    how: tuple[bool, bool],
    dtype: torch.dtype,
    direction: str,
    isa: str,
    threads: int,
) -> Choice:
    return choose(node_of(x, weight, geometry, *how), dtype, direction, isa, threads)


def forget_choices() -> None:
    """Ask again for every node: there are new measurements."""
    choose.cache_clear()
    _choice.cache_clear()


@lru_cache(maxsize=4096)
def node_of(
    x: tuple[int, ...], weight: tuple[int, ...], geometry: ConvGeometry, transformed: bool, joined: bool = False
) -> Node:
    """The sizes that the choice depends on, from the shapes of x and of the weight."""
    n, c, h, w = x
    out, _, *kernel = weight
    return Node(n, c, (h, w), out, geometry.output_size((h, w), tuple(kernel)), tuple(kernel), geometry, transformed, joined)


def conv_forward(
    x: Tensor,
    transform: Transform,
    weight: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    *,
    dtype: torch.dtype,
    statistics: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, mean, var) as kernels/reference says; x and the weight are float32 or bfloat16."""
    args = (x, transform, weight, bias, geometry)
    options = {"dtype": dtype, "statistics": statistics, "out": out}
    if tuning.is_measuring():
        node = node_of(x.shape, weight.shape, geometry, not transform.is_identity)
        _measure_once(node, dtype, "forward", lambda name: partial(run_forward, name, *args, **options))
    return run_forward(choice(x, transform, weight, geometry, dtype, "forward").implementation, *args, **options)


def run_forward(implementation: str, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """:func:`conv_forward` by one implementation, "fused", "hybrid" or "winograd"."""
    found: tuple[Tensor, Tensor | None, Tensor | None] = _MODULES[implementation].conv_forward(*args, **options)
    return found


def conv_backward(
    dy: Tensor,
    edge: BackwardEdge,
    x: Tensor,
    transform: Transform,
    weight: Tensor,
    geometry: ConvGeometry,
    *,
    dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
    accumulate: Tensor | None = None,
    join: Join | None = None,
) -> ConvGradients:
    """The gradients as kernels/reference says; dy, x and the weight are float32 or bfloat16. x is ``join``'s sum where there is one."""
    args = (dy, edge, x, transform, weight, geometry)
    if tuning.is_measuring() and needs[0] and needs[1]:
        into = None if accumulate is None else _like(accumulate)
        options: dict[str, Any] = {"dtype": dtype, "needs": needs, "accumulate": into, "join": join}
        node = node_of(x.shape, weight.shape, geometry, not transform.is_identity, join is not None)
        _measure_once(node, dtype, "backward", lambda name: partial(run_backward, name, *args, **options))
    chosen = choice(x, transform, weight, geometry, dtype, "backward", join is not None).implementation
    return run_backward(chosen, *args, dtype=dtype, needs=needs, accumulate=accumulate, join=join)


def run_backward(
    implementation: str,
    *args: Any,
    needs: tuple[bool, bool, bool],
    accumulate: Tensor | None,
    join: Join | None = None,
    **options: Any,
) -> ConvGradients:
    """:func:`conv_backward` by one of the implementations in convolution_choice.py."""
    dgrad, wgrad = IMPLEMENTATIONS[implementation]
    if not needs[0]:
        dgrad = wgrad
    elif not any(needs[1:]):
        wgrad = dgrad
    if dgrad == wgrad:
        found: ConvGradients = _MODULES[dgrad].conv_backward(*args, needs=needs, accumulate=accumulate, join=join, **options)
        return found
    weights = _MODULES[wgrad].conv_backward(*args, needs=(False, *needs[1:]), accumulate=None, **options)
    inputs = _MODULES[dgrad].conv_backward(*args, needs=(needs[0], False, False), accumulate=accumulate, join=join, **options)
    merged: ConvGradients = inputs._replace(weight=weights.weight, bias=weights.bias)
    return merged


def _measure_once(node: Node, dtype: torch.dtype, direction: str, run_of: Callable[[str], Callable[[], Any]]) -> None:
    """Time the node's candidates on these very arguments, unless nodes of this size were timed before."""
    call = call_of(node, dtype, direction, instruction_set(), library.threads())
    identify_machine()
    if tuning.measured(call) is None:
        tuning.measure(call, {name: run_of(name) for name in candidates(node, dtype, direction)})
        forget_choices()


def _like(accumulate: Tensor) -> Tensor:
    """A tensor to add to that many times, with the strides of the real one and nobody's gradient."""
    return torch.empty_strided(accumulate.shape, accumulate.stride(), dtype=accumulate.dtype).copy_(accumulate)
