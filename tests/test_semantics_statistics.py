"""Adversarial statistics, single values, NaN and inf: no worse than eager against float64, and the same errors."""

from __future__ import annotations

import copy

import pytest
import torch
from equivalence import assert_same_values, relative_errors, restructured_copy, training_step
from small_models import Residual, build, conv_bn, input_for
from torch import Tensor, nn

#: How much farther from the float64 truth than eager the restructured model may be, and what counts as rounding in units of eps.
FACTOR, ROUNDING = 2.0, 8.0

both_backends = pytest.mark.parametrize("backend", ["reference", "auto"])


class ReadsShifted(nn.Module):
    """bn-relu-conv1x1 on the raw input: the batch norm's own input has the statistics under test. Then a whole conv-bn-relu-conv."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 16, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(16), nn.Conv2d(16, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x))))))


class ShiftedByBias(nn.Module):
    """conv-bn-relu-conv whose convolution adds a large bias: statistics in the epilogue, normalisation in the prologue."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2 = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)
        with torch.no_grad():
            self.conv1.bias.fill_(shift)
            self.conv1.weight.mul_(1 / self.conv1.weight.std() / 72**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(torch.relu(self.bn1(self.conv1(x))))


def _distance(actual: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    a, t = _doubles(actual), _doubles(truth)
    return {name: float((a[name] - t[name]).norm() / t[name].norm().clamp_min(1e-30)) for name in t}


def _doubles(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in values.items()}


def _median(distances: dict[str, float]) -> float:
    return sorted(distances.values())[len(distances) // 2]


def assert_no_worse_than_eager(model: nn.Module, x: Tensor, backend: str) -> None:
    """Every tensor whose true value is not zero; errors below a tenth of eager's worst are let be, for they scatter."""
    truth = training_step(copy.deepcopy(model).double(), x.double())
    eager = _distance(training_step(copy.deepcopy(model), x), truth)
    ours = _distance(training_step(restructured_copy(model, backend=backend), x), truth)
    zero = {name for name in truth if float(truth[name].double().norm()) < 1e-6 * max(float(t.double().norm()) for t in truth.values())}
    floor = max(eager[name] for name in truth if name not in zero)
    wrong = {
        name: (ours[name], eager[name])
        for name in truth
        if name not in zero and not ours[name] <= FACTOR * max(eager[name], 0.1 * floor, ROUNDING * torch.finfo(x.dtype).eps)
    }
    assert not wrong, wrong


@both_backends
@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e2, 1e3, 1e4])
def test_mean_far_from_zero_fp32(ratio: float, backend: str) -> None:
    x = torch.randn(8, 8, 12, 12) + ratio
    assert_no_worse_than_eager(ReadsShifted(), x, backend)
    assert_no_worse_than_eager(ShiftedByBias(ratio), torch.randn(8, 8, 12, 12), backend)


@both_backends
@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e2, 1e3])
def test_mean_far_from_zero_bf16(ratio: float, backend: str) -> None:
    """Under autocast: activations are bf16, so their own rounding at this mean is part of the truth that both share."""
    torch.manual_seed(1)

    def autocast(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return training_step(model, x)

    x = (torch.randn(8, 8, 12, 12) + ratio).bfloat16().float()
    for model in (ReadsShifted(), ShiftedByBias(ratio)):
        truth = training_step(copy.deepcopy(model).double(), x.double())
        eager = _distance(autocast(copy.deepcopy(model), x), truth)
        ours = _distance(autocast(restructured_copy(model, backend=backend), x), truth)
        assert _median(ours) <= FACTOR * max(_median(eager), 2**-8), (ours, eager)


@both_backends
def test_different_means_and_deviations_in_each_channel(backend: str) -> None:
    x = torch.randn(8, 8, 12, 12)
    scale = torch.logspace(-3, 3, 8).view(1, 8, 1, 1)
    assert_no_worse_than_eager(ReadsShifted(), x * scale + 30 * scale.flip(1), backend)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e4])
def test_constant_channels(value: float) -> None:
    """Variance zero: the deviation is exactly eps's, and no NaN appears."""
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64)
    x[:, 2:5] = value
    model = ReadsShifted().double()
    nn.init.normal_(model.bn1.bias)
    actual, expected = training_step(restructured_copy(model), x), training_step(copy.deepcopy(model), x)
    assert all(bool(t.isfinite().all()) for t in actual.values())
    assert_same_values(actual, expected, tolerance=1e-7)


@both_backends
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e4])
def test_constant_channels_fp32(value: float, backend: str) -> None:
    x = torch.randn(4, 8, 6, 6)
    x[:, 2:5] = value
    model = ReadsShifted()
    nn.init.normal_(model.bn1.bias)
    actual = training_step(restructured_copy(model, backend=backend), x)
    assert all(bool(t.isfinite().all()) for t in actual.values())
    assert_no_worse_than_eager(model, x, backend)


def _with_gamma(model: nn.Module, weight: str) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            values = {"zero": 0.0, "negative": -1.0}.get(weight)
            if values is None:
                module.weight.data[::2] = 0.0
            else:
                module.weight.data.fill_(values)
    return model


GAMMAS = pytest.mark.parametrize("weight", ["zero", "negative", "mixed"])
GAMMA_MODELS = pytest.mark.parametrize("name", ["residual", "dense", "inverted", "squeeze_excite", "preact"])


@GAMMAS
@GAMMA_MODELS
def test_gamma_zero_and_negative(name: str, weight: str) -> None:
    model, x = _with_gamma(build(name), weight), input_for(name)
    assert_same_values(training_step(restructured_copy(model), x), training_step(copy.deepcopy(model), x))


@both_backends
@GAMMAS
@GAMMA_MODELS
def test_gamma_zero_and_negative_fp32(name: str, weight: str, backend: str) -> None:
    """By the median, and each tensor within a share of its kind's largest: single gradients that nearly cancel scatter.

    Eager in channels_last, as the fused nodes compute: its own batch norm, which a site left whole uses, rounds more there.
    """
    model, x = _with_gamma(build(name, torch.float32), weight), input_for(name, torch.float32, batch=8)
    truth = training_step(copy.deepcopy(model).double(), x.double())
    eager = training_step(copy.deepcopy(model), x.to(memory_format=torch.channels_last))
    actual = training_step(restructured_copy(model, backend=backend), x)
    found = [_median(_distance(step, truth)) for step in (actual, eager)]
    assert found[0] <= FACTOR * max(found[1], ROUNDING * torch.finfo(x.dtype).eps)
    allowed = {k: max(1e-3, FACTOR * e) for k, e in relative_errors(_doubles(eager), _doubles(truth)).items()}
    assert_same_values(_doubles(actual), _doubles(truth), allowed)


def test_single_spatial_position() -> None:
    model = nn.Sequential(conv_bn(3, 4, 1), conv_bn(4, 5, 1), nn.Conv2d(5, 2, 1)).double()
    x = torch.randn(6, 3, 1, 1, dtype=torch.float64)
    assert_same_values(training_step(restructured_copy(model), x), training_step(copy.deepcopy(model), x))


@both_backends
@pytest.mark.parametrize("batch", [2, 6, 64])
def test_single_spatial_position_fp32(batch: int, backend: str) -> None:
    model = nn.Sequential(conv_bn(3, 8, 1), conv_bn(8, 16, 1), nn.Conv2d(16, 2, 1))
    assert_no_worse_than_eager(model, torch.randn(batch, 3, 1, 1), backend)


def test_two_values_per_channel() -> None:
    model = nn.Sequential(conv_bn(3, 4, 1), nn.Conv2d(4, 2, 1)).double()
    x = torch.randn(2, 3, 1, 1, dtype=torch.float64)
    assert_same_values(training_step(restructured_copy(model), x), training_step(copy.deepcopy(model), x))


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (1, 3, 2, 2)])
def test_one_value_per_channel_is_pytorchs_own_error(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(conv_bn(3, 4, 1), nn.MaxPool2d(shape[-1]), conv_bn(4, 5, 1))
    messages, counts = [], []
    rewritten = restructured_copy(model)
    for m in (copy.deepcopy(model), restructured_copy(model)):
        with pytest.raises(ValueError, match="more than 1 value per channel") as caught:
            m(torch.randn(shape))
        messages.append(str(caught.value))
        counts.append([int(count) for name, count in m.named_buffers() if name.endswith("num_batches_tracked")])
    assert messages[0] == messages[1]
    assert counts[0] == counts[1]
    with pytest.raises(ValueError, match="more than 1 value"):
        rewritten(torch.randn(shape))
    x = torch.randn(4, 3, 4, 4)
    torch.testing.assert_close(rewritten(x), copy.deepcopy(model)(x), rtol=1e-4, atol=1e-5)


def test_one_value_per_channel_in_eval_is_fine() -> None:
    model = nn.Sequential(conv_bn(3, 4, 1)).eval()
    assert torch.equal(restructured_copy(model)(torch.ones(1, 3, 1, 1)), model(torch.ones(1, 3, 1, 1)))


def test_empty_batch_as_eager() -> None:
    model, x = Residual(), torch.randn(0, 3, 12, 12)
    try:
        expected = copy.deepcopy(model)(x)
    except Exception as error:
        with pytest.raises(type(error)):
            restructured_copy(model)(x)
    else:
        assert restructured_copy(model)(x).shape == expected.shape


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["chain", "residual", "dense", "inception", "aggregation", "inverted", "unet", "preact", "strange"])
def test_nan_and_inf_where_eager_has_them(name: str, value: float) -> None:
    model, x = build(name), input_for(name)
    x[1, 0, 2, 3] = value
    expected, actual = training_step(copy.deepcopy(model), x), training_step(restructured_copy(model), x)
    for key, tensor in expected.items():
        assert torch.equal(actual[key].isnan(), tensor.isnan()), key
        finite = tensor.isfinite()
        torch.testing.assert_close(actual[key][finite], tensor[finite], rtol=1e-8, atol=1e-8, msg=key)
