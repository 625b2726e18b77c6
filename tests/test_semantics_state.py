"""What stays the user's: the object, its class, parameters, state_dict, hooks, optimisers, copies and pickles."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from equivalence import assert_same_training, assert_same_values, training_step
from small_models import SMALL_MODELS, Chain, Residual, build, input_for
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import bnrestructure
from bnrestructure.capture.swap import is_restructured


def restructure(model: nn.Module) -> nn.Module:
    return bnrestructure.restructure(model, backend="reference")


def test_same_object_class_parameters_and_keys() -> None:
    model = build("residual")
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    assert restructure(model) is model
    assert isinstance(model, Residual)
    assert list(model.state_dict()) == keys
    assert list(dict(model.named_parameters())) == list(parameters)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert inspect.signature(model.forward) == inspect.signature(Residual().forward)
    model(input_for("residual"))
    assert list(model.state_dict()) == keys
    assert bnrestructure.unrestructure(model) is model
    assert type(model) is Residual


def test_strict_load_both_ways() -> None:
    original, rewritten = build("dense"), restructure(build("dense", seed=1))
    rewritten.load_state_dict(original.state_dict(), strict=True)
    x = input_for("dense")
    assert_same_values(training_step(rewritten, x), training_step(original, x))
    fresh = build("dense", seed=2)
    fresh.load_state_dict(rewritten.state_dict(), strict=True)
    assert_same_values(training_step(fresh, x), training_step(original, x) | {})


def test_load_with_assign_replaces_the_parameters_in_use() -> None:
    rewritten, other, x = restructure(build("chain")), build("chain", seed=5), input_for("chain")
    training_step(rewritten, x)
    rewritten.load_state_dict({k: v.clone() for k, v in other.state_dict().items()}, assign=True)
    assert_same_values(training_step(rewritten, x), training_step(other, x))


@pytest.mark.parametrize("before", [True, False], ids=["optimiser first", "restructure first"])
def test_optimiser_made_before_or_after(before: bool) -> None:
    original, rewritten, x = build("residual"), build("residual"), input_for("residual")
    reference = torch.optim.Adam(original.parameters(), lr=1e-2)
    if before:
        optimiser = torch.optim.Adam(rewritten.parameters(), lr=1e-2)
    restructure(rewritten)
    if not before:
        optimiser = torch.optim.Adam(rewritten.parameters(), lr=1e-2)
    for _ in range(3):
        for model, opt in ((original, reference), (rewritten, optimiser)):
            model(x).square().mean().backward()
            opt.step()
            opt.zero_grad()
    for (name, expected), actual in zip(original.named_parameters(), rewritten.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
@pytest.mark.parametrize("name", SMALL_MODELS)
def test_deepcopy_is_independent_and_still_restructured(name: str, trained: bool) -> None:
    model, x = restructure(build(name)), input_for(name)
    if trained:
        training_step(model, x)
    twin = copy.deepcopy(model)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    training_step(twin, x)
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())
    assert _is_restructured(twin) == _is_restructured(model)
    original = bnrestructure.unrestructure(copy.deepcopy(model))
    assert_same_values(training_step(model, x), training_step(original, x))


def _is_restructured(model: nn.Module) -> bool:
    return any(is_restructured(m) for m in model.modules())


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_pickle(how: str) -> None:
    model, x = restructure(build("dense")), input_for("dense")
    training_step(model, x)
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert _is_restructured(twin)
    assert_same_values(training_step(twin, x), training_step(model, x) | {}, tolerance=float("inf"))
    original = bnrestructure.unrestructure(copy.deepcopy(twin))
    assert_same_values(training_step(twin, x), training_step(original, x))


def test_saved_state_dict_is_plain() -> None:
    model = restructure(build("chain"))
    model(input_for("chain"))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert build("chain").load_state_dict(torch.load(file, weights_only=True), strict=True)


def test_exponential_moving_average() -> None:
    models = build("residual"), restructure(build("residual"))
    x = input_for("residual")
    averages = [AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True) for m in models]
    for _ in range(3):
        for model, average in zip(models, averages, strict=True):
            model(x).square().mean().backward()
            torch.optim.SGD(model.parameters(), lr=0.01).step()
            model.zero_grad()
            average.update_parameters(model)
    for (name, expected), actual in zip(averages[0].named_parameters(), averages[1].parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10, msg=name)
    for average in averages:
        average.eval()
    torch.testing.assert_close(averages[1](x), averages[0](x), rtol=1e-9, atol=1e-9)


def test_hooks_on_the_model_run_as_before() -> None:
    seen: list[str] = []

    def attach(model: nn.Module) -> None:
        model.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
        model.register_forward_hook(lambda m, args, out: out + 1)
        model.register_full_backward_pre_hook(lambda m, g: (g[0] * 3,))
        model.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
        model.register_forward_hook(lambda m, args, kwargs, out: seen.append("kwargs"), with_kwargs=True)

    model = build("chain")
    attach(model)
    assert_same_training(model, input_for("chain"))
    assert seen.count("backward") == seen.count("kwargs") == 4


@pytest.mark.parametrize("where", ["bn1", "conv2", "layer1", "layer2.downsample", "layer3.relu"])
def test_hooks_inside_are_a_boundary(where: str) -> None:
    """A hook that changes the values runs in every step, and the plan says why the site is not fused."""
    name = "chain" if "." not in where and "layer" not in where else "residual"
    model = build(name)
    inner = model.get_submodule(where)
    calls: list[str] = []
    inner.register_forward_hook(lambda m, args, out: calls.append(where) or out * 1.5)
    if where not in ("bn1", "layer3.relu"):  # eager forbids a backward hook next to an in-place activation
        inner.register_full_backward_hook(lambda m, gi, go: tuple(None if g is None else g * 0.5 for g in gi))
    assert_same_training(model, input_for(name), steps=2)
    assert len(calls) >= 4
    plan = bnrestructure.explain(model, backend="reference")
    if where.startswith("bn"):
        assert next(s for s in plan.sites if s.name == where).reason == "it has hooks"


@pytest.mark.parametrize("index", range(7))
def test_hook_on_any_layer_runs(index: int) -> None:
    """Convolution, batch norm, in-place activation, pools, identity, linear: whichever has the hook, it changes the values."""
    layers = [
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6),
        nn.Hardswish(inplace=True), nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2),
    ]  # fmt: skip
    layers[(1, 2, 3, 6, 7, 8, 0)[index]].register_forward_hook(lambda m, args, out: out * 1.5)
    assert_same_training(nn.Sequential(*layers).double(), input_for("chain"))


def test_global_hooks_leave_the_model_to_eager() -> None:
    model, x, seen = restructure(build("chain")), input_for("chain"), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
    try:
        training_step(model, x)
    finally:
        handle.remove()
    assert "BatchNorm2d" in seen


class ScaledBatchNorm(nn.BatchNorm2d):
    """A subclass with another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class RenamedBatchNorm(nn.BatchNorm2d):
    """A subclass without one."""


class FrozenBatchNorm(nn.BatchNorm2d):
    """A subclass that normalises with its running statistics whatever mode it is in."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False)


@pytest.mark.parametrize(
    ("kind", "status"), [(ScaledBatchNorm, "partial"), (RenamedBatchNorm, "fused"), (FrozenBatchNorm, "kept")]
)
def test_subclass_of_batch_norm_is_what_its_forward_does(kind: type[nn.BatchNorm2d], status: str) -> None:
    model = build("chain")
    model.bn1 = kind(6).double()
    assert_same_training(model, input_for("chain"))
    site = next(s for s in bnrestructure.explain(model, backend="reference").sites if s.name == "bn1")
    assert site.status == status
    assert bool(site.reason) == (status != "fused")


def test_parametrized_convolution_is_a_boundary() -> None:
    model = build("residual")
    parametrizations.weight_norm(model.layer1.conv2)
    parametrizations.spectral_norm(model.layer2.conv1)
    assert_same_training(model, input_for("residual"))
    plan = bnrestructure.explain(model, backend="reference")
    site = next(s for s in plan.sites if s.name == "layer1.bn2")
    assert "parametrized" in str(site.reason)


def test_parametrization_added_and_removed_between_steps() -> None:
    def between(model: Any, step: int) -> None:
        if step == 0:
            parametrizations.weight_norm(model.conv2)
        if step == 1:
            parametrize.remove_parametrizations(model.conv2, "weight")

    assert_same_training(build("chain"), input_for("chain"), steps=3, between=between)


def test_parametrized_batch_norm_and_model() -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    model = build("chain")
    parametrize.register_parametrization(model.bn1, "weight", Double())
    assert_same_training(model, input_for("chain"))


def test_weight_tying() -> None:
    model = build("residual")
    model.layer1.conv2.weight = model.layer1.conv1.weight
    model.layer3.bn2.weight = model.layer3.bn1.weight
    rewritten = assert_same_training(model, input_for("residual"))
    assert rewritten.layer1.conv2.weight is rewritten.layer1.conv1.weight


def test_parameters_without_gradient() -> None:
    model = build("residual")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layer2" not in name and "stem" not in name)
    assert_same_training(model, input_for("residual"))


def test_nothing_requires_gradient() -> None:
    model, x = restructure(build("dense").requires_grad_(False)), input_for("dense")
    assert not model(x).requires_grad
    torch.testing.assert_close(model(x), build("dense")(x), rtol=1e-9, atol=1e-9)


def test_restructuring_twice_and_undoing_twice() -> None:
    model, x = build("dense"), input_for("dense")
    original = copy.deepcopy(model)
    once = type(restructure(model))
    assert type(restructure(model)) is once
    assert_same_values(training_step(model, x), training_step(original, x))
    bnrestructure.unrestructure(bnrestructure.unrestructure(model))
    assert {type(m) for m in model.modules()} == {type(m) for m in original.modules()}
    assert model.__dict__.keys() == original.__dict__.keys()


def test_restructuring_a_part_then_the_whole() -> None:
    model, x = build("residual"), input_for("residual")
    original = copy.deepcopy(model)
    restructure(model.layer2)
    assert_same_values(training_step(model, x), training_step(original, x))
    restructure(model)
    assert_same_values(training_step(model, x), training_step(original, x))


def test_model_without_batch_norm() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    assert type(restructure(model)) is nn.Sequential
    plan = bnrestructure.explain(model, backend="reference")
    assert plan.sites == []
    assert plan.coverage == 1.0


def test_functional_call_and_func_grad() -> None:
    model, x = restructure(build("chain")), input_for("chain")
    other = build("chain", seed=9)
    state = {**dict(other.named_parameters()), **{k: v.clone() for k, v in other.named_buffers()}}
    torch.testing.assert_close(torch.func.functional_call(model, state, (x,)), other(x), rtol=1e-9, atol=1e-9)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        buffers = {k: v.clone() for k, v in model.named_buffers()}
        return torch.func.functional_call(model, {**parameters, **buffers}, (x,)).square().sum()

    parameters = {k: v.detach() for k, v in model.named_parameters()}
    gradients = torch.func.grad(loss)(parameters)
    model.zero_grad()
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-8, atol=1e-8, msg=name)


def test_explain_changes_nothing() -> None:
    model = build("residual")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    classes, attributes = [type(m) for m in model.modules()], [list(m.__dict__) for m in model.modules()]
    state = torch.get_rng_state()
    bnrestructure.explain(model, input_for("residual", torch.float32), backend="reference")
    assert torch.equal(torch.get_rng_state(), state)
    assert [type(m) for m in model.modules()] == classes
    assert [list(m.__dict__) for m in model.modules()] == attributes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_chain_is_fully_fused() -> None:
    plan = bnrestructure.explain(Chain(), torch.randn(2, 3, 8, 8), backend="reference")
    assert plan.counts == {"fused": 2, "partial": 0, "kept": 0}
    assert all(site.bytes_after is not None and site.bytes_after < site.bytes_before for site in plan.sites)
