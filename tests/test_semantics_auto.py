"""What users get: float32 with ``backend="auto"``, that is the C++ kernels where they apply. The other test_semantics files run in float64.

Two float32 runs differ by rounding, which a ReLU at zero can blow up, so where tensors differ by more than ``TOLERANCE`` they may differ by
as much as eager itself does when its parameters and inputs are off by one rounding (``rounding_noise``).
"""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from equivalence import assert_same_training, assert_same_values, cotangent_loss, restructured_copy, training_step
from small_models import SMALL_MODELS, build, conv_bn, input_for
from test_semantics_changes import CHANGES, Configurable
from test_semantics_inplace import MODELS as INPLACE
from test_semantics_inplace import _CopyOfInput
from test_semantics_modes import SharedModules, SharedWithEager, _replace_batch_norms
from test_semantics_tracing import TRAPS, _numpy_seeded  # noqa: F401  (a fixture)
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import bnrestructure
from bnrestructure.core.memory_format import to_channels_last

TOLERANCE = 1e-3
FORMATS = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)


def same(model: nn.Module, x: Tensor, **options: Any) -> Any:
    return assert_same_training(model.float(), x, tolerance=TOLERANCE, options={"backend": "auto"}, allow_noise=True, **options)


def small(name: str) -> tuple[nn.Module, Tensor]:
    return build(name, torch.float32), input_for(name, torch.float32, batch=6)


@FORMATS
@pytest.mark.parametrize("name", SMALL_MODELS)
def test_trains_the_same(name: str, memory_format: torch.memory_format) -> None:
    model, x = small(name)
    if memory_format == torch.channels_last:
        model, (x,) = to_channels_last(model, (x,))
    same(model, x, steps=3)


@FORMATS
@pytest.mark.parametrize("model", INPLACE, ids=lambda m: m.__name__)
def test_inplace(model: type[nn.Module], memory_format: torch.memory_format) -> None:
    if model.__name__ == "InplaceOnFlatView" and memory_format == torch.channels_last:
        pytest.skip("eager cannot view a channels_last tensor")
    same(_CopyOfInput(model()), torch.randn(4, 3, 8, 8).to(memory_format=memory_format))


@pytest.mark.parametrize("trap", TRAPS, ids=lambda m: m.__name__)
def test_trap(trap: type[nn.Module]) -> None:
    same(trap().train(), torch.randn(4, 3, 8, 8))


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__.strip("_"))
def test_change_between_steps_is_noticed(change: Callable[[Any], None]) -> None:
    def between(model: nn.Module, step: int) -> None:
        if step == 0:
            change(model)
            model.float()

    same(Configurable().train(), torch.randn(4, 3, 8, 8), steps=3, between=between)


def _frozen(model: nn.Module) -> None:
    model.get_submodule("layer1.bn1").eval()


def _tied(model: nn.Module) -> None:
    model.layer1.conv2.weight, model.layer3.bn2.weight = model.layer1.conv1.weight, model.layer3.bn1.weight


def _partly_without_gradient(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layer2" not in name and "stem" not in name)


def _hooked(model: nn.Module) -> None:
    model.layer1.bn1.register_forward_hook(lambda m, args, out: out * 1.5)
    model.layer2.conv2.register_full_backward_hook(lambda m, gi, go: (gi[0] * 0.5,))
    model.register_forward_hook(lambda m, args, out: out + 1)


def _parametrized(model: nn.Module) -> None:
    parametrizations.weight_norm(model.layer1.conv2)
    parametrizations.spectral_norm(model.layer2.conv1)


@pytest.mark.parametrize(
    "prepare", [_frozen, _tied, _partly_without_gradient, _hooked, _parametrized], ids=lambda p: p.__name__.strip("_")
)
def test_prepared(prepare: Callable[[nn.Module], None]) -> None:
    model, x = small("residual")
    prepare(model)
    same(model, x)


@pytest.mark.parametrize("options", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("name", ["residual", "dense", "squeeze_excite"])
def test_options_of_batch_norm(name: str, options: dict[str, Any]) -> None:
    same(_replace_batch_norms(build(name), **options), small(name)[1])


@pytest.mark.parametrize("model", [SharedModules, SharedWithEager])
def test_shared_modules(model: type[nn.Module]) -> None:
    same(model(), torch.randn(3, 3, 8, 8))


@pytest.mark.parametrize("name", ["residual", "dense", "inverted"])
def test_changing_sizes_modes_and_gradients(name: str) -> None:
    """Batch and image size, layout, train and eval, with and without gradients: one model through all of them."""
    original, x = small(name)
    rewritten = restructured_copy(original, backend="auto")
    calls = [x, x[:2], input_for(name, torch.float32, batch=3, size=20), x.to(memory_format=torch.channels_last), x]
    for i, sample in enumerate(calls):
        for model in (original, rewritten):
            model.train(i != 2)
        assert_same_values(training_step(rewritten, sample), training_step(original, sample), TOLERANCE)
        with torch.no_grad():
            torch.testing.assert_close(rewritten(sample), original(sample), rtol=1e-4, atol=1e-4)
    for key, value in original.state_dict().items():
        torch.testing.assert_close(rewritten.state_dict()[key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_gradient_accumulation() -> None:
    original, x = small("dense")
    rewritten = restructured_copy(original, backend="auto")
    for model in (original, rewritten):
        for part in x.split(2):
            cotangent_loss(model(part)).backward()
    gradients = [{f"gradient/{n}": p.grad for n, p in m.named_parameters()} for m in (rewritten, original)]
    assert_same_values(*gradients, TOLERANCE)


def _saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved], ids=["deepcopy", "pickle", "torch.save"]
)
def test_copies_go_on_training(copied: Callable[[nn.Module], nn.Module]) -> None:
    original, x = small("dense")
    model = restructured_copy(original, backend="auto")
    for m in (original, model):
        training_step(m, x)
    twin = copied(model)
    assert isinstance(twin, type(original))
    assert type(twin) is type(model)
    assert_same_values(training_step(twin, x), training_step(original, x), TOLERANCE)


def test_checkpoints_optimisers_and_averages() -> None:
    """state_dict both ways, an optimiser made before and one made after, an exponential moving average."""
    original, x = small("residual")
    rewritten = build("residual", torch.float32, seed=3)
    optimisers = [torch.optim.Adam(m.parameters(), lr=1e-3, eps=1e-3) for m in (original, rewritten)]
    bnrestructure.restructure(rewritten)
    rewritten.load_state_dict(original.state_dict(), strict=True)
    averages = [AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True) for m in (original, rewritten)]
    for step in range(4):
        if step == 2:
            optimisers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (original, rewritten)]
        for model, optimiser, average in zip((original, rewritten), optimisers, averages, strict=True):
            optimiser.zero_grad()
            model(x).square().mean().backward()
            optimiser.step()
            average.update_parameters(model)
    original.load_state_dict(rewritten.state_dict(), strict=True)
    for pair in ((rewritten, original), averages):
        states = [{f"state/{k}": v for k, v in m.state_dict().items()} for m in pair]
        assert_same_values(*states, TOLERANCE)
    assert torch.equal(rewritten.eval()(x), original.eval()(x))


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_second_derivative_is_a_clear_error(name: str) -> None:
    model, x = small(name)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(cotangent_loss(restructured_copy(model, backend="auto")(x)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="unrestructure"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["chain", "residual", "dense", "inception", "aggregation", "squeeze_excite", "unet", "preact", "strange"])
def test_nan_and_inf_where_eager_has_them(name: str, value: float) -> None:
    """Without "inverted": whether eager's own ReLU6 hands a NaN's gradient on depends on where in a vector register it lies."""
    model, x = small(name)
    x[1, 0, 2, 3] = value
    expected, actual = training_step(copy.deepcopy(model), x), training_step(restructured_copy(model, backend="auto"), x)
    for key, tensor in expected.items():
        assert torch.equal(actual[key].isnan(), tensor.isnan()), key


@pytest.mark.parametrize("shape", [(3, 12, 12), (2, 4, 12, 12), (2, 3, 12), (12,), (2, 3, 0, 0)], ids=str)
@pytest.mark.parametrize("name", ["chain", "residual", "dense", "inception"])
def test_wrong_shape_is_an_error_where_eager_has_one(name: str, shape: tuple[int, ...]) -> None:
    model, _ = small(name)
    rewritten = restructured_copy(model, backend="auto")
    before = {k: v.clone() for k, v in rewritten.state_dict().items()}
    with pytest.raises((RuntimeError, ValueError)):
        copy.deepcopy(model)(torch.randn(shape))
    with pytest.raises((RuntimeError, ValueError)) as caught:
        rewritten(torch.randn(shape))
    assert str(caught.value)
    if shape[1:2] == (4,):  # refused by the very first layer: nothing has run yet
        assert all(torch.equal(v, before[k]) for k, v in rewritten.state_dict().items())


def test_one_value_per_channel_is_pytorchs_own_error() -> None:
    model = nn.Sequential(conv_bn(3, 4, 1), nn.MaxPool2d(2), conv_bn(4, 5, 1))
    messages = []
    for m in (model, restructured_copy(model, backend="auto")):
        with pytest.raises(ValueError, match="more than 1 value per channel") as caught:
            m(torch.randn(1, 3, 2, 2))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("name", ["residual", "dense"])
def test_torch_compile_of_a_restructured_model(name: str) -> None:
    model, x = small(name)
    compiled = torch.compile(restructured_copy(model, backend="auto"), backend="aot_eager")
    assert_same_values(
        {k.replace("_orig_mod.", ""): v for k, v in training_step(compiled, x).items()}, training_step(model, x), TOLERANCE
    )
    torch._dynamo.reset()


def test_torch_export_of_the_eval_model() -> None:
    model, x = small("squeeze_excite")
    rewritten = bnrestructure.restructure(model)
    rewritten(x)
    rewritten.eval()
    torch.testing.assert_close(torch.export.export(rewritten, (x,)).module()(x), rewritten(x))


def test_two_models_step_in_two_threads_at_once() -> None:
    """The first step of each captures, while the other thread may be running its model."""
    names = ("dense", "residual")
    models = [bnrestructure.restructure(small(name)[0]) for name in names]
    inputs = [small(name)[1].to(memory_format=torch.channels_last) for name in names]

    def steps(model: nn.Module, x: Tensor, start: threading.Barrier) -> list[Tensor]:
        torch.set_num_threads(2)  # of this Python thread
        start.wait()
        gradients = []
        for _ in range(10):
            model.zero_grad()
            model(x).square().sum().backward()
            gradients += [p.grad for p in model.parameters()]
        return gradients

    alone = [steps(copy.deepcopy(model), x, threading.Barrier(1)) for model, x in zip(models, inputs, strict=True)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(steps, models, inputs, [threading.Barrier(2)] * 2))
    for expected, found in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
