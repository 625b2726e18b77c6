"""Deliberately broken rewrites, kernels and models must not get by the verifier."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from verify_models import Dense, Joins, Net, built, check, images

from bnrestructure.core import edges
from bnrestructure.core.edges import BackwardEdge
from bnrestructure.kernels import reference
from bnrestructure.kernels.calls import Call, ConvBackward, FinalizeBackward, FinalizeForward, StatisticsForward
from bnrestructure.kernels.reference import elementwise
from bnrestructure.ops import conv_options, join, slots
from bnrestructure.verification import verifier

conv_ops = sys.modules["bnrestructure.ops.conv"]  # ``bnrestructure.ops.conv`` names the function

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
    original = slots.channel_slice
    monkeypatch.setattr(slots, "channel_slice", lambda x, start, n: original(x, max(start - 1, 0), n))


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
    found = original(call)
    return found._replace(beta=found.beta.flip(0))


def wrong_eps(original: Any, call: FinalizeForward) -> Any:
    return original(replace(call, eps=call.eps * 2))


def no_weight_gradient(original: Any, call: FinalizeBackward) -> Any:
    found = original(call)
    return found._replace(weight=torch.zeros_like(found.weight))


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
