"""The models of benchmarks/gpu.py, and their training steps checked against fp64; gpu_steps.py times them."""

from __future__ import annotations

import copy
from statistics import median
from typing import Any

import torch
from gpu_nodes import distance, poisoned
from torch import Tensor, nn
from torch.nn import functional as F

import bnrestructure
from bnrestructure.kernels import registry
from bnrestructure.kernels.cuda import CudaKernels

__all__ = ["check_step", "make_model", "restructured"]


def make_model(name: str, device: str = "cuda") -> nn.Module:
    """A torchvision model in training mode, channels_last, without its dropout and stochastic depth; "tiny" is for dry runs."""
    torch.manual_seed(0)
    if name == "tiny":
        return _tiny().to(device, memory_format=torch.channels_last).train()
    from torchvision import models
    from torchvision.ops import StochasticDepth

    model = models.get_model(name)
    for module in model.modules():
        if isinstance(module, (nn.Dropout, StochasticDepth)):
            module.p = 0.0
    return model.to(device, memory_format=torch.channels_last).train()


def _tiny() -> nn.Module:
    """Two convolutions with a batch norm and a ReLU between them, for ten classes."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip


def restructured(model: nn.Module, device: str) -> nn.Module:
    """Restructured for the GPU; in a dry run, where the tensors are on the CPU, our kernels stand in for the CPU's."""
    if device == "cpu":
        registry._DEVICES["cpu"] = "bnrestructure.kernels.cuda"
        CudaKernels.unavailable_reason = lambda self: None
        registry.forget_answers()
    elif (kernels := registry.proved("cuda")) is not None:
        kernels.trusted = True  # the parts before this one hold them against fp64
    return bnrestructure.restructure(model, backend="auto" if device == "cpu" else "cuda")


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
    rewritten = restructured(copy.deepcopy(model), device)
    with poisoned():
        gradients = step(rewritten, x, True)
    ours = [distance(t, true) for t, true in zip(gradients, truth, strict=True)]
    found = {
        "output": ours[0],
        "eager_output": eager[0],
        "gradients": median(ours[1:]),
        "eager_gradients": median(eager[1:]),
    }
    fine = found["output"] <= 2 * found["eager_output"] and found["gradients"] <= 2 * found["eager_gradients"]
    return {"ok": fine, **found}
