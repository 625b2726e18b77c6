"""The models of benchmarks/gpu.py: whole training steps, checked against fp64, timed, and their memory measured."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from gpu_nodes import distance
from torch import Tensor, nn
from torch.nn import functional as F

import bnrestructure

__all__ = ["VARIANTS", "check_step", "largest_batch", "time_model"]

#: What is timed against each other, CUDA graphs on both sides.
VARIANTS = ("eager", "eager graphed", "compile", "compile graphed", "restructured", "restructured graphed")


def make_model(name: str, device: str = "cuda") -> nn.Module:
    """A torchvision model in training mode, channels_last, without its dropout and stochastic depth."""
    from torchvision import models
    from torchvision.ops import StochasticDepth

    torch.manual_seed(0)
    model = models.get_model(name)
    for module in model.modules():
        if isinstance(module, (nn.Dropout, StochasticDepth)):
            module.p = 0.0
    return model.to(device, memory_format=torch.channels_last).train()


def check_step(name: str, device: str = "cuda", batch: int = 8, size: int = 96) -> dict[str, Any]:
    """One training step in bf16 autocast against eager fp64: the restructured model's distance beside eager's."""
    model = make_model(name, device)
    x = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    target = torch.arange(batch, device=device)

    def step(own: nn.Module, inputs: Tensor, autocast: bool) -> list[Tensor]:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=autocast):
            output = own(inputs)
        F.cross_entropy(output.to(torch.promote_types(output.dtype, torch.float32)), target).backward()
        return [output.detach(), *(p.grad for p in own.parameters())]

    truth = step(copy.deepcopy(model).double(), x.double(), False)
    eager = [distance(t, true) for t, true in zip(step(copy.deepcopy(model), x, True), truth, strict=True)]
    restructured = bnrestructure.restructure(copy.deepcopy(model), backend="cuda")
    ours = [distance(t, true) for t, true in zip(step(restructured, x, True), truth, strict=True)]
    found = {
        "output": ours[0],
        "eager_output": eager[0],
        "gradients": median(ours[1:]),
        "eager_gradients": median(eager[1:]),
    }
    fine = found["output"] <= 2 * found["eager_output"] and found["gradients"] <= 2 * found["eager_gradients"]
    return {"ok": fine, **found}


def time_model(name: str, batch: int, variant: str, rounds: int = 20) -> dict[str, Any]:
    """Milliseconds of a training step (bf16 autocast, channels_last, SGD) and its peak memory in bytes.

    A captured graph holds on to its memory: there ``reserved`` is what counts.
    """
    gc.collect()
    torch.cuda.empty_cache()
    try:
        step = _prepared(name, batch, variant)
        torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            loss = step()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        ok = bool(torch.isfinite(loss))
        memory = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        return {"ok": ok, "step": median(times), "fastest": min(times), **memory}
    except torch.OutOfMemoryError:
        return {"ok": True, "step": None, "reason": "out of memory"}
    finally:
        torch.compiler.reset()


def _prepared(name: str, batch: int, variant: str) -> Callable[[], Tensor]:
    """A warmed-up training step of a variant of the model."""
    model = make_model(name)
    x = torch.randn(batch, 3, 224, 224, device="cuda").contiguous(memory_format=torch.channels_last)
    target = torch.randint(1000, (batch,), device="cuda")
    if variant.startswith("restructured"):
        bnrestructure.restructure(model, backend="cuda")
    elif variant.startswith("compile"):
        model.compile(mode="reduce-overhead" if variant.endswith("graphed") else None)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> Tensor:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimiser.step()
        return loss.detach()

    for _ in range(5):
        step()
    if variant.endswith("graphed") and not variant.startswith("compile"):
        return _captured(step)
    return step


def _captured(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step as a CUDA graph: what a training loop with inputs of one size can do with any of the models."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> Tensor:
        graph.replay()
        return loss

    replay()
    return replay


def largest_batch(name: str, variant: str) -> dict[str, Any]:
    """The largest batch, in steps of a quarter of a power of two, whose training step fits in the device's memory."""
    fits = 0
    for batch in (64 * quarters * 2**power // 4 for power in range(8) for quarters in (4, 5, 6, 7)):
        if time_model(name, batch, variant, rounds=1)["step"] is None:
            break
        fits = batch
    return {"ok": fits > 0, "batch": fits}
