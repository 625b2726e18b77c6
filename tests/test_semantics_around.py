"""What is around a forward and its parts: modes, caches, copies, classes; and what a part writes that the forward reads."""

from __future__ import annotations

import copy
import gc
import signal
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from equivalence import assert_same_values, restructured_copy, training_step
from stems import stem
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import bnrestructure
from bnrestructure.capture import tracer
from bnrestructure.capture.swap import region_of


def _x(n: int = 3, side: int = 6) -> Tensor:
    return torch.randn(n, 3, side, side, dtype=torch.float64)


def _same_steps(model: nn.Module, rewritten: nn.Module, steps: int = 3) -> None:
    for step in range(steps):
        x = _x(3 + step)
        assert_same_values(training_step(rewritten, x), training_step(model, x))


class _Body(nn.Module):
    """A stem, a part and a last layer; ``body`` makes of them what it likes."""

    def __init__(self, body: Callable[[Any, Tensor], Any], part: nn.Module | None = None) -> None:
        super().__init__()
        self.stem, self.part, self.last = stem(4), part or stem(4, inputs=4), stem(4, inputs=4)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


class _Gate(nn.Module):
    """Keeps something of each call, where ``keep`` puts it."""

    def __init__(self, keep: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.inner = stem(4, inputs=4)
        self.register_buffer("loss", torch.zeros(()))
        self.store, self.holder, self.count = {"loss": torch.zeros(())}, types.SimpleNamespace(loss=torch.zeros(())), 0
        self.other: Tensor | None = None
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        self.keep(self, y.abs().mean())
        return y


#: What a part keeps for its parent where it is no module's.
KEPT_OUTSIDE: dict[str, Any] = {}


def _count(gate: Any, _: Tensor) -> None:
    gate.count += 1


#: What a part keeps, and how the forward around it reads that.
KEPT: dict[str, tuple[Callable[[Any, Tensor], None], Callable[[Any], Any]]] = {
    "an attribute": (lambda g, v: setattr(g, "other", v), lambda g: g.other),
    "a buffer": (lambda g, v: setattr(g, "loss", v), lambda g: g.loss),
    "an entry": (lambda g, v: g.store.__setitem__("loss", v), lambda g: g.store["loss"]),
    "an object's attribute": (lambda g, v: setattr(g.holder, "loss", v), lambda g: g.holder.loss),
    "a number": (_count, lambda g: float(g.count)),
    "a global's entry": (lambda g, v: KEPT_OUTSIDE.__setitem__("loss", v), lambda g: KEPT_OUTSIDE["loss"]),
    "of its values": (lambda g, v: setattr(g, "count", float(v.detach())), lambda g: g.count),
}


@pytest.mark.parametrize("kept", KEPT)
def test_what_a_part_keeps_is_read_in_the_same_step(kept: str) -> None:
    """The auxiliary loss of a mixture of experts, or of a quantised layer."""
    keep, read = KEPT[kept]
    model = _Body(lambda m, x: m.last(m.part(m.stem(x))) + read(m.part), _Gate(keep)).double()
    rewritten = restructured_copy(model)
    _same_steps(model, rewritten)
    assert region_of(rewritten.stem).ran.calls  # type: ignore[union-attr]  # its parts are rewritten still


def _with_frozen_part(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    m.part[1].eval()
    y = m.part(x)
    m.part[1].train()
    return m.last(y + x)


def test_a_part_that_is_frozen_for_one_call() -> None:
    model = _Body(_with_frozen_part).double()
    _same_steps(model, restructured_copy(model))
    model.part.register_forward_hook(lambda *_: None)
    _same_steps(model, restructured_copy(model))


class _Louder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = stem(4, inputs=4)

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) + 1

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_part_with_a_call_of_its_own(hooked: bool) -> None:
    model = _Body(lambda m, x: m.last(m.part(m.stem(x))), _Louder()).double()
    if hooked:
        model.part.register_forward_hook(lambda *_: None)
    _same_steps(model, restructured_copy(model))


def _with_cache(m: Any, x: Tensor) -> Tensor:
    with parametrize.cached():
        y = m.part(m.stem(x))
        return m.last(F.relu(m.part(y)))


@pytest.mark.parametrize("where", ["in the forward", "around it"])
def test_cached_parametrizations(where: str) -> None:
    """Power iterations are counted by what they leave in a buffer."""
    body = _with_cache if where == "in the forward" else lambda m, x: m.last(F.relu(m.part(m.part(m.stem(x)))))
    model = _Body(body, parametrizations.spectral_norm(nn.Conv2d(4, 4, 3, padding=1))).double()
    rewritten = restructured_copy(model)
    for _ in range(2):
        x = _x()
        found = []
        for m in (rewritten, model):
            if where == "in the forward":
                found.append(training_step(m, x))
            else:
                with parametrize.cached():
                    found.append(training_step(m, x))
        assert_same_values(*found)


def test_hooks_on_what_a_part_saves() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        with torch.autograd.graph.save_on_cpu():
            x = m.part(x)
        return m.last(x)

    model = _Body(body).double()
    rewritten = restructured_copy(model)
    _same_steps(model, rewritten)
    assert any("saves for backward" in note for note in bnrestructure.explain(rewritten).notes)


class _Seen(TorchDispatchMode):
    """What it sees of batch norms and of fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any("Fake" in kind.__name__ for kind in types)
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_models_own_operations() -> None:
    model = _Body(lambda m, x: m.last(m.part(m.stem(x)))).double()
    rewritten, seen = restructured_copy(model), []
    for m in (model, rewritten):
        with _Seen() as mode:
            m(torch.ones(3, 3, 6, 6, dtype=torch.float64))
        seen.append(mode.names)
    assert seen[0] == seen[1]
    assert any("TorchDispatchMode" in note for note in bnrestructure.explain(rewritten).notes)
    _same_steps(model, rewritten)
    assert bnrestructure.explain(rewritten).captures["the whole model"] == 1


class _Grid(nn.Module):
    """Keeps in its first call what later ones read."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.grid = stem(4), None

    def forward(self, x: Tensor) -> Tensor:
        if self.grid is None:
            self.grid = torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)
        return self.inner(x) * self.grid


def test_a_checkpoint_recomputes_what_ran() -> None:
    model = bnrestructure.restructure(_Grid().double(), backend="reference")
    for _ in range(3):
        checkpoint(model, _x().requires_grad_(), use_reentrant=False).sum().backward()
    assert region_of(model).ran.calls  # type: ignore[union-attr]


def test_a_module_made_of_anothers_attributes() -> None:
    """As meta-learning clones modules: what is changed on the clone is the clone's."""

    def clone(module: nn.Module) -> nn.Module:
        made = object.__new__(type(module))
        made.__dict__.update(module.__dict__)
        made._parameters = {k: None if p is None else p.clone() for k, p in module._parameters.items()}
        made._buffers = {k: None if b is None else b.clone() for k, b in module._buffers.items()}
        made._modules = {k: None if m is None else clone(m) for k, m in module._modules.items()}
        return made

    model = _Body(lambda m, x: m.last(m.part(m.stem(x)))).double()
    rewritten = restructured_copy(model)
    _same_steps(model, rewritten, 1)
    clones = []
    for m in (model, rewritten):
        made: Any = clone(m)
        made.part[1].eval()
        made.last[1].eps = 0.5
        clones.append(made)
    x = _x()
    torch.testing.assert_close(clones[1](x), clones[0](x), rtol=1e-10, atol=1e-10)
    _same_steps(model, rewritten, 1)


class _Once(type):
    """A metaclass that registers each name once."""

    known: ClassVar[dict[str, type]] = {}

    def __new__(cls, name: str, bases: Any, members: Any, *, key: str) -> Any:
        assert key not in cls.known, f"{key} is registered twice"
        made = super().__new__(cls, name, bases, members)
        cls.known[key] = made
        return made

    def __init__(cls, name: str, bases: Any, members: Any, *, key: str) -> None:
        super().__init__(name, bases, members)


def test_a_metaclass_hears_nothing_of_generated_classes() -> None:
    class Registered(_Body, metaclass=_Once, key="registered"):
        pass

    model = Registered(lambda m, x: m.last(m.part(m.stem(x)))).double()
    rewritten = restructured_copy(model)
    assert _Once.known["registered"] is Registered
    assert isinstance(rewritten, Registered)
    _same_steps(model, rewritten)


@pytest.mark.parametrize("how", ["torch.compile", "compile()"])
def test_a_part_that_is_compiled(how: str) -> None:
    model = _Body(lambda m, x: m.last(m.part(m.stem(x)))).double()
    rewritten = restructured_copy(model)
    if how == "compile()":
        rewritten.part.compile(backend="eager")
    else:
        rewritten.part = torch.compile(rewritten.part, backend="eager")  # type: ignore[assignment]
    for step in range(2):
        x = _x(3 + step)
        torch.testing.assert_close(rewritten(x), model(x), rtol=1e-10, atol=1e-10)
    assert "it is compiled" not in str(bnrestructure.explain(rewritten).reasons) or region_of(rewritten).ran.calls  # type: ignore[union-attr]


def test_inference_mode_is_no_training() -> None:
    model = _Body(lambda m, x: m.last(m.part(m.stem(x)))).double()
    rewritten = restructured_copy(model)
    x = _x()
    with torch.inference_mode():
        assert torch.equal(rewritten(x), model(x))
    _same_steps(model, rewritten)
    assert not region_of(rewritten).refusals  # type: ignore[union-attr]


def test_attributes_of_tensors() -> None:
    """Of one that is given they decide; one that is put on a result is there."""

    def body(m: Any, x: Tensor) -> Tensor:
        y: Any = (m.part if getattr(x, "domain", "a") == "a" else m.last)(m.stem(x))
        return y

    def marking(m: Any, x: Tensor) -> Tensor:
        y: Any = body(m, x)
        y.total = y.sum()
        return y

    for one in (body, marking):
        model = _Body(one).double()
        rewritten = restructured_copy(model)
        for domain in ("a", "b", "a"):
            x: Any = _x()
            x.domain = domain
            ours, eager = rewritten(x), model(x)
            torch.testing.assert_close(ours, eager, rtol=1e-10, atol=1e-10)
            assert hasattr(ours, "total") == hasattr(eager, "total")
    x.domain = model
    torch.testing.assert_close(rewritten(x), model(x), rtol=1e-10, atol=1e-10)


class _Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = stem(4)

    def forward(self, x: Tensor, alpha: float) -> Tensor:
        return self.stem(x) * alpha


def test_a_constant_that_is_another_one_in_each_call() -> None:
    """It costs some captures, and a warning, and no more."""
    model = _Weighted().double()
    rewritten = restructured_copy(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(12):
            x = _x()
            torch.testing.assert_close(rewritten(x, 0.1 * step), model(x, 0.1 * step), rtol=1e-10, atol=1e-10)
    assert ["for the 3rd time because of a constant among its arguments" in str(one.message) for one in said].count(True) == 1
    plan = bnrestructure.explain(rewritten)
    assert plan.captures["the whole model"] == 9
    assert any("a constant among its arguments is another one in each call" in note for note in plan.notes)


def test_a_few_constants_have_a_program_each() -> None:
    model = _Weighted().double()
    rewritten = restructured_copy(model)
    for step in range(30):
        x = _x()
        torch.testing.assert_close(rewritten(x, step % 3), model(x, step % 3), rtol=1e-10, atol=1e-10)
    assert bnrestructure.explain(rewritten).captures["the whole model"] == 3
    assert not region_of(rewritten).refusals  # type: ignore[union-attr]


def test_a_module_with_two_names_is_counted_once() -> None:
    model = _Body(lambda m, x: m.last(m.encoder(x)) if bool(x.sum() < 1e9) else x)
    model.encoder = nn.Sequential(model.stem, nn.Conv2d(4, 4, 1))
    assert len(bnrestructure.explain(model).sites) == 3
    rewritten: Any = bnrestructure.restructure(model)
    rewritten(torch.randn(3, 3, 6, 6))
    found = {site.name: site.ran for site in bnrestructure.explain(rewritten).sites}
    assert found == {"encoder.0.1": True, "last.1": True, "part.1": False}


def test_a_restructured_model_is_freed_with_its_last_reference() -> None:
    gc.disable()
    try:
        model = bnrestructure.restructure(_Body(lambda m, x: m.last(m.part(m.stem(x)))))
        known = weakref.ref(model)
        del model
        assert known() is None
    finally:
        gc.enable()


def test_copies_have_programs_of_their_own() -> None:
    model = bnrestructure.restructure(_Body(lambda m, x: m.last(m.part(m.stem(x)))).double(), backend="reference")
    model(_x())
    shallow = copy.copy(model)
    shallow(_x())
    assert region_of(shallow) is not region_of(model)


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, as in a program that pytest does not run."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_an_interrupt_waits_until_pytorch_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes when a capture has drawn random numbers, and is about to put them back."""
    model = _Body(lambda m, x: m.last(m.part(m.stem(x)))).double()
    rewritten = restructured_copy(model)
    put_back, x = tracer._set_random_state, _x()

    def interrupted(state: Any) -> None:
        torch.rand(3)
        signal.raise_signal(signal.SIGINT)
        put_back(state)

    monkeypatch.setattr(tracer, "_set_random_state", interrupted)
    before = torch.get_rng_state(), nn.Module.__call__, torch.autograd.Function.apply
    with pytest.raises(KeyboardInterrupt):
        rewritten(x)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (nn.Module.__call__, torch.autograd.Function.apply) == before[1:]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    _same_steps(model, rewritten)


@pytest.mark.usefixtures("_interruptible")
def test_a_second_interrupt_ends_a_forward_that_does_not_end(tmp_path: Path) -> None:
    presses = tmp_path / "presses"  # a list would be put back

    def endless(m: Any, x: Tensor) -> Tensor:
        for _ in range(1000):
            signal.raise_signal(signal.SIGINT)
            presses.open("a").write("once ")
        return m.last(m.stem(x))

    with pytest.raises(KeyboardInterrupt):
        restructured_copy(_Body(endless).double())(_x())
    assert presses.read_text() == "once "


class _Guard(nn.Module):
    """Reads values, and returns one thing for small ones and another for large ones."""

    def __init__(self, small: Callable[[Tensor], Any], large: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.small, self.large, self.norm = small, large, nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Any:
        return self.small(x) if float(x.detach().abs().max()) < 1e3 else self.large(x)


@pytest.mark.parametrize("handed", [lambda x: x, lambda x: x.view(x.shape), lambda x: x[:]], ids=["itself", "a view", "a slice"])
@pytest.mark.parametrize("edit", [lambda y: F.relu(y, inplace=True), lambda y: y.mul_(2)], ids=["relu", "mul_"])
def test_what_a_part_hands_on_and_somebody_changes_in_place(edit: Callable[[Tensor], Tensor], handed: Callable[[Tensor], Tensor]) -> None:
    """A tensor that others read, too."""

    def body(m: Any, x: Tensor) -> Tensor:
        z = m.part.norm(m.stem(x))
        y = edit(m.part(z))
        return m.last(z) + y

    model = _Body(body, _Guard(handed, torch.nan_to_num)).double()
    _same_steps(model, restructured_copy(model))


@pytest.mark.parametrize("small", [lambda x: None, lambda x: (x, None), lambda x: [x]], ids=["nothing", "a tuple", "a list"])
def test_a_part_that_returns_something_else_than_when_it_was_captured(small: Callable[[Tensor], Any]) -> None:
    """An error that says so, whatever it is."""

    def body(m: Any, x: Tensor) -> Tensor:
        y = m.part(x)
        return m.last(m.stem(x)) + (0 if y is None else y[0].sum())

    model = restructured_copy(_Body(body, _Guard(small, lambda x: x)).double())
    model(_x())
    with pytest.raises(RuntimeError, match="part returned a tensor of 4 dimensions in float64, and something else when"):
        model(_x() * 1e4)


class _Calls(nn.Module):
    """Reads values, and tells somebody of them: ``call``, which a copy of it shares with it, or the one that holds it."""

    call: Callable[[float], Any]

    def forward(self, x: Tensor) -> Tensor:
        mean = float(x.detach().mean())
        self.call(mean)
        for owner in vars(self).get("owners", ()):
            owner.mean = mean
        return x * (2 if mean > 0 else 3)


def _adds(m: Any) -> None:
    m.part.call = lambda v: m.last[1].running_mean.add_(v)


def _scales(m: Any) -> None:
    def scale(v: float) -> None:
        m.last[0].weight.data.mul_(1 + v)

    m.part.call = scale


def _appends(m: Any) -> None:
    m.part.call = m.notes.append


def _sets(m: Any) -> None:
    m.part.call, m.part.owners = (lambda v: None), [m]


@pytest.mark.parametrize("connect", [_adds, _scales, _appends, _sets])
def test_a_part_that_reaches_for_its_parent(connect: Callable[[Any], None]) -> None:
    """It runs once more while its parent is captured, on random numbers. Nothing stays of that, what it writes later is read at once."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        model = _Body(lambda m, x: m.last(m.part(m.stem(x))) + sum(m.notes[-1:]) + m.mean, _Calls()).double()
        model.notes, model.mean = [], 0.0  # type: ignore[assignment]
        connect(model)
        return model

    model, rewritten = made(), bnrestructure.restructure(made(), backend="reference")  # a copy's part would call the original's
    _same_steps(model, rewritten)
