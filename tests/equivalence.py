"""One training step of two models side by side, and a relative error that true zeros do not upset."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import bnrestructure
from bnrestructure.verification.rounding import INSIDE, RandomRounding

__all__ = [
    "assert_same_training",
    "assert_same_values",
    "cotangent_loss",
    "relative_errors",
    "restructured_copy",
    "rounding_noise",
    "training_step",
    "tree_tensors",
]

#: What two fp64 runs of the same mathematics may differ by, relative.
FP64_TOLERANCE = 1e-9
#: Where eager itself moves by more than 1e-9 / this when parameters and inputs move by one rounding, that times this is the limit.
NOISE_FACTOR = 16
#: No smooth step moves by this share when its operations' results move by a few roundings of float64.
JUMP = 1e-3
#: Where one rounding moves every output of eager's by more than this share of itself, its values say nothing.
WORTHLESS = 0.1
#: Tensors smaller than this share of the largest of their kind are compared on that scale: a gradient that is zero in theory (a
#: convolution's bias before a batch norm) is rounding noise in both models.
ZERO_SHARE = 1e-3
#: A tensor below this on the scale that its errors are measured on (a ten-thousand-millionth of the largest of its kind) is rounding alone.
NOTHING = 1e-7


def restructured_copy(model: nn.Module, **options: Any) -> nn.Module:
    """A deep copy of the model, restructured with the reference kernels."""
    return bnrestructure.restructure(copy.deepcopy(model), **{"backend": "reference", **options})


def tree_tensors(value: Any) -> list[Tensor]:
    """The tensors in any nest of containers, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def cotangent_loss(outputs: Any, seed: int = 0) -> Tensor:
    """Sum of each floating output times a fixed random tensor: every element of every output has its own gradient."""
    generator = torch.Generator().manual_seed(seed)
    terms = []
    for tensor in tree_tensors(outputs):
        if tensor.is_floating_point() and tensor.requires_grad:
            cotangent = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            terms.append((tensor * cotangent.to(tensor.dtype)).sum())
    return torch.stack(terms).sum()


def training_step(
    model: nn.Module, *args: Any, loss: Callable[[Any], Tensor] = cotangent_loss, seed: int = 0, **kwargs: Any
) -> dict[str, Tensor]:
    """Forward and backward with fresh gradients; outputs, gradients of parameters, inputs and outputs, and buffers, by kind and name."""
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    args, kwargs = pytree.tree_map(_fresh_input, (args, kwargs))
    outputs = model(*args, **kwargs)
    returned = {f"gradient of output/{i}": t for i, t in enumerate(tree_tensors(outputs)) if t.requires_grad and not t.is_leaf}
    for tensor in returned.values():
        tensor.retain_grad()
    found = {f"output/{i}": t.detach().clone().requires_grad_(t.requires_grad) for i, t in enumerate(tree_tensors(outputs))}
    if any(t.requires_grad for t in tree_tensors(outputs)):
        loss(outputs).backward()
    for i, tensor in enumerate(tree_tensors((args, kwargs))):
        if tensor.grad is not None:
            found[f"input gradient/{i}"] = tensor.grad.clone()
    found.update({name: tensor.grad.clone() for name, tensor in returned.items() if tensor.grad is not None})
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"gradient/{name}"] = parameter.grad.clone()
    found.update({f"buffer/{name}": buffer.clone() for name, buffer in model.named_buffers()})
    return found


def _fresh_input(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    return value


def relative_errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """||actual - expected|| / ||expected|| per tensor, with the floor described at ``ZERO_SHARE``; NaN equals NaN."""
    assert actual.keys() == expected.keys(), sorted(actual.keys() ^ expected.keys())
    largest: dict[str, float] = {}
    for name, tensor in expected.items():
        kind = name.split("/")[0]
        largest[kind] = max(largest.get(kind, 0.0), _rms(tensor))
    errors = {}
    for name, tensor in expected.items():
        other = actual[name]
        assert other.shape == tensor.shape, f"{name}: {tuple(other.shape)} instead of {tuple(tensor.shape)}"
        assert other.dtype == tensor.dtype, f"{name}: {other.dtype} instead of {tensor.dtype}"
        same = (other == tensor) | (other.isnan() & tensor.isnan())
        difference = torch.where(same, 0.0, other.double() - tensor.double())
        scale = max(_rms(tensor), ZERO_SHARE * largest[name.split("/")[0]])
        errors[name] = 0.0 if bool(same.all()) else _rms(difference) / scale if scale else float("inf")
    return errors


def _rms(tensor: Tensor) -> float:
    tensor = tensor.detach()
    finite = tensor.double()[tensor.isfinite()] if tensor.is_floating_point() else tensor.double()
    return float(finite.square().mean().sqrt()) if finite.numel() else 0.0


def rounding_noise(
    model: nn.Module, expected: dict[str, Tensor], *args: Any, seed: int = 0, beside: list[Tensor] | None = None, **kwargs: Any
) -> dict[str, float]:
    """By tensor, how far the model's own step moves, at most, in five trials with every parameter and input off by up to one rounding.

    ``beside``: before the step, the parameters of the model that it is compared with. Those are off by what earlier steps have allowed (a
    bias before a batch norm has rounding noise for a gradient, and shifts the running mean), and the trials' are off by as much.

    Rounding also happens on the way: five more trials round the results of every operation at random, by up to ``INSIDE`` roundings, and
    an ``INSIDE``-th of what comes of it counts. All of it does where it is more than ``JUMP``: there rounding decides on which side of an
    activation's kink a value is (a channel that a batch norm finds constant, say), and less of it decides no less.

    No implementation in this precision can be held to less. A wrong formula is wrong by far more, whatever the conditioning.
    A tensor that is ``NOTHING`` beside the others of its kind is zero in exact arithmetic (the gradient of a bias that a batch norm takes
    out again): the value it has is the model's own error, and often the same one in all five trials.
    """
    noise: dict[str, float] = {}
    for trial in range(5):
        generator = torch.Generator().manual_seed(trial)

        def nudge(value: Any, generator: torch.Generator = generator, off: Tensor | float = 0.0) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            u = torch.rand(value.shape, generator=generator, dtype=torch.float64) * 2 - 1
            return (value.detach() * (1 + torch.finfo(value.dtype).eps * u) + off * u).to(value.dtype)

        nudged = copy.deepcopy(model)
        for parameter, other in zip(nudged.parameters(), beside or nudged.parameters(), strict=True):
            parameter.data.copy_(nudge(parameter, off=(other - parameter).detach()))
        nudged_args, nudged_kwargs = pytree.tree_map(nudge, (args, kwargs))
        errors = relative_errors(training_step(nudged, *nudged_args, seed=seed, **nudged_kwargs), expected)
        with RandomRounding(trial):
            rounded = relative_errors(training_step(copy.deepcopy(model), *args, seed=seed, **kwargs), expected)
        inside = {n: error if error > JUMP else error / INSIDE for n, error in rounded.items()}
        noise = {n: max(noise.get(n, 0.0), error, inside[n]) for n, error in errors.items()}
    sizes = relative_errors({name: torch.zeros_like(tensor) for name, tensor in expected.items()}, expected)
    return {name: max(noise[name], size) if size < NOTHING else noise[name] for name, size in sizes.items()}


def assert_same_values(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float | dict[str, float] = FP64_TOLERANCE
) -> None:
    """Fail with the worst tensor's name unless every relative error is within the tolerance, one for all or one by name.

    A NaN error fails.
    """
    errors = relative_errors(actual, expected)
    unlike = [name for name, tensor in expected.items() if tensor.requires_grad != actual[name].requires_grad]
    assert not unlike, f"needs a gradient in one of the two: {', '.join(unlike)}"
    limits = tolerance if isinstance(tolerance, dict) else dict.fromkeys(errors, tolerance)
    wrong = {name: error for name, error in errors.items() if not error <= limits[name]}
    if wrong:
        worst = sorted(wrong, key=lambda name: wrong[name], reverse=True)[:5]
        listing = ", ".join(f"{name} {wrong[name]:.2e}" for name in worst)
        raise AssertionError(f"{len(wrong)} of {len(errors)} tensors differ; worst: {listing}")


def assert_same_training(
    model: nn.Module,
    *args: Any,
    steps: int = 2,
    tolerance: float = FP64_TOLERANCE,
    options: dict[str, Any] | None = None,
    between: Callable[[nn.Module, int], None] | None = None,
    allow_noise: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Train the model and a restructured copy for some SGD steps, comparing everything after each. Returns the copy.

    ``between(model, step)`` is applied to both after each step. ``allow_noise``: for models that nobody chose, which may be so badly
    conditioned that rounding alone moves a tensor by more than the tolerance; see ``rounding_noise``. Where it makes up the whole of
    eager's outputs (a batch norm behind a dead ReLU, say: about one in five thousand random graphs) there is nothing to compare.
    """
    rewritten = restructured_copy(model, **(options or {}))
    original = copy.deepcopy(model)
    for step in range(steps):
        before, beside = copy.deepcopy(original), [parameter.detach().clone() for parameter in rewritten.parameters()]
        expected = training_step(original, *args, seed=step, **kwargs)
        actual = training_step(rewritten, *args, seed=step, **kwargs)
        errors = relative_errors(actual, expected)
        if allow_noise and any(not error <= tolerance for error in errors.values()):
            noise = rounding_noise(before, expected, *args, seed=step, beside=beside, **kwargs)
            if min((share for name, share in noise.items() if name.startswith("output/")), default=0.0) > WORTHLESS:
                return rewritten  # decided by eager alone
            assert_same_values(actual, expected, {n: max(tolerance, NOISE_FACTOR * noise[n]) for n in errors})
        else:
            assert_same_values(actual, expected, tolerance)
        for m in (original, rewritten):
            for parameter in m.parameters():
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-1e-3)
            if between is not None:
                between(m, step)
    return rewritten
