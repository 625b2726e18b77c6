"""The verifier passes what is right, says what it takes, and leaves models and generators alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from verify_models import Dense, Net, built, check, images

import bnrestructure
from bnrestructure import UsageError, verify
from bnrestructure.verification import distance


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
