"""Variables around a model whose names no code spells, or that are behind other objects: the next step sees what changed in them."""

from __future__ import annotations

import array
import ctypes
import inspect
import multiprocessing
import operator
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from equivalence import assert_same_training
from test_semantics_contents import Keeps, Numbers
from test_semantics_tracing import _double
from torch import nn

from bnrestructure.capture.spelt_names import spelt_names

POWER = "".join(("pow", "er"))


class Configuration:
    def __init__(self) -> None:
        self.power = 1.0

    def by(self, name: str) -> Any:
        return getattr(self, name)

    def __getitem__(self, name: str) -> Any:
        return self.__dict__[name]


class Class:
    power = 1.0


CONFIGURATION = Configuration()
NESTED = SimpleNamespace(inner=Configuration())
KINDRED = Numbers([1.0])
ORDERED = OrderedDict(a=1)
PARAMETER = nn.Parameter(torch.ones(2))
OPTIMIZER = torch.optim.SGD([PARAMETER], lr=1.0)
SCHEDULER = torch.optim.lr_scheduler.LambdaLR(OPTIMIZER, lambda step: 1.0)
REFERENCE, PROXY = weakref.ref(CONFIGURATION), weakref.proxy(CONFIGURATION)
BY_VALUE = weakref.WeakValueDictionary(a=CONFIGURATION)
SHARED, SHARED_ARRAY = multiprocessing.Value("d", 1.0), multiprocessing.Array("d", [1.0])
NUMBER, ARRAY, VIEW = ctypes.c_double(1.0), array.array("d", [1.0]), memoryview(bytearray(b"\1"))
FACTOR = 1.0


def _executed() -> float:
    found: dict[str, Any] = {}
    exec("power = CONFIGURATION.power", globals(), found)
    return float(found["power"])


def _set(thing: Any, value: float) -> None:
    thing.power = value


def _set_factor(value: float) -> None:
    globals()["FACTOR"] = value


def _set_rate(value: float) -> None:
    OPTIMIZER.param_groups[0]["lr"] = value


def _set_last_rate(value: float) -> None:
    SCHEDULER._last_lr = [value]


_set_power = partial(_set, CONFIGURATION)
_set_inner = partial(_set, NESTED.inner)
_set_class = partial(_set, Class)

#: (how a forward finds a number outside of its model, how it is set)
READS: dict[str, tuple[Callable[[Any], Any], Callable[[float], None]]] = {
    "vars": (lambda _: vars(CONFIGURATION)[POWER], _set_power),
    "__dict__": (lambda _: CONFIGURATION.__dict__[POWER], _set_power),
    "getattr": (lambda _: getattr(CONFIGURATION, POWER), _set_power),
    "getattr of an expression": (lambda _: getattr(CONFIGURATION, "pow" + POWER[3:]), _set_power),
    "getattr of a joined text": (lambda _: getattr(CONFIGURATION, "pow".join(("", "er"))), _set_power),
    "getattr of a formatted text": (lambda _: getattr(CONFIGURATION, f"{'pow'}er"), _set_power),
    "getattr of an object's own": (lambda _: CONFIGURATION.by(POWER), _set_power),
    "an item that is an attribute": (lambda _: CONFIGURATION[POWER], _set_power),
    "attrgetter": (lambda _: operator.attrgetter("inner.power")(NESTED), _set_inner),
    "methodcaller": (lambda _: operator.methodcaller("by", POWER)(CONFIGURATION), _set_power),
    "getmembers": (lambda _: dict(inspect.getmembers(CONFIGURATION))[POWER], _set_power),
    "eval": (lambda _: eval("CONFIGURATION.power"), _set_power),
    "exec": (lambda _: _executed(), _set_power),
    "globals": (lambda _: globals()["FACTOR"], _set_factor),
    "getattr of a class": (lambda _: getattr(Class, POWER), _set_class),
    "vars of a class": (lambda _: vars(Class)[POWER], _set_class),
    "a weak reference": (lambda _: REFERENCE().power, _set_power),  # type: ignore[union-attr]
    "a weak proxy": (lambda _: PROXY.power, _set_power),
    "a dictionary of weak references": (lambda _: BY_VALUE["a"].power, _set_power),
    "an attribute of a list": (lambda _: KINDRED.power, partial(_set, KINDRED)),  # type: ignore[attr-defined]
    "an attribute of an OrderedDict": (lambda _: ORDERED.power, partial(_set, ORDERED)),  # type: ignore[attr-defined]
    "an attribute of a parameter": (lambda _: PARAMETER.power, partial(_set, PARAMETER)),  # type: ignore[attr-defined]
    "an optimiser's learning rate": (lambda _: OPTIMIZER.param_groups[0]["lr"], _set_rate),
    "a scheduler's learning rate": (lambda _: SCHEDULER.get_last_lr()[0], _set_last_rate),
    "a shared value": (lambda _: SHARED.value, lambda value: setattr(SHARED, "value", value)),
    "a shared array": (lambda _: SHARED_ARRAY[0], lambda value: SHARED_ARRAY.__setitem__(0, value)),
    "a number of ctypes": (lambda _: NUMBER.value, lambda value: setattr(NUMBER, "value", value)),
    "an array": (lambda _: ARRAY[0], lambda value: ARRAY.__setitem__(0, value)),
    "a memoryview": (lambda _: VIEW[0], lambda value: VIEW.__setitem__(0, int(value))),
}  # fmt: skip


@pytest.mark.parametrize("name", READS)
def test_a_change_behind_an_unspelt_name_is_seen(name: str) -> None:
    read, change = READS[name]
    change(1.0)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    assert_same_training(_double(Keeps(None, read)), x, steps=3, between=lambda m, step: change(2.0) if step == 0 else None)


#: (what a module keeps, where its forward finds a number in that)
KEPT: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "a weak reference": (lambda: REFERENCE, lambda kept: kept().power),
    "weak references": (lambda: weakref.WeakSet([CONFIGURATION]), lambda kept: next(iter(kept)).power),
    "an optimiser": (lambda: OPTIMIZER, lambda kept: kept.param_groups[0]["lr"]),
    "a tensor with an attribute": (lambda: PARAMETER, lambda kept: getattr(kept, "power", 1.0)),
    "an array": (lambda: ARRAY, lambda kept: kept[0]),
    "a number of ctypes": (lambda: NUMBER, lambda kept: kept.value),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_change_behind_what_is_kept_is_seen(name: str) -> None:
    kept, find = KEPT[name]

    def change(model: Any, value: float) -> None:
        thing = model.kept
        if name == "an optimiser":
            thing.param_groups[0]["lr"] = value
        elif isinstance(thing, array.array):
            thing[0] = value
        elif isinstance(thing, ctypes.c_double):
            thing.value = value
        elif isinstance(thing, weakref.ref | weakref.WeakSet):
            CONFIGURATION.power = value
        else:
            thing.power = value

    model = Keeps(kept(), find)
    change(model, 1.0)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    assert_same_training(_double(model), x, steps=3, between=lambda m, step: change(m, 2.0) if step == 0 else None)


def _counts(kept: Any) -> float:
    kept.power = getattr(kept, "power", 1.0) + 1.0
    return float(kept.power)


@pytest.mark.parametrize("kept", [Numbers([1.0]), OrderedDict(a=1)], ids=["list", "OrderedDict"])
def test_an_attribute_of_a_container_is_written_at_each_step(kept: Any) -> None:
    assert_same_training(_double(Keeps(kept, _counts)), torch.randn(4, 3, 8, 8, dtype=torch.float64), steps=3)


def _write_array(kept: Any) -> float:
    kept[0] = kept[0] + 1
    return float(kept[0])


@pytest.mark.parametrize("kept", [array.array("d", [1.0]), (ctypes.c_double * 2)(1.0)], ids=["array", "ctypes"])
def test_memory_is_written_at_each_step(kept: Any) -> None:
    assert_same_training(_double(Keeps(kept, _write_array)), torch.randn(4, 3, 8, 8, dtype=torch.float64), steps=3)


@pytest.mark.parametrize(
    ("function", "any_attribute", "any_own"),
    [
        (lambda c: getattr(c, "power", c.other), False, False),
        (lambda c: getattr(c.inner, "power"), False, False),  # noqa: B009  # the very thing
        (lambda c: hasattr(c, "power") and c.power, False, False),
        (lambda self, i: getattr(self, f"layer{i}"), False, True),
        (lambda self, i: getattr(self.inner, f"layer{i}"), True, False),
        (lambda self: self.layer.eval(), False, False),
        (lambda self: self.vars + self.globals, False, False),
        (lambda self: vars(self), False, True),
        (lambda c: vars(c), True, False),
        (lambda c, name: getattr(c, name), True, False),
    ],
)
def test_which_code_puts_names_together(function: Any, any_attribute: bool, any_own: bool) -> None:
    """Where it does, all that it may reach is compared: what spells its names must not count as that."""
    found = spelt_names(function.__code__)
    assert (found.any_attribute, found.any_own) == (any_attribute, any_own)
