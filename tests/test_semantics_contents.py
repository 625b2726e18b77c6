"""Objects that a module keeps, of any kind: the next step sees what changed in them, and what a forward writes to them is written."""

from __future__ import annotations

import copy
import datetime as dt
import functools
import itertools
import random
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from equivalence import assert_same_training, assert_same_values, restructured_copy, training_step
from stems import stem
from test_semantics_tracing import _Base, _double
from torch import Tensor, nn
from torch.nn import functional as F

import bnrestructure
from bnrestructure.capture.swap import region_of


class Attributes(dict[str, Any]):
    """A dict whose items are attributes, as configurations are."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class Numbers(list[Any]):
    pass


@dataclass(slots=True)
class Slots:
    power: float = 1.0


class Called:
    def __init__(self) -> None:
        self.power = 1.0

    def __call__(self) -> float:
        return self.power


class Counted(Called):
    """Counts its calls."""

    def __call__(self) -> float:
        self.power += 1.0
        return self.power


class One:
    power = 1.0


class Two:
    power = 2.0


class Day(dt.date):
    """Has its state in C, and a dict of attributes beside it."""


def _power(value: float, *, more: float = 0.0) -> float:
    return value + more


class Keeps(_Base):
    """Raises what it computes to a power that it finds in ``kept``."""

    def __init__(self, kept: Any, find: Callable[[Any], Any]) -> None:
        super().__init__()
        self.kept, self.find = kept, find

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x) * float(self.find(self.kept))


def _set(value: Callable[[], Any]) -> Callable[[Any], None]:
    def change(m: Any) -> None:
        m.kept = value()

    return change


#: (what the module keeps, where its forward finds a number in that, what happens between two steps)
CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "an OrderedDict": (lambda: OrderedDict(power=1.0), lambda k: k["power"], lambda m: m.kept.update(power=2.0)),
    "another OrderedDict": (lambda: OrderedDict(power=1.0), lambda k: k["power"], _set(lambda: OrderedDict(power=2.0))),
    "a dict of attributes": (lambda: Attributes(power=1.0), lambda k: k.power, lambda m: m.kept.update(power=2.0)),
    "a kind of list": (lambda: Numbers([1.0]), lambda k: k[0], lambda m: m.kept.__setitem__(0, 2.0)),
    "a set": (lambda: {1, 2}, len, lambda m: m.kept.add(5)),
    "a deque": (lambda: deque([1.0]), lambda k: k[-1], lambda m: m.kept.append(2.0)),
    "a bytearray": (lambda: bytearray(b"\1"), lambda k: k[0], lambda m: m.kept.__setitem__(0, 2)),
    "an array": (lambda: np.ones(3), lambda k: k[0], lambda m: m.kept.fill(2.0)),
    "an object with slots": (Slots, lambda k: k.power, lambda m: setattr(m.kept, "power", 2.0)),
    "an object that is called": (Called, lambda k: k(), lambda m: setattr(m.kept, "power", 2.0)),
    "a bound method's object": (lambda: Called().__call__, lambda k: k(), lambda m: setattr(m.kept.__self__, "power", 2.0)),
    "keywords of a partial": (
        lambda: functools.partial(_power, 1.0, more=0.0), lambda k: k(), lambda m: m.kept.keywords.update(more=2.0)
    ),
    "an object of another class": (One, lambda k: k.power, _set(Two)),
    "containers in containers": (
        lambda: {"a": [{"b": ({"power": 1.0},)}]}, lambda k: k["a"][0]["b"][0]["power"],
        lambda m: m.kept["a"][0]["b"][0].update(power=2.0),
    ),
    "an object with more than attributes": (lambda: Day(2026, 1, 1), lambda k: k.day, _set(lambda: Day(2026, 1, 2))),
    "a tuple for a list": (lambda: [2.0], lambda k: 1.0 + isinstance(k, list), _set(lambda: (2.0,))),
    "a float for an int": (lambda: 1, lambda k: 1.0 + isinstance(k, int), _set(lambda: 1.0)),
    "a bool for an int": (lambda: 1, lambda k: 1.0 + isinstance(k, bool), _set(lambda: True)),
    "a float for an int in a tuple": (lambda: (1,), lambda k: 1.0 + isinstance(k[0], int), _set(lambda: (1.0,))),
    "tensors as keys": (lambda: {torch.ones(2): 1.0}, lambda k: next(iter(k.values())), _set(lambda: {torch.ones(2): 2.0})),
    "another sign of zero": (lambda: 0.0, lambda k: 1.0 + (str(k) == "0.0"), _set(lambda: -0.0)),
    "a layer that is no submodule": (
        lambda: [nn.Dropout(0.5)], lambda k: k[0].p, lambda m: setattr(m.kept[0], "p", 0.25)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_inside_of_what_is_kept_is_seen(name: str) -> None:
    kept, find, change = CHANGES[name]
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    assert_same_training(_double(Keeps(kept(), find)), x, steps=3, between=lambda m, step: change(m) if step == 0 else None)


def _appended(kept: Any) -> float:
    kept.append(1.0)
    return float(len(kept))


def _counted(kept: Any, key: Any) -> float:
    kept[key] += 1
    return float(kept[key])


def _counted_slot(kept: Slots) -> float:
    kept.power += 1
    return kept.power


#: (what the module keeps, what its forward writes to it and finds there)
WRITES: dict[str, tuple[Callable[[], Any], Callable[[Any], float]]] = {
    "a deque": (deque, _appended),
    "an OrderedDict": (lambda: OrderedDict(n=0), lambda k: _counted(k, "n")),
    "an array": (lambda: np.zeros(2), lambda k: _counted(k, 0)),
    "a bytearray": (lambda: bytearray(2), lambda k: _counted(k, 0)),
    "an object with slots": (Slots, _counted_slot),
    "an object that is called": (Counted, lambda k: k()),
    "a list in containers": (lambda: {"a": [[([],)]]}, lambda k: _appended(k["a"][0][0][0])),
    "an iterator": (lambda: itertools.count(1), next),
    "random numbers of its own": (lambda: random.Random(3), lambda k: k.random()),
    "numpy's random numbers of its own": (lambda: np.random.default_rng(3), lambda k: k.random()),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_a_forward_writes_is_written_at_each_step(name: str) -> None:
    kept, find = WRITES[name]
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    assert_same_training(_double(Keeps(kept(), find)), x, steps=4)


class Defaults(_Base):
    """Finds in its class what it does not have itself."""

    power = 1.0

    def act(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.trunk(x)) * self.power


class OfClass(Defaults):
    pass


@pytest.mark.parametrize("change", [("power", 2.0), ("act", F.silu)], ids=["number", "method"])
def test_an_instance_may_hide_what_its_class_has(change: tuple[str, Any]) -> None:
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    assert_same_training(_double(Defaults()), x, steps=3, between=lambda m, step: setattr(m, *change) if step == 0 else None)


def test_a_class_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _double(OfClass()), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    rewritten = restructured_copy(model)
    for value in (1.0, 2.0, 5.0):
        monkeypatch.setattr(Defaults, "power", value)
        found, expected = (training_step(m, x)["output/0"] for m in (rewritten, model))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


FACTOR = 1.0


def _factor() -> float:
    return FACTOR


class ReadsGlobals(_Base):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        factors = [FACTOR if self.how == "directly" else _factor() for _ in range(2)]
        return self.trunk(x) * sum(factors)


def _enclosed() -> tuple[nn.Module, Callable[[float], None]]:
    factor = 1.0

    class Encloses(_Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.trunk(x) * factor

    def change(value: float) -> None:
        nonlocal factor
        factor = value

    return Encloses(), change


@pytest.mark.parametrize("how", ["directly", "by a function", "enclosed"])
def test_a_variable_outside_of_the_model_may_change(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, change = _enclosed() if how == "enclosed" else (ReadsGlobals(how), lambda v: monkeypatch.setitem(globals(), "FACTOR", v))
    model, x = _double(model), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    rewritten = restructured_copy(model)
    for value in (1.0, 2.0, 5.0):
        change(value)
        found, expected = (training_step(m, x)["output/0"] for m in (rewritten, model))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


class Tied(_Base):
    """Uses a weight twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(6, 6, 3, padding=1)
        self.head.weight = self.conv2.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.trunk(x)))


def _untie(m: Any) -> None:
    m.head.weight = nn.Parameter(m.head.weight.detach() * 2)


def _assign(m: Any) -> None:
    m.load_state_dict({name: value.clone() for name, value in m.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [_untie, _assign], ids=["replaced", "loaded"])
def test_tied_weights_that_no_longer_are(change: Any) -> None:
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    assert_same_training(_double(Tied()), x, steps=3, between=lambda m, step: change(m) if step == 0 else None)


def test_names_of_children_may_be_exchanged() -> None:
    class Chooses(_Base):
        def __init__(self) -> None:
            super().__init__()
            self.ways = nn.ModuleDict({"a": nn.ReLU(), "b": nn.SiLU()})

        def forward(self, x: Tensor) -> Tensor:
            return self.ways["a"](self.trunk(x))

    def exchange(m: Any, step: int) -> None:
        a, b = m.ways["a"], m.ways["b"]
        m.ways.clear()
        m.ways.update([("b", a), ("a", b)])

    assert_same_training(_double(Chooses()), torch.randn(4, 3, 8, 8, dtype=torch.float64), steps=3, between=exchange)


class Deleted(_Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x)


def test_a_bias_that_is_an_attribute_from_now_on() -> None:
    model = restructured_copy(_double(Deleted()))
    plain, x = copy.deepcopy(model), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    training_step(model, x)
    for m in (model, plain):
        del m.conv2.bias
        m.conv2.bias = None
    assert model(x).shape == plain(x).shape


class _Configuration:
    def __init__(self) -> None:
        self.factor = 2.0


class ReadsAProxy(nn.Module):
    """A weak proxy of a configuration that is there, and one of a configuration that is gone."""

    def __init__(self, configuration: _Configuration, reads_the_dead: bool = False) -> None:
        super().__init__()
        self.part, self.reads_the_dead = stem(4), reads_the_dead
        self.__dict__["configuration"] = weakref.proxy(configuration)  # of a dead one PyTorch's own setattr raises
        self.__dict__["dead"] = weakref.proxy(_Configuration())

    def forward(self, x: Tensor) -> Tensor:
        if self.reads_the_dead:
            self.dead  # noqa: B018
        return self.part(x) * self.configuration.factor


@pytest.mark.parametrize("reads_the_dead", [False, True])
def test_weak_proxies(reads_the_dead: bool) -> None:
    """What is behind one is compared, as if nothing were between."""
    configuration = _Configuration()
    model = ReadsAProxy(configuration, reads_the_dead).double()
    rewritten = ReadsAProxy(configuration, reads_the_dead).double()
    rewritten.load_state_dict(model.state_dict())
    bnrestructure.restructure(rewritten, backend="reference")
    for factor in (2.0, 2.0, 3.0, 3.0):
        configuration.factor = factor
        x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
        assert_same_values(training_step(rewritten, x), training_step(model, x))
    region = region_of(rewritten)
    assert region is not None
    assert (region.ran.captures, region.ran.calls) == (2, 4)
