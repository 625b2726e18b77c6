"""Training and eval, frozen layers, batch norm's options, shared modules, gradients switched on and off, changing inputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from equivalence import (
    assert_same_training,
    assert_same_values,
    cotangent_loss,
    restructured_copy,
    training_step,
    tree_tensors,
)
from small_models import SMALL_MODELS, Chain, build, conv_bn, input_for
from torch import Tensor, nn
from torch.nn import functional as F

import bnrestructure


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SMALL_MODELS)
def test_eval_is_bit_identical(name: str, dtype: torch.dtype) -> None:
    model, x = build(name, dtype), input_for(name, dtype)
    rewritten = restructured_copy(model)
    for m in (model, rewritten):
        m.eval()
    for expected, actual in zip(tree_tensors(model(x)), tree_tensors(rewritten(x)), strict=True):
        assert torch.equal(actual, expected)
        assert actual.stride() == expected.stride()


def test_eval_runs_the_models_own_forward() -> None:
    calls: list[bool] = []

    class Counting(Chain):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(self.training)
            return super().forward(x)

    model = bnrestructure.restructure(Counting().double(), backend="reference")
    calls.clear()
    model.eval()(input_for("chain"))
    assert calls == [False]


@pytest.mark.parametrize("name", ["residual", "dense", "inverted"])
def test_switching_between_train_and_eval(name: str) -> None:
    original, x = build(name), input_for(name)
    rewritten = restructured_copy(original)
    for mode in (True, False, True, False, True):
        original.train(mode)
        rewritten.train(mode)
        assert_same_values(training_step(rewritten, x), training_step(original, x))


@pytest.mark.parametrize("frozen", ["bn1", "layer1.bn2", "layer2.downsample.1", "all"])
def test_frozen_batch_norm_in_a_training_model(frozen: str) -> None:
    model = build("residual" if frozen != "bn1" else "chain")
    training_step(model, input_for("chain"))
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and frozen in (name, "all"):
            module.eval()
    assert_same_training(model, input_for("chain"), steps=2)
    sites = bnrestructure.explain(model, backend="reference").sites
    kept = [s for s in sites if s.status == "kept"]
    assert kept
    assert all("frozen" in str(s.reason) for s in kept)


def test_freezing_and_thawing_between_steps() -> None:
    def between(model: Any, step: int) -> None:
        model.layer1.eval() if step % 2 == 0 else model.layer1.train()

    assert_same_training(build("residual"), input_for("residual"), steps=4, between=between)


def test_eval_submodules_and_training_root() -> None:
    model = build("residual")
    model.eval()
    model.training = True
    assert_same_training(model, input_for("residual"))
    model.eval()
    model.layer1.train()
    assert_same_training(model, input_for("residual"))


def _replace_batch_norms(model: nn.Module, **options: Any) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.BatchNorm2d(child.num_features, **options))
    return model.double()


@pytest.mark.parametrize("name", ["residual", "dense", "preact", "squeeze_excite", "inception"])
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.3}, {"momentum": 0.0}, {"momentum": 1.0},
        {"momentum": None, "affine": False}, {"affine": False, "track_running_stats": False},
    ],
    ids=str,
)  # fmt: skip
def test_options_of_batch_norm(name: str, options: dict[str, Any]) -> None:
    assert_same_training(_replace_batch_norms(build(name), **options), input_for(name), steps=3)


def test_layer_without_running_statistics_in_eval_mode_inside_a_training_model() -> None:
    """Without running statistics eval mode, too, normalises with the batch's."""
    model = _replace_batch_norms(build("chain"), track_running_stats=False)
    model.bn1.eval()
    assert_same_training(model, input_for("chain"))


def test_batch_norm_with_weight_but_no_bias() -> None:
    model = build("residual")
    model.layer1.bn1.bias = None
    model.layer2.bn2.weight = None
    assert_same_training(model, input_for("residual"))


def test_long_cumulative_average() -> None:
    model = _replace_batch_norms(build("chain"), momentum=None)
    rewritten = assert_same_training(model, input_for("chain"), steps=12)
    assert int(rewritten.bn1.num_batches_tracked) == 12


class SharedModules(nn.Module):
    """The same convolution and batch norm called several times, on different tensors and in different company."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.stem = conv_bn(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a = self.relu(self.bn(self.conv(x)))
        b = self.relu(self.bn(self.conv(a)))
        c = self.bn(b)
        return self.conv(self.relu(c)) + self.bn(self.conv(b)) + a


def test_shared_modules() -> None:
    model = SharedModules().double()
    assert_same_training(model, torch.randn(3, 3, 8, 8, dtype=torch.float64), steps=3)
    names = [s.name for s in bnrestructure.explain(model, backend="reference").sites]
    assert names == ["stem.1", "bn", "bn#2", "bn#3", "bn#4"]


class SharedWithEager(nn.Module):
    """A batch norm whose first call is left to PyTorch, which saves the running statistics, and whose second call is fused."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv1, self.conv2 = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        alone = torch.tanh(self.bn(0.5 * x))  # neither half has a neighbour to ride on
        return alone, self.conv2(torch.relu(self.bn(self.conv1(x))))


def test_batch_norm_shared_with_eager() -> None:
    """As in random graph 304104839: PyTorch's batch norm does not let autograd see that it writes its running statistics."""
    model = SharedWithEager().double()
    statuses = [s.status for s in bnrestructure.explain(model, backend="reference").sites]
    assert statuses == ["kept", "fused"]
    assert_same_training(model, torch.randn(3, 3, 8, 8, dtype=torch.float64), steps=3)


def test_batch_norm_called_outside_before_one_backward() -> None:
    original = SharedWithEager().double()
    rewritten, x = restructured_copy(original), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    for model in (original, rewritten):
        before = model.bn(x)
        cotangent_loss((before, model(x))).backward()
    gradients = [{f"gradient/{n}": p.grad for n, p in m.named_parameters()} for m in (rewritten, original)]
    assert_same_values(*gradients)


def test_no_grad_training_forward() -> None:
    original = build("dense")
    rewritten, x = restructured_copy(original), input_for("dense")
    with torch.no_grad():
        torch.testing.assert_close(rewritten(x), original(x), rtol=1e-9, atol=1e-9)
    for (name, expected), actual in zip(original.named_buffers(), rewritten.buffers(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9, msg=name)
    assert_same_values(training_step(rewritten, x), training_step(original, x))
    with torch.inference_mode():
        torch.testing.assert_close(rewritten(x), original(x), rtol=1e-9, atol=1e-9)
    assert_same_values(training_step(rewritten, x), training_step(original, x))


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_gradient_accumulation(name: str) -> None:
    original, rewritten = build(name), restructured_copy(build(name))
    for model in (original, rewritten):
        for seed in (1, 2, 3):
            cotangent_loss(model(input_for(name, seed=seed))).backward()
    gradients = [{f"gradient/{n}": p.grad for n, p in m.named_parameters()} for m in (rewritten, original)]
    assert_same_values(*gradients)


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_backward_twice_and_partial(name: str) -> None:
    """retain_graph, then some outputs alone: nodes may have been handed no gradient, or the same one twice."""
    original, rewritten = build(name), restructured_copy(build(name))
    found: list[dict[str, Tensor]] = []
    for model in (rewritten, original):
        x = input_for(name).requires_grad_()
        outputs = tree_tensors(model(x))
        values = {}
        for i, output in enumerate(outputs):
            values[f"input gradient/{i}"] = torch.autograd.grad(output.square().sum(), x, retain_graph=True)[0]
        loss = cotangent_loss(outputs)
        loss.backward(retain_graph=True)
        loss.backward()
        found.append({**values, **{f"gradient/{n}": p.grad for n, p in model.named_parameters()}})
    assert_same_values(*found)


@pytest.mark.parametrize("name", ["residual", "dense", "unet", "inception", "aggregation", "squeeze_excite", "inverted"])
def test_channels_last(name: str) -> None:
    x = input_for(name).to(memory_format=torch.channels_last)
    assert_same_training(build(name), x)
    model = build(name).to(memory_format=torch.channels_last)
    rewritten = assert_same_training(model, x)
    for parameter in rewritten.parameters():
        assert parameter.grad is None or parameter.grad.stride() == parameter.stride()
    mixed = [x, x.contiguous(), x[:2], x.contiguous()[:3, :, :8]]
    original = bnrestructure.unrestructure(copy.deepcopy(rewritten))
    for sample in mixed:
        assert_same_values(training_step(rewritten, sample), training_step(original, sample))


@pytest.mark.parametrize("name", SMALL_MODELS)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_outputs_have_eagers_strides(name: str, last: bool) -> None:
    """A caller's ``.view()`` must go on working."""
    x = input_for(name)
    if last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    model = build(name)
    for expected, actual in zip(tree_tensors(model(x)), tree_tensors(restructured_copy(model)(x)), strict=True):
        assert actual.stride() == expected.stride()


def test_view_in_an_opaque_module_and_in_a_hook() -> None:
    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if bool((x.detach() > 1e9).any()):
                raise RuntimeError("unreachable")
            return x.view(x.shape[0], -1)

    model = nn.Sequential(conv_bn(3, 4), conv_bn(4, 4), Views()).double()
    model[0][0].register_forward_hook(lambda m, args, out: out.view(-1).view(out.shape))
    assert_same_training(model, input_for("chain"))


def test_dropout_is_drawn_in_every_step() -> None:
    class Drops(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x), 0.5, self.training)

    model = bnrestructure.restructure(Drops().double(), backend="reference")
    x = input_for("chain")
    assert not torch.equal(model(x), model(x))


def test_dropout_draws_eagers_mask_from_the_same_seed() -> None:
    """Random numbers are drawn in memory order: the layout that dropout meets must be eager's."""

    class DropsFeatures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = build("dense")
            self.after = nn.Sequential(nn.Conv2d(6, 4, 1), nn.Dropout(0.5))

        def forward(self, x: Tensor) -> Tensor:
            return self.after(F.dropout(self.dense(x), 0.3, self.training))

    assert_same_training(DropsFeatures().double(), input_for("dense"))


def test_saved_tensors_on_another_device() -> None:
    """Offloading hooks copy what is saved at the time it is saved: shared buffers must hold it by then."""
    original, rewritten = build("dense"), restructured_copy(build("dense"))
    x = input_for("dense")
    expected = training_step(original, x)
    with torch.autograd.graph.save_on_cpu():
        actual = training_step(rewritten, x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        again = training_step(restructured_copy(build("dense")), x)
    assert_same_values(actual, expected)
    assert_same_values(again, expected)


def replica_of(model: nn.Module) -> nn.Module:
    """What nn.DataParallel makes of a model for one device: modules whose tensors are plain attributes (torch/nn/parallel/replicate.py)."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in copies.items():
        for name, child in module._modules.items():
            setattr(replica, name, None if child is None else copies[child])
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter * 1)
        for name, buffer in module._buffers.items():
            setattr(replica, name, buffer)
    return copies[model]


@pytest.mark.parametrize("model_first", [True, False])
def test_replicas_of_data_parallel_run_the_models_own_forward(model_first: bool) -> None:
    model, x = build("residual"), input_for("residual")
    rewritten = restructured_copy(model)
    if model_first:
        assert_same_values(training_step(rewritten, x), training_step(model, x))
        for m in (model, rewritten):
            m.zero_grad()
    expected, found = model(x), replica_of(rewritten)(x)
    for a, b in zip(tree_tensors(found), tree_tensors(expected), strict=True):
        assert torch.equal(a, b)
    cotangent_loss(expected).backward()
    cotangent_loss(found).backward()
    for (name, p), q in zip(model.named_parameters(), rewritten.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    assert any("DataParallel" in note for note in bnrestructure.explain(rewritten).notes)
    assert_same_values(training_step(rewritten, x), training_step(model, x))
