"""What a forward does beside its result: what it counts, stores and draws outside its modules, and what it finds there later."""

from __future__ import annotations

import functools
import os
import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from equivalence import assert_same_training, assert_same_values, restructured_copy, training_step
from test_semantics_globals import OPTIONS, Body, Change, _images, _model, check_that_a_change_is_seen
from test_semantics_tracing import _Base
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import bnrestructure

HERE = sys.modules[__name__]

CALLS: dict[str, Any] = {"n": 0}
GRIDS: dict[Any, Tensor] = {}
LOG: list[Any] = []
DRAWS = random.Random(0)
NUMBERS = np.random.default_rng(0)
OF_CONTEXT: ContextVar[float] = ContextVar("of_context")
OF_CONTEXT.set(1.0)
NEVER_SET: ContextVar[int] = ContextVar("never_set")
OF_THREAD = threading.local()
OF_THREAD.scale = 1.0


@functools.lru_cache
def cached_grid(size: int) -> Tensor:
    return torch.linspace(0, 1, size, dtype=torch.float64)


def kept_grid(size: int) -> Tensor:
    if size not in GRIDS:
        GRIDS[size] = torch.linspace(0, 1, size, dtype=torch.float64)
    return GRIDS[size]


def counted() -> int:
    CALLS["n"] += 1
    return CALLS["n"]


def _scaled_by(factor: Callable[[], Any]) -> type[nn.Module]:
    """A part without a batch norm of its own."""
    return type("Part", (nn.Module,), {"forward": lambda m, y: y * factor()})


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Puts all of this module's counters, caches and generators to their start."""

    def again() -> None:
        CALLS["n"] = 0
        LOG.clear()
        GRIDS.clear()
        cached_grid.cache_clear()
        monkeypatch.setattr(HERE, "DRAWS", random.Random(0))
        monkeypatch.setattr(HERE, "NUMBERS", np.random.default_rng(0))

    return again


GOES_ON: dict[str, Callable[[], Any]] = {
    "a generator of Python's": lambda: DRAWS.random(),
    "a generator of NumPy's": lambda: NUMBERS.random(),
    "a counter": lambda: counted(),
    "a list": lambda: LOG.append(1) or len(LOG),  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", GOES_ON)
def test_what_goes_on_by_itself_is_not_frozen(name: str, whole: bool, start: Callable[[], None]) -> None:
    """The model is left as it is; a part of it stays a call, and the model around it is rewritten."""
    factor = GOES_ON[name]
    model = _model(lambda m, x: m.trunk(x) * factor()) if whole else _model(lambda m, x: m.part(m.trunk(x)))
    model.part = _scaled_by(factor)()
    steps = []
    rewritten = restructured_copy(model)
    for m in (model, rewritten):
        start()
        steps.append([training_step(m, _images()) for _ in range(4)])
    for actual, expected in zip(*steps[::-1], strict=True):
        assert_same_values(actual, expected)
    assert not torch.equal(steps[0][0]["output/0"], steps[0][1]["output/0"])
    assert all(site.ran is (not whole) for site in bnrestructure.explain(rewritten).sites)


@pytest.mark.parametrize("grid", [cached_grid, kept_grid])
def test_what_is_kept_from_the_first_call_is_real(grid: Any, start: Callable[[], None]) -> None:
    start()
    model = _model(lambda m, x: m.trunk(x) * grid(x.shape[-1]))
    rewritten = restructured_copy(model)
    for _ in range(3):
        actual = training_step(rewritten, _images())
        kept = grid(8)
        assert type(kept) is Tensor
        assert kept[-1] == 1
    assert_same_values(actual, [training_step(model, _images()) for _ in range(3)][-1])
    assert all(site.ran for site in bnrestructure.explain(rewritten).sites)


SETTINGS: dict[str, tuple[Body, Change]] = {
    "the process": (
        lambda m, x: m.trunk(x) * float(os.environ.get("BNR_OF_THE_TEST", "1")), lambda p: p.setenv("BNR_OF_THE_TEST", "3"),
    ),
    "a thread": (lambda m, x: m.trunk(x) * OF_THREAD.scale, lambda p: p.setattr(OF_THREAD, "scale", 3.0)),
    "a context": (lambda m, x: m.trunk(x) * OF_CONTEXT.get(), lambda p: OF_CONTEXT.set(3.0) and None),
}  # fmt: skip


@pytest.mark.parametrize("of", SETTINGS)
def test_settings(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, change = SETTINGS[of]
    copy_context().run(check_that_a_change_is_seen, body, lambda: change(monkeypatch))


@pytest.mark.parametrize("of", ["a context", "a closure"])
def test_nothing_of_a_capture_is_left_in(of: str) -> None:
    def in_closure(m: Any, x: Tensor) -> Tensor:
        nonlocal feature
        feature = m.trunk(x)
        return feature * 1.0

    def in_context(m: Any, x: Tensor) -> Tensor:
        NEVER_SET.set(1)
        return m.trunk(x)

    feature: Tensor
    plan = bnrestructure.explain(restructured_copy(_model(in_context if of == "a context" else in_closure)))
    assert any("its forward writes the variable" in note for note in plan.notes)
    assert NEVER_SET.get(None) is None
    with pytest.raises(NameError):
        _ = feature


ABSENT_AT_FIRST = SimpleNamespace()
ORDERED: OrderedDict[int, Tensor] = OrderedDict()


class Parent:
    scale = 1.0


class Child(Parent):
    pass


@contextmanager
def counting() -> Iterator[None]:
    counted()
    yield


@torch.no_grad()
def scale_without_gradients() -> float:
    return float(OPTIONS["scale"])


LATER: dict[str, tuple[Body, Change]] = {
    "an attribute with a default": (
        lambda m, x: m.trunk(x) * getattr(ABSENT_AT_FIRST, "warm", 1.0), lambda p: p.setattr(ABSENT_AT_FIRST, "warm", 3.0, raising=False),
    ),
    "a nearer class": (lambda m, x: m.trunk(x) * Child.scale, lambda p: p.setattr(Child, "scale", 3.0)),
    "a function without gradients": (lambda m, x: m.trunk(x) * scale_without_gradients(), lambda p: p.setitem(OPTIONS, "scale", 3.0)),
    "a class attribute of the model": (
        lambda m, x: m.trunk(x) * getattr(type(m), "power", 1.0), lambda p: p.setattr(_Base, "power", 3.0, raising=False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LATER)
def test_what_was_not_there_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, change = LATER[name]
    check_that_a_change_is_seen(body, lambda: change(monkeypatch))


def _stored(m: Any, x: Tensor) -> Tensor:
    ABSENT_AT_FIRST.feature = m.trunk(x)
    return ABSENT_AT_FIRST.feature * 1.0


def _counted(m: Any, x: Tensor) -> Tensor:
    with counting():
        return m.trunk(x) * CALLS["n"]


def _seeded(m: Any, x: Tensor) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return m.trunk(x) * torch.rand((), dtype=x.dtype)


def _ordered(m: Any, x: Tensor) -> Tensor:
    if 8 not in ORDERED:
        ORDERED[8] = torch.linspace(0, 1, 8, dtype=torch.float64)
    return m.trunk(x) * ORDERED[8]


def _kept(m: Any, x: Tensor) -> Tensor:
    return m.kept(m.trunk(x))


def _drawn(m: Any, x: Tensor) -> Tensor:
    return m.trunk(x) * m.draws["here"].random()


@pytest.mark.parametrize("body", [_stored, _counted, _seeded, _ordered, _kept, _drawn])
def test_what_a_forward_does_beside_its_result_it_does_each_time(body: Body, start: Callable[[], None]) -> None:
    model = _model(body)
    model.kept = lambda y: LOG.append(y) or y * len(LOG)  # type: ignore[func-returns-value]
    steps = []
    for m in (model, restructured_copy(model)):
        start()
        ORDERED.clear()
        m.draws = {"here": random.Random(3)}
        steps.append([training_step(m, _images()) for _ in range(3)])
        assert type(getattr(ABSENT_AT_FIRST, "feature", LOG[0] if LOG else m.conv1.weight.data)) is Tensor
    for actual, expected in zip(*steps[::-1], strict=True):
        assert_same_values(actual, expected)


class Refuses(dict[str, Any]):
    def __iter__(self) -> Any:
        raise RuntimeError("nobody asks me")

    keys = values = items = __len__ = __iter__  # type: ignore[assignment]


REFUSES = Refuses(scale=1.0)


def test_objects_that_do_not_like_to_be_asked() -> None:
    model = _model(lambda m, x: m.trunk(x) * REFUSES["scale"])
    rewritten = restructured_copy(model)
    for _ in range(2):
        assert_same_values(training_step(rewritten, _images()), training_step(model, _images()))


def test_names_of_a_script_are_no_names_of_its_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that returns {"out": y} does not read the variable ``out`` of the file that it is in."""
    rewritten = restructured_copy(_model(lambda m, x: {"out": m.trunk(x)}["out"]))
    for step in range(4):
        training_step(rewritten, _images())
        monkeypatch.setattr(HERE, "out", step, raising=False)
    assert "the whole model 1" in str(bnrestructure.explain(rewritten))


@pytest.mark.parametrize("how", ["an instance's", "a class's", "a mode"])
def test_layers_that_somebody_changed(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Softer(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {})) if function is not F.relu else F.silu(*args)

    model = _model(lambda m, x: m.trunk(x))
    if how == "an instance's":
        model.conv2._conv_forward = lambda x, w, b: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), w, b)
    elif how == "a class's":
        monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda m, x: x * m.weight[:, None, None])
    with Softer() if how == "a mode" else nullcontext():
        rewritten = assert_same_training(model, _images())
    assert how != "a mode" or any("a TorchFunctionMode is active" in note for note in bnrestructure.explain(rewritten).notes)
