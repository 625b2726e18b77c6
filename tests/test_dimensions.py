"""Models of 1-D and 3-D data with ``backend="auto"``: float32 and bfloat16 autocast, on the folded CPU kernels, as the plan says."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from equivalence import assert_same_training, restructured_copy, training_step
from needs import needs_kernels
from small_models import Signal, Video
from torch import Tensor, nn
from torch.nn import functional as F

import bnrestructure
from bnrestructure.core.memory_format import to_channels_last
from bnrestructure.kernels import registry
from bnrestructure.kernels.calls import Call, FinalizeBackward, FinalizeForward
from bnrestructure.kernels.reference import ReferenceKernels


def conv_bn(inputs: int, outputs: int, kernel: Any, stride: Any = 1) -> nn.Sequential:
    kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
    conv = nn.Conv3d(inputs, outputs, kernel, stride, tuple(k // 2 for k in kernel), bias=False)
    return nn.Sequential(conv, nn.BatchNorm3d(outputs), nn.ReLU(inplace=True))


class UNet3d(nn.Module):
    """Down by a pool, up by a transposed convolution, with a concat skip."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(conv_bn(1, 4, 3), conv_bn(4, 6, 3))
        self.bottom = nn.Sequential(conv_bn(6, 8, 3), conv_bn(8, 8, 1))
        self.up, self.merge, self.out = nn.ConvTranspose3d(8, 6, 2, 2), conv_bn(12, 6, 3), nn.Conv3d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down(x)
        return self.out(self.merge(torch.cat([self.up(self.bottom(F.max_pool3d(a, 2))), a], 1)))


class R2Plus1D(nn.Module):
    """Space and time in convolutions of their own; a residual block, and one that halves the frames."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 5, (1, 3, 3), (1, 2, 2)), conv_bn(5, 8, (3, 1, 1)))
        self.first = nn.Sequential(conv_bn(8, 9, (1, 3, 3)), conv_bn(9, 8, (3, 1, 1))[:2])
        self.second = nn.Sequential(conv_bn(8, 9, (1, 3, 3), (1, 2, 2)), conv_bn(9, 12, (3, 1, 1), (2, 1, 1))[:2])
        self.shortcut = conv_bn(8, 12, 1, 2)[:2]
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.first(x) + x)
        x = F.relu(self.second(x) + self.shortcut(x))
        return self.fc(F.adaptive_avg_pool3d(x, 1).flatten(1))


class Waves(nn.Module):
    """1-D: a depthwise convolution, a residual join and growing concats."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv1d(2, 8, 7, 2, 3), nn.BatchNorm1d(8)
        self.depthwise, self.bn1 = nn.Conv1d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm1d(8)
        self.point, self.bn2 = nn.Conv1d(8, 8, 1, bias=False), nn.BatchNorm1d(8)
        self.left, self.right, self.bn3 = nn.Conv1d(8, 4, 3, padding=1), nn.Conv1d(8, 5, 1), nn.BatchNorm1d(9)
        self.out = nn.Conv1d(9, 3, 3, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.bn0(self.stem(x)))
        x = x + self.bn2(self.point(F.relu(self.bn1(self.depthwise(x)))))
        return self.out(F.relu(self.bn3(torch.cat([self.left(x), self.right(x)], 1))))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "unet": (UNet3d, (3, 1, 4, 8, 8)),
    "r2plus1d": (R2Plus1D, (3, 3, 4, 12, 12)),
    "waves": (Waves, (4, 2, 40)),
    "video": (Video, (4, 3, 3, 10, 10)),
    "signal": (Signal, (6, 3, 24)),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    made, shape = MODELS[name]
    return made().train(), torch.randn(shape)


@pytest.fixture
def kernels_run(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the folded kernels ran, and the reference."""
    found: Counter[str] = Counter()
    run, by_reference = registry.run, ReferenceKernels.run

    def plain(self: ReferenceKernels, call: Call[Any]) -> Any:
        found["reference"] += not isinstance(call, FinalizeForward | FinalizeBackward)
        return by_reference(self, call)

    def counted(backend: str, call: Call[Any]) -> Any:
        before = found["reference"]
        result = run(backend, call)
        autocast = torch.is_autocast_enabled("cpu")  # then it has called itself
        found["folded"] += found["reference"] == before and not isinstance(call, FinalizeForward | FinalizeBackward) and not autocast
        return result

    monkeypatch.setattr(ReferenceKernels, "run", plain)
    monkeypatch.setattr(registry, "run", counted)
    return found


@needs_kernels
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_trains_the_same(name: str, channels_last: bool, kernels_run: Counter[str]) -> None:
    model, x = build(name)
    if channels_last:
        model, (x,) = to_channels_last(model, (x,))
    assert_same_training(model, x, tolerance=1e-3, options={"backend": "auto"}, allow_noise=True)
    assert kernels_run["folded"] > 0
    assert kernels_run["reference"] == 0


def _distances(found: dict[str, Tensor], truth: dict[str, Tensor]) -> Tensor:
    wanted = {name: t for name, t in truth.items() if t.is_floating_point() and t.norm() > 1e-6}
    return torch.stack([(found[name].double() - t).norm() / t.norm() for name, t in wanted.items()])


@needs_kernels
@pytest.mark.parametrize("name", MODELS)
def test_autocast_is_no_farther_from_the_truth(name: str, kernels_run: Counter[str]) -> None:
    """The mean over the tensors of their distance to the float64 truth."""
    model, x = build(name)
    truth = training_step(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        eager = training_step(copy.deepcopy(model), x)
        ours = training_step(restructured_copy(model, backend="auto"), x)
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in eager.items()}
    assert kernels_run["folded"] > 0
    assert kernels_run["reference"] == 0
    assert _distances(ours, truth).mean() <= 1.5 * _distances(eager, truth).mean()


def test_the_plan_names_what_runs() -> None:
    model, x = build("r2plus1d")
    plan = bnrestructure.explain(model, x)
    assert plan.counts == {"fused": 6, "partial": 1, "kept": 0}
    if registry.unavailable_reason("cpu") is None:
        assert {kernel.forward for kernel in plan.kernels} <= {"fused", "hybrid", "winograd"}
    model, x = build("unet")
    kernels = {kernel.name: kernel for kernel in bnrestructure.explain(model, x).kernels}
    if registry.unavailable_reason("cpu") is None:
        assert "3-D kernel" in kernels["down.1.0"].forward_reason
        assert "3-D kernel" not in kernels["bottom.1.0"].forward_reason
        assert "3-D kernel" in str(bnrestructure.explain(model, x).kernels[0].backward_reason)


def test_a_batch_norm_behind_a_linear_layer_is_kept_whole() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))
    plan = bnrestructure.explain(model)
    assert plan.counts["kept"] == 1
    assert "neighbour to ride on" in str(plan.sites[0].reason)
    assert_same_training(model.train(), torch.randn(6, 5), tolerance=1e-3, options={"backend": "auto"}, allow_noise=True)


class _LinearResidual(nn.Module):
    """[N, C] activations whose batch norms ride on a join."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn1, self.fc2, self.bn2 = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x + self.bn1(self.fc1(x)))
        return F.relu(x + self.bn2(self.fc2(x)))


def test_two_dimensional_activations_train_the_same() -> None:
    torch.manual_seed(0)
    assert_same_training(_LinearResidual().train(), torch.randn(9, 6), tolerance=1e-3, options={"backend": "auto"}, allow_noise=True)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d(1), nn.MaxPool2d(2), nn.AvgPool2d(2)], ids=lambda p: type(p).__name__)
def test_a_2d_pool_of_1d_data_pools_over_channels_as_eager_does(pool: nn.Module, backend: str) -> None:
    """PyTorch takes [N, C, L] for one image of N channels: no pool of [N, C, H, W] that could normalise what it reads."""
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), pool).train()
    assert_same_training(model, torch.randn(4, 3, 10), tolerance=1e-3, options={"backend": backend}, allow_noise=True)


@needs_kernels
def test_what_the_kernels_refuse_the_reference_runs(kernels_run: Counter[str]) -> None:
    model, x = build("unet")
    assert_same_training(model.double(), x.double(), options={"backend": "auto"})
    assert kernels_run["folded"] == 0
    assert kernels_run["reference"] > 0


@needs_kernels
def test_users_may_write_to_outputs() -> None:
    """What a node returns is no view: autograd would refuse."""
    model = nn.Sequential(nn.BatchNorm3d(3), nn.ReLU(), nn.Conv3d(3, 4, (1, 3, 3), padding=(0, 1, 1))).train()
    restructured = restructured_copy(model, backend="auto")
    y = restructured(torch.randn(2, 3, 4, 5, 5))
    y.mul_(2.0)
    y.sum().backward()


class ImageAndSignal(nn.Module):
    """An image and a sound, each through convolutions of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
        self.signal = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 2, 1))

    def forward(self, image: Tensor, signal: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(image), self.signal(signal)


class ImageAndVideo(nn.Module):
    """An image and a video, each through convolutions of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
        self.video = nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 2, 1))

    def forward(self, image: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(image), self.video(video)


@pytest.mark.parametrize("video_last", [False, True])
@pytest.mark.parametrize("image_last", [False, True])
def test_images_and_videos_keep_their_own_formats(image_last: bool, video_last: bool) -> None:
    model = ImageAndVideo()
    rewritten = bnrestructure.restructure(copy.deepcopy(model))
    image = torch.randn(2, 3, 6, 7).to(memory_format=torch.channels_last if image_last else torch.contiguous_format)
    video = torch.randn(2, 3, 5, 6, 7).to(memory_format=torch.channels_last_3d if video_last else torch.contiguous_format)
    for ours, eager in zip(rewritten(image, video), model(image, video), strict=True):
        # With a single thread PyTorch takes another convolution for a video so small, which answers in contiguous tensors.
        assert ours.stride() == eager.stride() or (video_last and ours.dim() == 5)
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (3, 3)], ids=str)
def test_autocast_does_not_round_what_is_normalised(kernel: tuple[int, ...]) -> None:
    """A batch norm that reads images in float32, far from zero: in bfloat16 they would be all alike."""
    dimensions = len(kernel)
    conv, norm = (nn.Conv3d, nn.BatchNorm3d) if dimensions == 3 else (nn.Conv2d, nn.BatchNorm2d)
    model = nn.Sequential(norm(3), nn.ReLU(), conv(3, 4, kernel), norm(4), nn.ReLU(), conv(4, 2, 1))
    rewritten = bnrestructure.restructure(copy.deepcopy(model))
    x = torch.randn(2, 3, *(7, 8, 9)[-dimensions:]) + 100
    truth = copy.deepcopy(model).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours, eager = rewritten(x), model(x)
    assert (ours - truth).abs().max() <= 2 * (eager - truth).abs().max()


@pytest.mark.parametrize("layers", [(nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d), (nn.Conv1d, nn.BatchNorm1d)], ids=str)
def test_an_empty_batch_trains(layers: tuple[Any, Any]) -> None:
    conv, norm = layers
    model = nn.Sequential(conv(3, 4, 1), norm(4), nn.ReLU(), conv(4, 2, 1), norm(2))
    rewritten = bnrestructure.restructure(copy.deepcopy(model))
    x = torch.randn(0, 3, *(5, 6, 7)[: len(model[0].stride)])
    for own in (model, rewritten):
        own(x).sum().backward()
    for (name, p), q in zip(model.named_parameters(), rewritten.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    for (name, p), q in zip(model.named_buffers(), rewritten.buffers(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_signals_beside_channels_last_images_are_laid_out_as_eager_does(memory_format: torch.memory_format, backend: str) -> None:
    model = ImageAndSignal().to(memory_format=memory_format)
    rewritten = bnrestructure.restructure(copy.deepcopy(model), backend=backend)
    inputs = torch.randn(2, 3, 6, 7).to(memory_format=memory_format), torch.randn(2, 3, 9)
    for ours, eager in zip(rewritten(*inputs), model(*inputs), strict=True):
        assert ours.stride() == eager.stride()
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
