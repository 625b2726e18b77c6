"""
A training step as one CUDA graph
=================================

A whole training step of a restructured model as one CUDA graph: forward, backward and optimiser, replayed without Python.

.. code-block:: sh

    python examples/cuda_graph.py [MODEL]      # any torchvision classification model; resnet50 if none is named

A restructured step has several hundred short kernels, and launching them one by one from Python takes longer than they
do. A graph launches them all at once. It asks for this of a training loop:

- every batch has the shape, dtype and memory format of the first (drop_last=True), and is copied into the graph's own tensors;
- nothing in the step reads a value back to the host (no .item(), no print of the loss): read the loss between steps;
- the learning rate is a tensor on the device, filled by the schedule: a Python number would be burnt in;
- an optimiser that knows of graphs: SGD(fused=True), Adam(capturable=True);
- the model stays in training mode as it was captured: after freezing a layer make a new GraphedStep.

**This has not been run on a GPU yet.** What can be tested without one is (tests/test_examples.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bnrestructure

#: Eager steps before the capture: kernels are compiled, cuDNN picks its algorithms, and the optimiser makes its state.
WARM_UP = 3


class GraphedStep:
    """Calls ``step(x, target) -> loss``; after a few batches as a CUDA graph. Each call trains on its batch once.

    x, target    the first batch, on the GPU: what all others must look like
    """

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor], x: Tensor, target: Tensor) -> None:
        self._step = step
        self._inputs = (torch.empty_like(x), torch.empty_like(target))
        self._graph: torch.cuda.CUDAGraph | None = None
        self._loss = torch.empty(())
        self._calls = 0

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        """The loss of this batch, a tensor that the next call overwrites. Raises ValueError on a batch of another shape or dtype."""
        for own, given in zip(self._inputs, (x, target), strict=True):
            if own.shape != given.shape or own.dtype != given.dtype:
                raise ValueError(f"the graph is for batches {list(own.shape)} of {own.dtype}, this is {list(given.shape)} of {given.dtype}")
            own.copy_(given)
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._warm_up()
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):  # records the step and runs nothing
                self._loss = self._step(*self._inputs)
        self._graph.replay()
        return self._loss

    def _warm_up(self) -> Tensor:
        """One step, on a stream other than the default one: what is captured must not depend on that."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loss = self._step(*self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        return loss


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, device: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The step that is captured. Gradients start as None, so that the graph owns their memory; autocast is inside."""

    def step(x: Tensor, target: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            loss = cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def main() -> None:
    """Train on random images and print the loss and the time of a step; without a GPU say so."""
    if not torch.cuda.is_available():
        print("There is no CUDA device here, so nothing was run: a CUDA graph needs one.")
        return
    import torchvision

    torch.manual_seed(0)
    name = sys.argv[1] if len(sys.argv) > 1 else "resnet50"
    model = torchvision.models.get_model(name, weights=None, num_classes=10).to("cuda", memory_format=torch.channels_last)
    bnrestructure.restructure(model, backend="cuda")
    rate = torch.tensor(0.01, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, fused=True)
    x = torch.randn(64, 3, 224, 224, device="cuda").contiguous(memory_format=torch.channels_last)
    target = torch.randint(10, (64,), device="cuda")

    with torch.autocast("cuda", torch.bfloat16):  # kernels are proved on this device before the first step that may be captured
        for call, fault in bnrestructure.prove(model, x, loss_fn=lambda output: cross_entropy(output, target)).items():
            print(f"{call} runs on PyTorch's own operators: {fault}")
    step = GraphedStep(training_step(model, optimizer, "cuda"), x, target)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for i in range(30):
        rate.fill_(0.01 * (1 - i / 30))  # the schedule, seen by the graph
        if i == 20:
            start.record()
        loss = step(x, target)
        if i % 10 == 0:
            print(f"step {i}: loss {loss.item():.4f}")
    end.record()
    end.synchronize()
    print(f"{name}: {start.elapsed_time(end) / 10:.2f} ms a step on {torch.cuda.get_device_name()}")


if __name__ == "__main__":
    main()
