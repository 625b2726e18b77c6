"""What hooks on the layers of a backbone store, and a wrapper reads: features of this step, however they get from the one to the other."""

from __future__ import annotations

import functools
import types
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from equivalence import assert_same_values, restructured_copy, training_step
from stems import stem
from torch import Tensor, nn

import bnrestructure
from bnrestructure.capture.swap import region_of

Hook = Callable[[nn.Module, Any, Tensor], None]

FOUND: dict[str, Any] = {}
LATEST: Any = None


class Wrapper(nn.Module):
    """Two parts, the first with a hook; ``found`` gives what the hook has stored."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b = stem(4), stem(4, inputs=4)
        self.features: dict[str, Tensor] = {}
        self.list: list[Tensor] = []
        self.latest: Any = None
        hook, self.found = STORES[kind](self)
        self.a.register_forward_hook(hook)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        return y + self.found(self)

    def store(self, _: Any, given: Any, result: Tensor) -> None:
        self.features["a"] = result

    def store_by_another(self, module: nn.Module, given: Any, result: Tensor) -> None:
        self.keep(result)

    def keep(self, result: Tensor) -> None:
        self.latest = result


class Collector:
    """An object with a hook of its own, as many tutorials have it."""

    of_class: ClassVar[Any] = None

    def __init__(self) -> None:
        self.result: Any = None
        self.inner = types.SimpleNamespace(results={})

    def hook(self, _: Any, given: Any, result: Tensor) -> None:
        self.result = result

    def hook_inside(self, _: Any, given: Any, result: Tensor) -> None:
        self.inner.results["a"] = result

    def hook_of_class(self, _: Any, given: Any, result: Tensor) -> None:
        Collector.of_class = result


class CallableHook:
    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __call__(self, _: Any, given: Any, result: Tensor) -> None:
        self.owner.latest = result


class SlottedHook:
    __slots__ = ("owner",)

    def __call__(self, _: Any, given: Any, result: Tensor) -> None:
        self.owner.latest = result


def _collected(method: str) -> Callable[[Wrapper], tuple[Hook, Callable[[Any], Any]]]:
    def made(m: Wrapper) -> tuple[Hook, Callable[[Any], Any]]:
        m.collector = Collector()  # type: ignore[assignment]
        read = {
            "hook": lambda m: m.collector.result, "hook_inside": lambda m: m.collector.inner.results["a"],
            "hook_of_class": lambda m: m.collector.of_class,
        }  # fmt: skip
        return getattr(m.collector, method), read[method]

    return made


def _slotted(m: Wrapper) -> tuple[Hook, Callable[[Any], Any]]:
    hook = SlottedHook()
    hook.owner = m  # type: ignore[attr-defined]
    return hook, lambda m: m.latest


def _through_a_helper(m: Wrapper) -> tuple[Hook, Callable[[Any], Any]]:
    def helper(result: Tensor) -> None:
        m.latest = result

    return lambda _, given, result: helper(result), lambda m: m.latest


def _nonlocal(m: Wrapper) -> tuple[Hook, Callable[[Any], Any]]:
    latest: Any = None

    def hook(_: Any, given: Any, result: Tensor) -> None:
        nonlocal latest
        latest = result

    return hook, lambda m: latest


def _store_globally(_: Any, given: Any, result: Tensor) -> None:
    global LATEST
    LATEST = result


def _store_in_a_global(_: Any, given: Any, result: Tensor) -> None:
    FOUND["b"] = result


class _Results(dict[str, Any]):
    """A container with an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Any] = []


def _behind_a_container(m: Wrapper) -> tuple[Hook, Callable[[Any], Any]]:
    results = _Results()
    m.all = results.all
    return lambda _, given, result: results.all.append(result), lambda m: m.all[-1]


def _to(store: dict[str, Any], _: Any, given: Any, result: Tensor) -> None:
    store["a"] = result


def _by_weak_reference(m: Wrapper) -> tuple[Hook, Callable[[Any], Any]]:
    reference = weakref.ref(m)

    def hook(_: Any, given: Any, result: Tensor) -> None:
        reference().latest = result  # type: ignore[union-attr]

    return hook, lambda m: m.latest


def _beside_a_dead_reference(m: Wrapper) -> tuple[Hook, Callable[[Any], Any]]:
    """One that raises whatever it is asked."""
    dead = weakref.proxy(Collector())
    m.__dict__["dead"] = dead
    return lambda _, given, result: setattr(m, "latest", (result, lambda: (dead, m.dead))[0]), lambda m: m.latest


def _of_a_function(m: Wrapper) -> tuple[Hook, Callable[[Any], Any]]:
    def hook(_: Any, given: Any, result: Tensor) -> None:
        hook.latest = result  # type: ignore[attr-defined]

    return hook, lambda m: hook.latest  # type: ignore[attr-defined]


def _in_a_queue(m: Wrapper) -> tuple[Hook, Callable[[Any], Any]]:
    m.queue = deque(maxlen=1)  # type: ignore[assignment]
    return lambda _, given, result: m.queue.append(result), lambda m: m.queue[0]


def _container(m: Wrapper) -> tuple[Hook, Callable[[Any], Any]]:
    features = m.features
    return lambda _, given, result: features.__setitem__("a", result), lambda m: m.features["a"]


#: Of a wrapper: its hook, and how its forward finds what that stored.
STORES: dict[str, Callable[[Wrapper], tuple[Hook, Callable[[Any], Any]]]] = {
    "a closure": lambda m: (lambda _, given, result: m.features.__setitem__("a", result), lambda m: m.features["a"]),
    "a container": _container,
    "a method": lambda m: (m.store, lambda m: m.features["a"]),
    "a method that calls another one": lambda m: (m.store_by_another, lambda m: m.latest),
    "setattr": lambda m: (lambda _, given, result: setattr(m, "latest", result), lambda m: m.latest),
    "the dict of attributes": lambda m: (lambda _, given, result: m.__dict__.update(latest=result), lambda m: m.latest),
    "an attribute of the hooked part": lambda m: (lambda part, given, result: setattr(part, "kept", result), lambda m: m.a.kept),
    "a partial function": lambda m: (functools.partial(_to, m.features), lambda m: m.features["a"]),
    "an object that is called": lambda m: (CallableHook(m), lambda m: m.latest),
    "an object with slots": _slotted,
    "a collector": _collected("hook"),
    "an object in a collector": _collected("hook_inside"),
    "a class": _collected("hook_of_class"),
    "a helper": _through_a_helper,
    "a variable of the function around": _nonlocal,
    "a global container": lambda m: (functools.partial(_to, FOUND), lambda m: FOUND["a"]),
    "a global container by name": lambda m: (_store_in_a_global, lambda m: FOUND["b"]),
    "an attribute of a container": _behind_a_container,
    "a global variable": lambda m: (_store_globally, lambda m: LATEST),
    "a weak reference": _by_weak_reference,
    "an attribute of the hook": _of_a_function,
    "a queue": _in_a_queue,
    "beside a dead reference": _beside_a_dead_reference,
}


def _same_steps(model: nn.Module, rewritten: nn.Module, steps: int = 3) -> None:
    """All of one size: features of the step before would fit."""
    for _ in range(steps):
        x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
        assert_same_values(training_step(rewritten, x), training_step(model, x))


def _wrapped(kind: str) -> tuple[nn.Module, nn.Module]:
    """A wrapper and its restructured twin. No copy of the first: a copy's hooks would write to the original."""
    torch.manual_seed(0)
    model = Wrapper(kind).double()
    torch.manual_seed(0)
    return model, bnrestructure.restructure(Wrapper(kind).double(), backend="reference")


@pytest.mark.parametrize("kind", STORES)
def test_what_hooks_store_is_read_in_the_same_step(kind: str) -> None:
    model, rewritten = _wrapped(kind)
    _same_steps(model, rewritten)
    whole, part = region_of(rewritten), region_of(rewritten.b)  # type: ignore[arg-type]
    assert whole is not None
    assert part is not None
    assert "which a hook may write" in whole.refusals[-1]
    assert part.ran.calls == 3


class _Watched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = stem(4), stem(4, inputs=4)
        self.scale, self.calls, self.seen = 2.0, 0, []

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) * self.scale

    def count(self, *_: Any) -> None:
        self.calls += 1
        self.seen.append(self.calls)


def _watching(m: Any) -> None:
    m.a.register_forward_hook(m.count)


def _printing(m: Any) -> None:
    shapes: list[Any] = []
    m.a.register_forward_hook(lambda _, given, result: shapes.append(result.shape))


@pytest.mark.parametrize("put", [_watching, _printing])
def test_hooks_that_store_nothing_that_is_read_leave_the_model_whole(put: Callable[[Any], None]) -> None:
    model = _Watched().double()
    rewritten = restructured_copy(model)
    for m in (model, rewritten):
        put(m)
    _same_steps(model, rewritten)
    region = region_of(rewritten)
    assert region is not None
    assert (region.ran.calls, region.ran.captures) == (3, 1)


def test_a_hook_that_is_put_beside_another_one() -> None:
    """Between two steps: what it writes is read, so the program does not hold any more."""
    model = _Watched().double()
    rewritten = restructured_copy(model)
    for m in (model, rewritten):
        _printing(m)
    _same_steps(model, rewritten, 1)
    for m in (model, rewritten):
        m.a.register_forward_hook(lambda _, given, result, m=m: setattr(m, "scale", float(result.detach().mean())))
    _same_steps(model, rewritten)
    region = region_of(rewritten)
    assert region is not None
    assert "'scale', which a hook may write" in region.refusals[-1]
    _printing(rewritten)  # a harmless one changes nothing
    captures = region.ran.captures
    _same_steps(model, rewritten, 1)
    assert region.ran.captures == captures


class _Shared(nn.Module):
    """A normalised tensor that two layers read, the first with hooks; ``forward`` may be another one."""

    def __init__(self, prepare: Callable[[Any], None], body: Callable[[Any, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.conv, self.bn, self.seen = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), []
        self.hooked, self.other, self.norm = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.inplace, self.body = nn.ReLU(inplace=True), body
        prepare(self)

    def forward(self, x: Tensor) -> Tensor:
        z = self.bn(self.conv(x))
        if self.body is not None:
            return self.body(self, z)
        return self.norm(self.hooked(z)).relu() + self.other(z)


def _before(hook: Callable[..., Any]) -> Callable[[Any], None]:
    return lambda m: m.hooked.register_forward_pre_hook(hook) and None


def _after(hook: Callable[..., Any]) -> Callable[[Any], None]:
    return lambda m: m.hooked.register_forward_hook(hook) and None


def _scaled(_: Any, given: Any) -> None:
    x = given[0].data
    x *= 2


def _set_a_setting(m: Any) -> None:
    def hook(*_: Any) -> None:
        m.norm.eps = m.norm.eps * 4

    m.hooked.register_forward_hook(hook)


def _replace_a_weight(m: Any) -> None:
    m.hooked.register_forward_hook(lambda *_: setattr(m.norm, "weight", nn.Parameter(m.norm.weight.detach() * 2)))


def _freeze_by_turns(m: Any) -> None:
    m.hooked.register_forward_hook(lambda *_: m.norm.train(not m.norm.training) and None)


def _with_hook_inside(m: Any, z: Tensor) -> Tensor:
    with m.hooked.register_forward_hook(lambda _, given, result: result * 2):
        return m.hooked(z) + m.other(z)


def _collecting_inside(m: Any, z: Tensor) -> Tensor:
    seen: list[Tensor] = []
    with m.hooked.register_forward_hook(lambda _, given, result: seen.append(result)):
        y = m.hooked(z)
    return y + sum(seen) + m.other(z)


def _nothing(m: Any) -> None:
    pass


#: Hooks that change what others compute, and forwards that have to do with hooks.
CHANGING: dict[str, tuple[Callable[[Any], None], Callable[[Any, Tensor], Tensor] | None]] = {
    "its input in place": (_before(lambda _, given: (given[0].clamp_(-0.5, 0.5), None)[1]), None),
    "its input by an operator": (_before(_scaled), None),
    "a part of its result": (_after(lambda _, given, result: (result.data[:, 0].zero_(), None)[1]), None),
    "a setting": (_set_a_setting, None),
    "a weight": (_replace_a_weight, None),
    "a training flag": (_freeze_by_turns, None),
    "a hook inside": (_nothing, _with_hook_inside),
    "a collector inside": (_nothing, _collecting_inside),
    "an attribute of the result": (
        _after(lambda _, given, result: setattr(result, "mark", result.mean())),
        lambda m, z: m.hooked(z) * getattr(m.hooked(z), "mark", 0) + m.other(z),
    ),
    "a list's alias": (
        _after(lambda _, given, result, seen=[]: seen.__iadd__([result.mean()]) and None),
        lambda m, z: m.hooked(z) + sum(next(iter(m.hooked._forward_hooks.values())).__defaults__[0][-1:]) + m.other(z),
    ),
    "another size": (
        _after(lambda _, given, result: result[..., ::2, ::2]),
        lambda m, z: (m.hooked(z) if m.hooked(z).shape[-1] == 3 else m.other(z)) * 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGING)
def test_what_hooks_change(name: str) -> None:
    prepare, body = CHANGING[name]
    torch.manual_seed(0)
    model = _Shared(prepare, body).double()
    torch.manual_seed(0)
    rewritten = bnrestructure.restructure(_Shared(prepare, body).double(), backend="reference")
    _same_steps(model, rewritten)


def test_a_hook_that_returns_something_else_is_an_error_that_says_so() -> None:
    model = bnrestructure.restructure(_Shared(_after(lambda _, given, result: result.float())).double(), backend="reference")
    with pytest.raises(RuntimeError, match="hooked returned a tensor of 4 dimensions in float32, and something else when"):
        model(torch.randn(2, 3, 6, 6, dtype=torch.float64))
