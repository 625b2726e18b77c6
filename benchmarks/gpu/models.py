"""Training steps of benchmarks/gpu, ours and its rivals': checked against fp64, captured, timed, and held against eager's losses."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import bnrestructure
from benchmarks.gpu.kernels import convolutions_chosen, is_out_of_memory, no_convolution_found, release_memory
from benchmarks.gpu.nodes import distance, poisoned
from bnrestructure.kernels import registry, tuning
from bnrestructure.kernels.cuda import CudaKernels

__all__ = ["captured_step", "check_step", "largest_batch", "time_model", "trains_alike"]


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


def restructured(model: nn.Module, device: str, graphs: str = "off") -> nn.Module:
    """Restructured for the GPU; in a dry run, where the tensors are on the CPU, our kernels stand in for the CPU's."""
    if device == "cpu":
        registry._DEVICES["cpu"] = "bnrestructure.kernels.cuda"
        CudaKernels.unavailable_reason = lambda self: None
        registry.forget_answers()
    elif (kernels := registry.proved("cuda")) is not None:
        kernels.trusted = True  # the parts before this one hold them against fp64
    return bnrestructure.restructure(model, backend="auto" if device == "cpu" else "cuda", graphs=graphs)


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


#: The variants whose whole step is one CUDA graph.
_CAPTURED = ("eager graphed", "compile captured", "restructured graphed", "restructured tuned graphed")
#: Steps between two events: the device is kept busy, and the host's head start counts once.
_STEPS = 10
_WARM_UPS = 5
#: How many losses are compared, the first ones, and how far they may be from eager's, as a share of its first loss. At this learning
#: rate a network fits its one batch in these steps, and bf16's rounding alone moved the losses by up to 0.6% of the first, the first
#: itself by 0.03% (a resnet18 with 32 images on a CPU).
_COMPARED, _FIRST, _FURTHER = 12, 0.005, 0.03
_LEARNING_RATE = 0.01


def time_model(
    name: str,
    batch: int,
    variant: str,
    rounds: int = 5,
    device: str = "cuda",
    choices: Path | None = None,
    expected: list[float] | None = None,
) -> dict[str, Any]:
    """Milliseconds of a training step (bf16 autocast, channels_last, SGD), its peak memory in bytes, and its first losses.

    ``allocated`` is the peak of the tensors' memory, ``before`` what was in use when the unit began. A captured graph holds on to its
    memory: there ``reserved`` is what counts. ``choices`` is the folder that the tuned variant keeps its measurements in; the others
    choose by rule. ``expected``: eager's first losses. Without rounds, only what is compiled and captured runs.
    """
    if device == "cpu":  # the rest of the path is the same
        variant = variant.removesuffix(" graphed").removesuffix(" captured").replace("compile", "eager")
    release_memory()
    on_gpu = device != "cpu"
    found: dict[str, Any] = {"ok": True, "before": torch.cuda.memory_allocated() if on_gpu else 0}
    counters["inductor"].pop("cudagraph_skips", None)
    try:
        with convolutions_chosen(), _measurements(choices if "tuned" in variant else None):
            losses: list[Tensor] = []
            step, replayed = _prepared(name, batch, variant, device, losses)
            if on_gpu:
                torch.cuda.synchronize()
            if not rounds:
                return found
            release_memory()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            times = [_clock(step, losses, on_gpu) for _ in range(rounds)]
            peaks = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if on_gpu else (0, 0)
        found |= {"step": median(times), "fastest": min(times), "allocated": peaks[0], "reserved": peaks[1], **replayed}
        if "compile" in variant:
            found["cudagraph_skips"] = counters["inductor"]["cudagraph_skips"]
        series = [float(loss) for loss in losses]
        reason = trains_alike(series, expected, replayed.get("replayed_gradients"))
        found |= {"ok": reason is None, "compared": expected is not None, "losses": series[:_COMPARED]}
        return found if reason is None else {**found, "reason": reason}
    except Exception as error:  # not torch.OutOfMemoryError alone: Triton, cuDNN and CUDA graphs have errors of their own for it
        if not is_out_of_memory(error):
            raise
        return {"ok": True, "step": None, "reason": "out of memory"}
    finally:
        torch.compiler.reset()


def trains_alike(losses: list[float], expected: list[float] | None, gradients: float | None) -> str | None:
    """Why these losses are not those of eager steps from the same start, or ``gradients``, a replay's distance, is too large; or None."""
    if not torch.tensor(losses).isfinite().all():
        return "the loss is not finite"
    if gradients is not None and not gradients <= 0.02:
        return f"a replay's gradients are {gradients:.3g} away from those of the same step as it is"
    for number, (own, eager) in enumerate(zip(losses, expected or [], strict=False)):
        if abs(own - eager) > (_FURTHER if number else _FIRST) * expected[0]:
            return f"the loss of step {number} is {own:.4f}, eager's {eager:.4f}"
    return None


@contextmanager
def _measurements(choices: Path | None) -> Iterator[None]:
    """Only the tuned variant may know of measurements, it must not fill the user's own file, and the next unit knows of none."""
    before = os.environ.get("BNRESTRUCTURE_CACHE")
    os.environ["BNRESTRUCTURE_CACHE"] = "off" if choices is None else str(choices)
    tuning.forget()
    try:
        yield
    finally:
        del os.environ["BNRESTRUCTURE_CACHE"]
        if before is not None:
            os.environ["BNRESTRUCTURE_CACHE"] = before
        tuning.forget()


def _clock(step: Callable[[], Tensor], losses: list[Tensor], on_gpu: bool) -> float:
    """Milliseconds a step, of some in a row between two events; on the CPU, in a dry run, of a single one."""
    if not on_gpu:
        return tuning.wall_clock(lambda: losses.append(step()))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(_STEPS):
        losses.append(step().clone())  # a graph overwrites its own
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / _STEPS


def _prepared(
    name: str, batch: int, variant: str, device: str, losses: list[Tensor]
) -> tuple[Callable[[], Tensor], dict[str, Any]]:
    """A warmed-up training step, and what is known of its graph. The losses of the steps that it takes go to ``losses``."""
    model = make_model(name, device)
    size, classes = (16, 10) if name == "tiny" else (224, 1000)
    x = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    target = torch.randint(classes, (batch,), device=device)
    compiled = variant.startswith("compile")
    if variant.startswith("restructured"):
        restructured(model, device, "auto" if "repeated" in variant else "off")
        if "tuned" in variant and device != "cpu":
            with torch.autocast(device, torch.bfloat16):
                bnrestructure.tune(model, x)
    elif compiled:
        model.compile(mode="reduce-overhead" if variant == "compile graphed" else None)
    step = _training_step(model, x, target, marks=variant == "compile graphed")
    for _ in range(1 if device == "cpu" else _WARM_UPS):
        losses.append(step().clone())
    if "repeated" in variant:
        return step, {"graphs": [note for note in bnrestructure.explain(model).notes if "device graphs" in note]}
    return captured_step(step, model, losses) if variant in _CAPTURED else (step, {})


def _training_step(model: nn.Module, x: Tensor, target: Tensor, marks: bool) -> Callable[[], Tensor]:
    """Forward, backward and optimiser; returns the loss. ``marks``: torch.compile's own graphs are told where a step begins."""
    optimiser = torch.optim.SGD(model.parameters(), lr=_LEARNING_RATE)

    def step() -> Tensor:
        if marks:
            torch.compiler.cudagraph_mark_step_begin()
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimiser.step()
        return loss.detach()

    return step


def largest_batch(name: str, variant: str, device: str = "cuda", most: int = 2**14) -> dict[str, Any]:
    """The largest batch, in steps of a quarter of a power of two, whose training step fits in the device's memory.

    From the smallest power of two that does not fit, back: a few steps at each are all that it takes.
    """

    def fits(batch: int) -> bool:
        try:
            return "reason" not in time_model(name, batch, variant, 0, device)
        except RuntimeError as error:
            if no_convolution_found(error):
                return False
            raise

    power = 2 if device == "cpu" else 64
    if not fits(power):
        return {"ok": False, "reason": f"a batch of {power} does not fit"}
    while 2 * power <= most and fits(2 * power):
        power *= 2
    quarter = max(power // 4, 1)
    batch = next((b for b in (power + 3 * quarter, power + 2 * quarter, power + quarter) if b <= most and fits(b)), power)
    return {"ok": True, "batch": batch}
