"""The verifier passes what is right and names what is wrong: deliberately broken rewrites must not get by."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnrestructure
from bnrestructure import UsageError, VerificationReport, verify
from bnrestructure.core import edges
from bnrestructure.core.edges import BackwardEdge
from bnrestructure.kernels import reference
from bnrestructure.kernels.calls import Call, ConvBackward, FinalizeBackward, FinalizeForward, StatisticsForward
from bnrestructure.kernels.reference import elementwise
from bnrestructure.ops import conv_options, join
from bnrestructure.verification import distance, verifier

conv_ops = sys.modules["bnrestructure.ops.conv"]  # ``bnrestructure.ops.conv`` names the function


class Net(nn.Module):
    """conv-bn-relu-conv, a growing and a branching concat, a residual join with identity, a pool, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(12)
        self.last = nn.Conv2d(12, 5, 3, bias=False)
        self.drop = nn.Dropout(0.25)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_bn(self.stem(x)))
        y = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(y)))
        x = torch.cat([self.left(x), self.right(x)], 1)
        x = self.last(F.relu(self.bn3(x)))
        return self.head(self.drop(x).mean((2, 3)))


class Joins(nn.Module):
    """Two residual joins in a row: the first is formed by the second branch's convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList([nn.Conv2d(8, 8, k, padding=k // 2, bias=False) for k in (3, 1, 1, 3)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(8) for _ in range(5)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norms[4](self.stem(x)))
        for i in (0, 2):
            branch = F.relu(self.norms[i](self.convs[i](x)))
            x = F.relu(x + self.norms[i + 1](self.convs[i + 1](branch)))
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    """A dense block: every layer, a bottleneck and a 3x3, reads the concat of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm1 = nn.ModuleList(nn.BatchNorm2d(6 + 4 * i) for i in range(3))
        self.conv1 = nn.ModuleList(nn.Conv2d(6 + 4 * i, 8, 1, bias=False) for i in range(3))
        self.norm2 = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.conv2 = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=1, bias=False) for _ in range(3))
        self.norm = nn.BatchNorm2d(18)
        self.head = nn.Conv2d(18, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm1, conv1, norm2, conv2 in zip(self.norm1, self.conv1, self.norm2, self.conv2, strict=True):
            y = conv1(F.relu(norm1(torch.cat(features, 1))))
            features.append(conv2(F.relu(norm2(y))))
        return self.head(F.relu(self.norm(torch.cat(features, 1))))


def built(cls: type[nn.Module]) -> nn.Module:
    """A model whose batch norms have weights, biases and running statistics of their own, so that mix-ups show."""
    torch.manual_seed(1)
    model = cls()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.5)
    return model


def images() -> Tensor:
    return torch.randn(4, 3, 9, 7, generator=torch.Generator().manual_seed(2))


def check(model: nn.Module, inputs: Any = None, **options: Any) -> VerificationReport:
    return verify(model, images() if inputs is None else inputs, **{"backend": "reference", **options})


@pytest.mark.parametrize("cls", [Net, Dense])
def test_a_correct_rewrite_passes(cls: type[nn.Module]) -> None:
    report = check(built(cls))
    assert report.ok, report
    assert report.failures == []
    assert report.sites == (
        {"fused": 3, "partial": 1, "kept": 0} if cls is Net else {"fused": 7, "partial": 0, "kept": 0}
    )
    assert {(c.stage, c.kind) for c in report.comparisons} == {
        ("eval", "output"),
        *([("draws", "output")] if cls is Net else []),  # which has a dropout
        *(
            (s, k)
            for s in ("float64", "float32")
            for k in ("output", "buffer", "gradient", "input gradient", "parameter")
        ),
    }
    assert {c.step for c in report.comparisons} == {0, 1, 2}


# --- Mutations
# ------------------------------------------------------------------------------------------------------------

Patch = Callable[[pytest.MonkeyPatch], None]


def kernel(kind: type[Call[Any]], change: Callable[[Callable[[Any], Any], Any], Any]) -> Patch:
    """Have the reference answer calls of this kind by ``change(original, call)``."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        original = reference.RUN[kind]
        monkeypatch.setitem(reference.RUN, kind, lambda call: change(original, call))

    return patch


def drop_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "activation_gradient", lambda gradient, u, act: gradient)


def stale_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    original = elementwise.activation_gradient
    monkeypatch.setattr(elementwise, "activation_gradient", lambda g, u, act: original(g, u.roll(1, 0), act))


def edge(change: Callable[[BackwardEdge], BackwardEdge]) -> Patch:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        original = conv_options.backward_edge
        for module in (conv_ops, join):
            monkeypatch.setattr(module, "backward_edge", lambda *args: change(original(*args)))

    return patch


def without_a(e: BackwardEdge) -> BackwardEdge:
    return e if e.a is None else BackwardEdge(e.s, torch.zeros_like(e.a), e.b, e.y, e.mean)


def without_b(e: BackwardEdge) -> BackwardEdge:
    return e if e.b is None else BackwardEdge(e.s, e.a, torch.zeros_like(e.b), e.y, e.mean)


def without_s(e: BackwardEdge) -> BackwardEdge:
    return BackwardEdge(None, e.a, e.b, e.y, e.mean)


def wrong_count(monkeypatch: pytest.MonkeyPatch) -> None:
    original = edges.values_per_channel
    monkeypatch.setattr(edges, "values_per_channel", lambda size: original(size) + 1)


def wrong_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second segment of a concat is written one channel too far to the left."""
    original = conv_options.channel_slice
    monkeypatch.setattr(conv_options, "channel_slice", lambda x, start, n: original(x, max(start - 1, 0), n))


def wrong_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    """The segments' vectors are joined in the wrong order, as a concat along another axis would."""
    import bnrestructure.passes.share_statistics as share

    original = share._grown
    monkeypatch.setattr(share, "_grown", lambda parts: original(parts[::-1]))


def finalize(change: Callable[..., Any]) -> Patch:
    return kernel(FinalizeForward, change)


def biased_variance(original: Any, call: FinalizeForward) -> Any:
    return original(replace(call, count=10**12))


def swapped_beta(original: Any, call: FinalizeForward) -> Any:
    rstd, scale, beta = original(call)
    return rstd, scale, beta.flip(0)


def wrong_eps(original: Any, call: FinalizeForward) -> Any:
    return original(replace(call, eps=call.eps * 2))


def no_weight_gradient(original: Any, call: FinalizeBackward) -> Any:
    dvar, dweight = original(call)
    return dvar, torch.zeros_like(dweight)


def no_accumulation(original: Any, call: ConvBackward) -> Any:
    """The gradient that the other readers of the tensor made is lost."""
    return original(replace(call, accumulate=None if call.accumulate is None else call.accumulate.zero_()))


def no_accumulation_behind_joins(original: Any, call: ConvBackward) -> Any:
    return original(call) if call.join is None else no_accumulation(original, call)


def uncentred(original: Any, call: ConvBackward) -> Any:
    gradients = original(call)
    return gradients if gradients.sum_px is None else gradients._replace(sum_px=gradients.sum_px + gradients.sum_p)


def no_mask(original: Any, call: ConvBackward) -> Any:
    """The sum's gradient is handed to both operands as it arrives."""
    return original(call if call.join is None else replace(call, join=replace(call.join, act="identity")))


def no_shortcut_statistics(original: Any, call: ConvBackward) -> Any:
    found = original(call)
    return found if call.join is None else found._replace(sum_p=torch.zeros_like(found.sum_p))


MUTATIONS: dict[str, tuple[type[nn.Module], Patch, set[str]]] = {
    "activation gradient dropped": (Net, drop_mask, {"gradient", "input gradient"}),
    "stale activation mask": (Net, stale_mask, {"gradient", "input gradient"}),
    "term a missing in the backward edge": (Net, edge(without_a), {"gradient", "input gradient"}),
    "term b missing in the backward edge": (Net, edge(without_b), {"gradient", "input gradient"}),
    "factor s missing in the backward edge": (Net, edge(without_s), {"gradient", "input gradient"}),
    "count off by one in the backward edge": (Net, wrong_count, {"gradient", "input gradient"}),
    "weight gradient of a batch norm missing": (Net, kernel(FinalizeBackward, no_weight_gradient), {"gradient"}),
    "gradient of a residual's shortcut missing": (
        Net,
        kernel(ConvBackward, no_accumulation),
        {"gradient", "input gradient"},
    ),
    "gradient of a dense block's concat missing": (
        Dense,
        kernel(ConvBackward, no_accumulation),
        {"gradient", "input gradient"},
    ),
    "second sum not centred": (Net, kernel(ConvBackward, uncentred), {"gradient", "input gradient"}),
    "mask missing at a residual join": (Joins, kernel(ConvBackward, no_mask), {"gradient", "input gradient"}),
    "gradient of a join's other readers missing": (
        Joins,
        kernel(ConvBackward, no_accumulation_behind_joins),
        {"gradient", "input gradient"},
    ),
    "bias gradient missing at a residual join": (
        Net,
        kernel(ConvBackward, no_shortcut_statistics),
        {"gradient", "input gradient"},
    ),
    "biased running variance": (Net, finalize(biased_variance), {"buffer"}),
    "beta of another channel": (Net, finalize(swapped_beta), {"output", "gradient"}),
    "wrong eps": (Net, finalize(wrong_eps), {"output", "gradient"}),
    "concat slice at the wrong offset": (Net, wrong_slice, {"output", "gradient"}),
    "dense block slice at the wrong offset": (Dense, wrong_slice, {"output", "gradient"}),
    "concat vectors in the wrong order": (Net, wrong_axis, {"output", "gradient"}),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_rewrite_is_caught(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls, patch, kinds = MUTATIONS[mutation]
    model, x = built(cls), images()
    patch(monkeypatch)
    report = check(model, x)
    assert not report.ok
    assert report.worst is not None
    assert (report.worst.stage, report.worst.step) == ("float64", 1)
    assert kinds <= set(report.failed_kinds)
    assert "output" in kinds or "output" not in report.failed_kinds
    if kinds == {"buffer"}:
        assert set(report.failed_kinds) == {"buffer"}
        assert report.worst.name.endswith("running_var")
    if mutation.startswith("weight gradient"):
        assert {c.name.split(".")[-1] for c in report.failures if c.step == 1 and c.kind == "gradient"} == {"weight"}
    assert report.worst.name in str(report)


def test_cancellation_is_caught_in_float32_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """E[y^2] - E[y]^2 is right in exact arithmetic: only the distance rule sees it."""

    def naive(call: StatisticsForward) -> tuple[Tensor, Tensor]:
        x = call.x
        mean = x.mean((0, 2, 3))
        return mean, x.square().mean((0, 2, 3)) - mean.square()

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    nn.init.constant_(model[0].bias, 200.0)
    assert check(model).ok
    import bnrestructure.kernels.reference.convolution as convolution

    monkeypatch.setattr(convolution, "statistics_forward", naive)
    report = check(model)
    assert not report.ok
    assert {c.stage for c in report.failures} == {"float32"}


def mutate_candidate(monkeypatch: pytest.MonkeyPatch, change: Callable[[nn.Module], object]) -> None:
    original = verifier.restructure

    def restructured(model: nn.Module, **options: Any) -> nn.Module:
        change(original(model, **options))
        return model

    monkeypatch.setattr(verifier, "restructure", restructured)


def test_a_changed_eval_forward_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_bit(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output if module.training else torch.nextafter(output, torch.full_like(output, math.inf))

    mutate_candidate(monkeypatch, lambda model: model.register_forward_hook(one_bit))
    report = check(built(Net))
    assert [c.stage for c in report.failures] == ["eval"]


def test_a_changed_state_dict_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    mutate_candidate(monkeypatch, lambda model: model.stem.register_buffer("extra", torch.zeros(1)))
    report = check(built(Net))
    assert any("state_dict does not fit" in c.name for c in report.failures)
    assert any(c.kind == "buffer" and c.name == "stem.extra" for c in report.failures)


def test_a_rewrite_that_raises_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(original: Any, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no such kernel\nsecond line")

    kernel(ConvBackward, fail)(monkeypatch)
    report = check(built(Net))
    assert not report.ok
    assert report.worst is not None
    assert report.worst.name == "the restructured model raised RuntimeError: no such kernel"
    assert report.failed_kinds == ("error",)


def test_a_lost_gradient_is_not_taken_for_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    mutate_candidate(monkeypatch, lambda model: setattr(model.left.bias, "requires_grad", False))
    report = check(built(Net))
    assert any(c.name == "left.bias" and c.kind == "gradient" and c.error == math.inf for c in report.failures)


# --- What a verification accepts
# --------------------------------------------------------------------------------------------


def test_the_model_and_the_generators_are_left_alone() -> None:
    model = built(Net)
    model(images()).sum().backward()
    before = copy.deepcopy(model.state_dict())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    assert check(model).ok
    assert type(model) is Net
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    assert torch.get_default_dtype() is torch.float32


def test_a_restructured_model_is_checked_with_its_own_options() -> None:
    model = bnrestructure.restructure(built(Net), backend="reference", passes="rcf")
    report = verify(model, images())
    assert report.ok, report
    assert report.sites["kept"] == 4
    model.eval()
    assert verify(model, images()).ok
    assert not model.training


def test_a_model_without_batch_norm_passes() -> None:
    report = check(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    assert report.ok
    assert report.sites == {"fused": 0, "partial": 0, "kept": 0}


class Losses(nn.Module):
    """Like a detection model: lists of images and targets in, a dict of losses out, predictions in eval."""

    def __init__(self) -> None:
        super().__init__()
        self.body = built(Net)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        scores = self.body(torch.stack(images))
        if not self.training:
            return [{"scores": s} for s in scores]
        assert targets is not None
        labels = torch.cat([t["labels"] for t in targets])
        return {"classifier": F.cross_entropy(scores, labels), "size": scores.square().mean()}


def test_lists_of_images_and_dicts_of_losses() -> None:
    model = Losses()
    inputs = ([torch.randn(3, 8, 8) for _ in range(4)], [{"labels": torch.tensor([i])} for i in range(4)])
    report = check(model, inputs)
    assert report.ok, report
    names = {c.name for c in report.comparisons}
    assert {
        "output['classifier']",
        "output['size']",
        "input[0][0]",
        "body.bn1.running_var",
        "output[0]['scores']",
    } <= names


def test_a_loss_function_with_targets() -> None:
    report = check(built(Net), targets=torch.tensor([0, 1, 2, 3]), loss_fn=F.cross_entropy, steps=1)
    assert report.ok, report
    assert {c.step for c in report.comparisons} == {0, 1}
    assert {c.step for c in check(built(Net), steps=0).comparisons if c.kind == "parameter"} == set()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    report = check(built(Net), dtype=dtype)
    assert report.ok, report
    assert {c.stage for c in report.comparisons} == {"draws", "float64", str(dtype).split(".")[1], "eval"}


@pytest.mark.parametrize("context", [partial(torch.autocast, "cpu", torch.bfloat16), torch.no_grad, torch.inference_mode])
def test_the_context_of_the_caller_does_not_count(context: Callable[[], AbstractContextManager[None]]) -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 3, 10, 10)
    with context():
        report = verify(model, x)
    assert report.ok, report
    assert {c.stage for c in report.comparisons} == {"draws", "float64", "float32", "eval"}


def test_a_float64_model_has_no_training_stage() -> None:
    report = check(built(Net).double(), images().double())
    assert report.ok
    assert {c.stage for c in report.comparisons} == {"draws", "float64", "eval"}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_stand_where_eager_has_them(value: float) -> None:
    x = images()
    x[1, 0, 3, 2] = value
    report = check(built(Net), x)
    assert report.ok, report


def test_nan_where_eager_has_none_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(original: Any, call: ConvBackward) -> Any:
        found = original(call)
        if call.join is not None:
            found.dx[0, 0, 0, 0] = math.nan
        return found

    kernel(ConvBackward, spoil)(monkeypatch)
    report = check(built(Net))
    assert report.worst is not None
    assert report.worst.ratio == math.inf


def test_the_report_is_plain_data(monkeypatch: pytest.MonkeyPatch) -> None:
    drop_mask(monkeypatch)
    report = check(built(Net), steps=1)
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["ok"] is False
    assert data["worst"]["kind"] in ("gradient", "input gradient")
    assert data["compared"] == len(report.comparisons)
    assert data["sites"] == report.sites


class Labels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(1)


def test_usage_errors() -> None:
    model = built(Net)
    with pytest.raises(UsageError, match=r"expected a torch.nn.Module, got function"):
        verify(lambda x: x, images())
    with pytest.raises(UsageError, match=r"original model fails on these inputs in float64: RuntimeError: .*channels"):
        check(model, torch.randn(2, 4, 8, 8))
    with pytest.raises(UsageError, match="did you mean 'reference'"):
        check(model, backend="refrence")
    with pytest.raises(UsageError, match="steps must be at least 0"):
        check(model, steps=-1)
    with pytest.raises(UsageError, match="meta device"):
        check(built(Net).to("meta"))
    with pytest.raises(UsageError, match="pass loss_fn"):
        check(Labels())


# --- Distances
# --------------------------------------------------------------------------------------------------------------


def test_a_true_zero_is_measured_against_its_neighbours() -> None:
    truths = {"weight": torch.ones(100), "bias": torch.full((10,), 1e-17)}
    unit = distance.units(truths)
    assert unit["weight"] == pytest.approx(10.0)
    assert unit["bias"] == pytest.approx(distance.SMALL * math.sqrt(10))
    assert distance.distances(torch.zeros(10), truths["bias"], unit["bias"]) < 1e-13
    assert distance.distances(torch.full((10,), 1e-6), truths["bias"], unit["bias"]) > 1e-4


def test_distances_of_what_cannot_be_subtracted() -> None:
    nan, inf = math.nan, math.inf
    assert distance.distances(torch.tensor([nan, 1.0]), torch.tensor([nan, 1.0]), 1.0) == 0
    assert distance.distances(torch.tensor([1.0, nan]), torch.tensor([nan, 1.0]), 1.0) == inf
    assert distance.distances(torch.tensor([inf]), torch.tensor([-inf]), 1.0) == inf
    assert distance.distances(torch.tensor([2]), torch.tensor([3]), 1.0) == inf
    assert distance.distances(torch.ones(2), torch.ones(3), 1.0) == inf
    assert distance.distances(torch.ones(0), torch.ones(0), 0.0) == 0


def test_dropout_draws_the_same_in_every_dtype_and_layout() -> None:
    from bnrestructure.verification.draws import SameDraws, seeded

    x = torch.ones(2, 8, 5, 5)
    masks = []
    for t in (x, x.double(), x.to(memory_format=torch.channels_last), x.bfloat16()):
        seeded(0)
        with SameDraws():
            masks.append([F.dropout(t, 0.5), torch.rand_like(t) > 0.5, torch.randn(3, dtype=t.dtype).double()])
    for mask in masks[1:3]:
        assert all(torch.equal(a.double(), b.double()) for a, b in zip(mask[:2], masks[0][:2], strict=True))
    assert torch.equal(masks[3][0].double(), masks[0][0].double())
    assert torch.allclose(masks[1][2], masks[0][2])
