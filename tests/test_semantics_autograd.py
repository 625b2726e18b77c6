"""Autograd around the fused nodes: second derivatives, saved memory, hooks on tensors, torch.compile, torch.export, autocast."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable

import pytest
import torch
import torchvision
from equivalence import assert_same_training, assert_same_values, cotangent_loss, restructured_copy, training_step
from small_models import SMALL_MODELS, build, input_for
from torch import Tensor, nn
from torch.nn import functional as F

import bnrestructure
from bnrestructure.core.aliases import alias


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_second_derivative_is_a_clear_error(name: str) -> None:
    model, x = restructured_copy(build(name)), input_for(name).requires_grad_()
    (gradient,) = torch.autograd.grad(cotangent_loss(model(x)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="unrestructure") as caught:
        gradient.square().sum().backward()
    assert "\n" not in str(caught.value)


def test_first_derivative_under_create_graph_is_right() -> None:
    model, x = build("residual"), input_for("residual").requires_grad_()
    gradients = []
    for m in (model, restructured_copy(model)):
        gradients.append(torch.autograd.grad(cotangent_loss(m(x)), [x, *m.parameters()], create_graph=True))
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


class UnreadConcat(nn.Module):
    """A concat that nobody reads, which alone reads a branch of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)
        self.lonely = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.bn1(x).relu()
        torch.cat([self.lonely(x), self.conv1(z)], 1)
        return self.conv2(self.bn2(x).relu()) + self.conv1(z)


def test_parameters_that_nothing_depends_on_have_no_gradient() -> None:
    model = UnreadConcat().double()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert_same_values(training_step(restructured_copy(model), x), training_step(model, x))
    assert model.lonely.weight.grad is None


def test_gradient_penalty_after_unrestructure() -> None:
    model, x = bnrestructure.unrestructure(restructured_copy(build("chain"))), input_for("chain").requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    gradient.square().sum().backward()


def test_forward_mode_is_left_to_the_model() -> None:
    model, x = build("chain"), input_for("chain")
    results = []
    for m in (model, restructured_copy(model)):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            results.append(torch.autograd.forward_ad.unpack_dual(m(dual)).tangent)
    torch.testing.assert_close(results[1], results[0])


def test_gradcheck() -> None:
    """Against finite differences, not only against eager."""
    model = restructured_copy(build("preact"))
    x = input_for("preact", batch=2, size=4).requires_grad_()
    with torch.no_grad():
        for bn in model.bn:
            bn.bias.add_(0.3)
    assert torch.autograd.gradcheck(lambda t: model(t).tanh(), (x,), atol=1e-4, rtol=1e-3, fast_mode=True)


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes saved for backward, each storage counted once, the model's own parameters and buffers and the input not at all."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    sizes: dict[int, int] = {}
    kept = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(x)
    total = sum(sizes.values())
    output.sum().backward()
    return total


@pytest.mark.parametrize(("name", "limit"), [pytest.param("densenet121", 0.35, marks=pytest.mark.whole), ("resnet50", 0.80)])
def test_saved_for_backward(name: str, limit: float) -> None:
    torch.manual_seed(0)
    model, x = torchvision.models.get_model(name, weights=None).train(), torch.randn(2, 3, 160, 160)
    eager = saved_bytes(model, x)
    ours = saved_bytes(restructured_copy(model), x)
    assert ours <= limit * eager, f"{ours / eager:.3f}"


def test_retained_gradients_and_tensor_hooks_on_the_output() -> None:
    model, x = build("dense"), input_for("dense")
    found = []
    for m in (model, restructured_copy(model)):
        z = x.clone().requires_grad_()
        out = m(z * 2)
        out.retain_grad()
        out.register_hook(lambda g: g * 3)
        cotangent_loss(out).backward()
        found.append((out.grad, z.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-9)


def test_anomaly_mode() -> None:
    model, x = build("residual"), input_for("residual")
    with torch.autograd.detect_anomaly(check_nan=True):
        actual = training_step(restructured_copy(model), x)
    assert_same_values(actual, training_step(model, x))


@pytest.mark.parametrize("name", ["residual", "dense"])
def test_torch_compile_of_a_restructured_model(name: str) -> None:
    model, x = build(name), input_for(name)
    compiled = torch.compile(restructured_copy(model), backend="aot_eager")
    expected, out = model(x), compiled(x)
    torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-9)
    cotangent_loss(out).backward()
    cotangent_loss(expected).backward()
    gradients = {f"gradient/{n}": p.grad for n, p in model.named_parameters()}
    assert_same_values({f"gradient/{n}": p.grad for n, p in compiled._orig_mod.named_parameters()}, gradients)
    compiled(input_for(name, batch=3))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["chain", "dense", "squeeze_excite"])
def test_torch_export_and_jit_trace_of_the_eval_model(name: str) -> None:
    model = restructured_copy(build(name)).eval()
    x = input_for(name)
    expected = model(x)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected)
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), expected)


def test_jit_trace_of_the_training_model() -> None:
    model, x = build("chain"), input_for("chain")
    traced = torch.jit.trace(restructured_copy(model), x, check_trace=False)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-8, atol=1e-9)


def _median_distance(model: nn.Module, x: Tensor, truth: dict[str, Tensor], dtype: torch.dtype | None) -> float:
    """Median over all tensors of a step's relative distance to the float64 truth, under autocast to ``dtype`` (None: without)."""
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        step = training_step(model, x)
    found = [float((step[k].double() - t.double()).norm() / t.double().norm().clamp_min(1e-9)) for k, t in truth.items()]
    return sorted(found)[len(found) // 2]


def _distances(name: str, dtype: torch.dtype | None, prepare: Callable[[nn.Module], nn.Module] = lambda m: m) -> tuple[float, float]:
    """(eager's, ours), summed over several seeds: one ReLU on the other side of zero moves a small model's median."""
    eager = ours = 0.0
    for seed in range(4):
        model = prepare(build(name, torch.float32, seed))
        x = input_for(name, next(p.dtype for p in model.parameters()), batch=8, seed=seed + 10)
        truth = training_step(copy.deepcopy(model).double(), x.double())
        eager += _median_distance(copy.deepcopy(model), x, truth, dtype)
        ours += _median_distance(restructured_copy(model), x, truth, dtype)
    return eager, ours


_SAMPLED = {"chain", "residual", "dense", "inverted"}  # in make test; the others, whose fp16 PyTorch computes slowly on CPUs, in make zoo


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        name if name in _SAMPLED else pytest.param(name, marks=pytest.mark.whole)
        for name in ("chain", "residual", "dense", "inception", "aggregation", "inverted", "squeeze_excite", "unet", "preact", "video")
    ],
)
def test_autocast_is_no_farther_from_the_truth(name: str, dtype: torch.dtype) -> None:
    eager, ours = _distances(name, dtype)
    assert ours <= 1.5 * eager


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SMALL_MODELS)
def test_autocast_dtypes_and_strides_of_outputs(name: str, dtype: torch.dtype) -> None:
    model, x = build(name, torch.float32), input_for(name, torch.float32)
    with torch.autocast("cpu", dtype):
        expected, actual = model(x), restructured_copy(model)(x)
    for e, a in zip(*(o if isinstance(o, tuple) else (o,) for o in (expected, actual)), strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)


def test_gradient_scaler_with_fp16() -> None:
    model, x = build("residual", torch.float32), input_for("residual", torch.float32, batch=8)
    losses = []
    for m in (model, restructured_copy(model)):
        optimiser = torch.optim.SGD(m.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for _ in range(4):
            with torch.autocast("cpu", torch.float16):
                loss = m(x).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
            optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def _bf16_with_fp32_norms(model: nn.Module) -> nn.Module:
    model.bfloat16()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.float()
    return model


@pytest.mark.parametrize("name", ["residual", "dense", "inverted"])
def test_bf16_model_with_fp32_batch_norms(name: str) -> None:
    """The other mixed form: activations and convolutions in bf16, batch norm parameters and statistics in fp32."""
    eager, ours = _distances(name, None, _bf16_with_fp32_norms)
    assert ours <= 1.5 * eager
    model, x = _bf16_with_fp32_norms(build(name, torch.float32)), input_for(name, torch.bfloat16)
    expected, actual = training_step(copy.deepcopy(model), x), training_step(restructured_copy(model), x)
    assert {k: t.dtype for k, t in actual.items()} == {k: t.dtype for k, t in expected.items()}


class _ReadsAConstant(nn.Module):
    """Readers with parameters share an input that needs no gradient: batch norms, a join, pools."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        constant = self.first(x).detach()
        sharp = self.second(torch.relu(self.bn1(constant)))
        pooled = F.max_pool2d(torch.relu(self.bn2(constant)), 2)
        joined = torch.relu(self.bn3(constant) + constant)
        return constant, sharp, pooled, self.second(joined), joined


def test_what_needs_no_gradient_in_eager_needs_none() -> None:
    model = _ReadsAConstant().double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    rewritten = assert_same_training(model, x)
    outputs = rewritten(x)
    assert [t.requires_grad for t in outputs] == [False, True, True, True, False]
    outputs[0].numpy()  # an error for a tensor that needs a gradient
    assert bnrestructure.explain(rewritten).sites[0].ran


def test_verify_notices_an_output_that_needs_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _ReadsAConstant(), torch.randn(2, 3, 8, 8)
    assert bnrestructure.verify(copy.deepcopy(model), (x,), backend="reference").ok
    conv = importlib.import_module("bnrestructure.ops.conv")
    for module in (conv, *(importlib.import_module(f"bnrestructure.ops.{name}") for name in ("sweeps", "statistics"))):
        monkeypatch.setattr(module, "passed_on", lambda ctx, x: alias(x))
    report = bnrestructure.verify(model, (x,), backend="reference")
    assert not report.ok
    assert "output" in str(report)
