"""Misuse of the API: one clear line, and the model left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from needs import needs_no_gpu
from small_models import build, input_for
from torch import nn

import bnrestructure
from bnrestructure import NotFullyFusedError, UsageError
from bnrestructure.capture.swap import is_restructured


def _state(model: nn.Module) -> list[Any]:
    return [(type(m), m.training, sorted(m.__dict__)) for m in model.modules()]


@pytest.mark.parametrize("call", [bnrestructure.restructure, bnrestructure.explain])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "refrence"}, "did you mean 'reference'"),
        ({"backend": "tpu"}, "unknown backend 'tpu'"),
        ({"backend": None}, "unknown backend None"),
        ({"passes": "bnf"}, "did you mean"),
        ({"passes": ["fission", "fusion"]}, "unknown pass 'fusion'"),
    ],
    ids=str,
)
def test_misspelt_options(call: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    model = build("residual")
    before = _state(model)
    with pytest.raises(UsageError, match=message) as caught:
        call(model, **{"backend": "reference", **options})
    assert "\n" not in str(caught.value)
    assert _state(model) == before


@needs_no_gpu
def test_cuda_without_a_gpu() -> None:
    model = build("chain")
    with pytest.raises(UsageError, match="no CUDA device"):
        bnrestructure.restructure(model, backend="cuda")
    assert type(model).__name__ == "Chain"


@pytest.mark.parametrize("call", [bnrestructure.restructure, bnrestructure.explain, bnrestructure.unrestructure])
@pytest.mark.parametrize("thing", [None, 3, "resnet50", nn.ReLU, torch.zeros(2), {}], ids=repr)
def test_not_a_module(call: Callable[..., Any], thing: Any) -> None:
    with pytest.raises(UsageError, match=r"expected a torch\.nn\.Module"):
        call(thing)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_script_module() -> None:
    scripted = torch.jit.trace(build("chain", torch.float32), input_for("chain", torch.float32))
    with pytest.raises(UsageError, match="ScriptModule"):
        bnrestructure.restructure(scripted)


def test_strict_names_the_first_site_and_changes_nothing() -> None:
    model = build("functional")
    before = _state(model)
    with pytest.raises(NotFullyFusedError, match="not fully fused; first") as caught:
        bnrestructure.restructure(model, backend="reference", strict=True)
    assert "\n" not in str(caught.value)
    assert _state(model) == before
    assert is_restructured(bnrestructure.restructure(build("chain"), backend="reference", strict=True))


@pytest.mark.parametrize(
    "shape", [(3, 12, 12), (2, 4, 12, 12), (2, 3, 12), (2, 3, 4, 12, 12), (12,), (2, 3, 0, 0)], ids=str
)  # fmt: skip
@pytest.mark.parametrize("name", ["chain", "residual", "dense", "inception"])
def test_wrong_shape_is_an_error_where_eager_has_one(name: str, shape: tuple[int, ...]) -> None:
    model, x = build(name), torch.randn(shape, dtype=torch.float64)
    rewritten = bnrestructure.restructure(copy.deepcopy(model), backend="reference")
    with pytest.raises((RuntimeError, ValueError)):
        model(x)
    with pytest.raises((RuntimeError, ValueError)) as caught:
        rewritten(x)
    assert str(caught.value)
    rewritten(input_for(name))  # and it is still usable


@pytest.mark.parametrize(
    ("layers", "shape", "message"),
    [
        ([nn.Linear(4, 5), nn.BatchNorm2d(5), nn.ReLU()], (6, 4), "expected 4D input"),
        ([nn.Conv2d(3, 4, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)], (2, 3, 5, 5), "expected 2D or 3D input"),
        ([nn.Conv2d(3, 4, 1), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)], (2, 3, 5, 5), "expected 5D input"),
        ([nn.Conv2d(3, 4, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(4, 2, 1)], (2, 3, 5, 5), None),
        ([nn.Conv2d(3, 4, 1), nn.BatchNorm2d(1), nn.ReLU(), nn.Conv2d(4, 2, 1)], (2, 3, 5, 5), None),
        ([nn.Conv2d(3, 4, 1), nn.BatchNorm2d(1, track_running_stats=False), nn.Conv2d(4, 2, 1)], (2, 3, 5, 5), None),
    ],
    ids=str,
)
def test_batch_norm_of_the_wrong_kind_or_width(layers: list[nn.Module], shape: tuple[int, ...], message: str | None) -> None:
    """Eager's checks are not lost with its batch norm."""
    model, x = nn.Sequential(*layers), torch.randn(shape)
    with pytest.raises((RuntimeError, ValueError), match=message):
        copy.deepcopy(model)(x)
    with pytest.raises((RuntimeError, ValueError), match=message):
        bnrestructure.restructure(model, backend="reference")(x)


def test_wrong_dtype_is_pytorchs_error() -> None:
    model = bnrestructure.restructure(build("chain"), backend="reference")
    with pytest.raises(RuntimeError, match=r"Input type|expected m1|same dtype|type"):
        model(input_for("chain", torch.float32))


def _batch_norm(**options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, **options), nn.ReLU(), nn.Conv2d(3, 3, 1))


def _without_eps() -> nn.Module:
    return _batch_norm(eps=0.0)


def _in_double() -> nn.Module:
    model = _batch_norm()
    model[1].double()
    return model


def _with_differentiable_statistics() -> nn.Module:
    model = _batch_norm()
    model[1].running_mean = torch.zeros(3, requires_grad=True)
    return model


def _with_a_bias_of_another_dtype() -> nn.Module:
    model = _batch_norm()
    model[3].bias.data = model[3].bias.data.bfloat16()
    return model


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("make", [_without_eps, _in_double, _with_differentiable_statistics, _with_a_bias_of_another_dtype])
def test_what_eager_refuses_at_the_step_is_refused(make: Callable[[], nn.Module], backend: str) -> None:
    x = torch.randn(4, 3, 5, 5)
    with pytest.raises((ValueError, RuntimeError)) as expected:
        make()(x)
    with pytest.raises(expected.type, match=str(expected.value)[:11]):
        bnrestructure.restructure(make(), backend=backend)(x)


@pytest.mark.parametrize("passes", [[1], 7, ["fission", None]])
def test_passes_that_are_no_names(passes: Any) -> None:
    with pytest.raises(UsageError, match=r"unknown pass|passes are names"):
        bnrestructure.restructure(build("chain"), passes=passes)


@pytest.mark.parametrize("fuel", [-1, 1.5, "all"])
def test_fuel_that_is_no_number_of_rewrites(fuel: Any) -> None:
    with pytest.raises(UsageError, match="fuel is a number of rewrites"):
        bnrestructure.restructure(build("chain"), fuel=fuel)


@pytest.mark.parametrize(
    "inputs", ["a", 3, torch.randn(2, 4, 12, 12), (torch.randn(2, 3, 12, 12), 1)], ids=["text", "number", "channels", "count"]
)
def test_explain_with_inputs_that_the_model_does_not_take(inputs: Any) -> None:
    model = build("chain").float()
    before = _state(model)
    with pytest.raises(UsageError, match="does not take this input"):
        bnrestructure.explain(model, inputs)
    assert _state(model) == before
