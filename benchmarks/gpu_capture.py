"""A training step as one CUDA graph, and its replay checked against the step as it is."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
from gpu_nodes import distance
from torch import Tensor, nn

__all__ = ["captured_step"]


def captured_step(
    step: Callable[[], Tensor], model: nn.Module, losses: list[Tensor]
) -> tuple[Callable[[], Tensor], dict[str, float]]:
    """The step as a CUDA graph: what a training loop with inputs of one size can do with any of the models.

    With it ``replayed_gradients``: the median over the parameters of the distance between the gradients of one replay and of one
    plain step from the same weights. Losses of the steps taken on the way go to ``losses``.
    """
    parameters = list(model.parameters())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            losses.append(step().clone())
        weights = [p.detach().clone() for p in parameters]
        step()
        plain = [_gradient(p).double() for p in parameters]
        _restore(parameters, weights)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    graph.replay()
    losses.append(loss.clone())
    apart = median(distance(_gradient(p), truth) for p, truth in zip(parameters, plain, strict=True))

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay, {"replayed_gradients": apart}


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()


def _restore(parameters: list[nn.Parameter], weights: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)
