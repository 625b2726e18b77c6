"""What a forward finds outside its modules may change between two steps: globals, configuration objects, classes, defaults, closures."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from equivalence import assert_same_values, restructured_copy, training_step
from test_semantics_tracing import _Base, _double
from torch import Tensor, nn
from torch.nn import functional as F

import bnrestructure

Body = Callable[[Any, Tensor], Tensor]
Change = Callable[[pytest.MonkeyPatch], None]
HERE = sys.modules[__name__]

OPTIONS: dict[str, Any] = {"scale": 1.0, "head": {"activation": "relu"}}
ACTIVATION = F.relu
TABLE = torch.ones(1, dtype=torch.float64)
SCALES, DEFAULT = [1.0], [1.0]
NAMESPACE = SimpleNamespace(scale=1.0, head=SimpleNamespace(scale=1.0))
ARGUMENTS = argparse.Namespace(scale=1.0)
MODULE = ModuleType("settings_of_the_test")
MODULE.scale = 1.0  # type: ignore[attr-defined]


class Config:
    scale = 1.0

    class head:
        scale = 1.0


class Defaults:
    """An instance takes what it does not have from its class."""

    scale = 1.0

    @property
    def doubled(self) -> float:
        return 2 * OPTIONS["scale"]

    def __call__(self, y: Tensor) -> Tensor:
        return y * self.scale


@dataclass
class Settings:
    scale: float = 1.0


@dataclass(slots=True)
class Slotted:
    scale: float = 1.0


SETTINGS, SLOTTED, DEFAULTS = Settings(), Slotted(), Defaults()


def scaled(y: Tensor, by: list[float] = DEFAULT) -> Tensor:
    return y * by[0]


def plain(y: Tensor) -> Tensor:
    return y


def doubled(y: Tensor) -> Tensor:
    return y * 2


STEP = plain


class Halves(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        return y / 2


PART: nn.Module = nn.Identity()


def closed_over() -> tuple[Body, Callable[[], None]]:
    settings = {"scale": 1.0}
    return (lambda m, x: m.trunk(x) * settings["scale"]), lambda: settings.update(scale=3.0)


IN_CLOSURE, CHANGE_CLOSURE = closed_over()

CASES: dict[str, tuple[Body, Change]] = {
    "an item of a dict": (lambda m, x: m.trunk(x) * OPTIONS["scale"], lambda p: p.setitem(OPTIONS, "scale", 3.0)),
    "a branch by a dict in a dict": (
        lambda m, x: m.trunk(x).relu() if OPTIONS["head"]["activation"] == "relu" else m.trunk(x).tanh(),
        lambda p: p.setitem(OPTIONS["head"], "activation", "tanh"),
    ),
    "another dict": (lambda m, x: m.trunk(x) * OPTIONS["scale"], lambda p: p.setattr(HERE, "OPTIONS", {"scale": 3.0})),
    "an item of a list": (lambda m, x: m.trunk(x) * SCALES[0], lambda p: SCALES.insert(0, 3.0)),
    "the length of a list": (lambda m, x: m.trunk(x) * len(SCALES), lambda p: p.setattr(HERE, "SCALES", [1.0, 1.0])),
    "an attribute of a class": (lambda m, x: m.trunk(x) * Config.scale, lambda p: p.setattr(Config, "scale", 3.0)),
    "of a class in a class": (lambda m, x: m.trunk(x) * Config.head.scale, lambda p: p.setattr(Config.head, "scale", 3.0)),
    "by getattr": (lambda m, x: m.trunk(x) * getattr(Config, "scale"), lambda p: p.setattr(Config, "scale", 3.0)),  # noqa: B009
    "of a namespace": (lambda m, x: m.trunk(x) * NAMESPACE.head.scale, lambda p: p.setattr(NAMESPACE.head, "scale", 3.0)),
    "of parsed arguments": (lambda m, x: m.trunk(x) * ARGUMENTS.scale, lambda p: p.setattr(ARGUMENTS, "scale", 3.0)),
    "of a dataclass": (lambda m, x: m.trunk(x) * SETTINGS.scale, lambda p: p.setattr(SETTINGS, "scale", 3.0)),
    "of an object with slots": (lambda m, x: m.trunk(x) * SLOTTED.scale, lambda p: p.setattr(SLOTTED, "scale", 3.0)),
    "that hides its class's": (lambda m, x: m.trunk(x) * DEFAULTS.scale, lambda p: p.setitem(vars(DEFAULTS), "scale", 3.0)),
    "of an object that is called": (lambda m, x: DEFAULTS(m.trunk(x)), lambda p: p.setattr(Defaults, "scale", 3.0)),
    "behind a property": (lambda m, x: m.trunk(x) * DEFAULTS.doubled, lambda p: p.setitem(OPTIONS, "scale", 3.0)),
    "of a module": (lambda m, x: m.trunk(x) * MODULE.scale, lambda p: p.setattr(MODULE, "scale", 3.0)),
    "another function of PyTorch's": (lambda m, x: ACTIVATION(m.trunk(x)), lambda p: p.setattr(HERE, "ACTIVATION", torch.tanh)),
    "another function": (lambda m, x: STEP(m.trunk(x)), lambda p: p.setattr(HERE, "STEP", doubled)),
    "another module": (lambda m, x: PART(m.trunk(x)), lambda p: p.setattr(HERE, "PART", Halves())),
    "another tensor": (lambda m, x: m.trunk(x) * TABLE, lambda p: p.setattr(HERE, "TABLE", TABLE * 3)),
    "a tensor of another shape": (
        lambda m, x: m.trunk(x) * (3 if TABLE.shape[0] > 1 else 1), lambda p: p.setattr(HERE, "TABLE", TABLE.repeat(2)),
    ),
    "a default": (lambda m, x: scaled(m.trunk(x)), lambda p: p.setattr(scaled, "__defaults__", ([3.0],))),
    "what is in a default": (lambda m, x: scaled(m.trunk(x)), lambda p: DEFAULT.insert(0, 3.0)),
    "in a partial": (lambda m, x: functools.partial(scaled, by=SCALES)(m.trunk(x)), lambda p: SCALES.insert(0, 3.0)),
    "in a closure": (IN_CLOSURE, lambda p: CHANGE_CLOSURE()),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    SCALES[:] = DEFAULT[:] = [1.0]


def _images() -> Tensor:
    return torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _model(body: Body) -> nn.Module:
    return _double(type("Model", (_Base,), {"forward": body})())


def check_that_a_change_is_seen(body: Body, change: Callable[[], None]) -> None:
    """The model's output changes, and the restructured model's with it."""
    model = _model(body)
    rewritten = restructured_copy(model)
    before = training_step(model, _images())
    assert_same_values(training_step(rewritten, _images()), before)
    change()
    after = training_step(model, _images())
    assert not torch.equal(after["output/0"], before["output/0"])
    assert_same_values(training_step(rewritten, _images()), after)
    assert all(site.ran for site in bnrestructure.explain(rewritten).sites)


@pytest.mark.parametrize("name", CASES)
def test_what_changes_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, change = CASES[name]
    check_that_a_change_is_seen(body, lambda: change(monkeypatch))


def test_another_forward_of_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(lambda m, x: m.trunk(x))
    rewritten = restructured_copy(model)
    for m in (model, rewritten):
        training_step(m, _images())
    monkeypatch.setattr(type(model), "forward", lambda m, x: m.trunk(x) * 3)
    assert_same_values(training_step(rewritten, _images()), training_step(model, _images()))


def test_what_no_code_names_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    rewritten = restructured_copy(_model(lambda m, x: m.trunk(x) * SETTINGS.scale * Config.scale))
    for step in range(4):
        training_step(rewritten, _images())
        monkeypatch.setattr(SETTINGS, "steps", step, raising=False)
        monkeypatch.setattr(Config, "steps", step, raising=False)
        monkeypatch.setattr(HERE, "steps", step, raising=False)
        monkeypatch.setattr(SETTINGS, "scale", float("1.0"))  # equal, and another object
    assert "the whole model 1" in str(bnrestructure.explain(rewritten))


TANGLE: list[Any] = []
TANGLE += [TANGLE] * 20


def test_a_container_that_is_in_itself() -> None:
    """The check before each step looks at a bounded number of things."""
    rewritten = restructured_copy(_model(lambda m, x: m.trunk(x) * (1 if TANGLE else 2)))
    for _ in range(2):
        training_step(rewritten, _images())
    assert "the whole model 1" in str(bnrestructure.explain(rewritten))
