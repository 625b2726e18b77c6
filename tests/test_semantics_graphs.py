"""``graphs="auto"``: steps that a device repeats are the steps, or are not repeated; on a tape that stands for a device's graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from device_tape import Entry, Tape
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnrestructure
from bnrestructure.capture import replay
from bnrestructure.core.errors import UsageError
from bnrestructure.kernels import registry

STEPS = 8


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.second, self.other = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.first(x)))
        y = torch.relu(self.other(self.second(y)) + y)
        return self.head(self.drop(y.mean((2, 3))))


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """The recorders that were made; those to come are like the last one, if a test puts one there."""
    made: list[Tape] = []

    def graphs_on(device: torch.device) -> Tape:
        if not made:
            made.append(Tape())
        return made[-1]

    monkeypatch.setattr(replay, "graphs_on", graphs_on)
    return made


def _restructured(model: nn.Module, graphs: str = "auto") -> nn.Module:
    return bnrestructure.restructure(model, backend="reference", graphs=graphs)


def _images(step: int, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(step))


def _train(model: nn.Module, step: Callable[[nn.Module, int], Any] | None = None, steps: int = STEPS) -> list[Tensor]:
    """Everything that a training leaves: outputs, parameters, buffers, the state of the random numbers."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    seen = []
    for i in range(steps):
        optimizer.zero_grad()
        if step is None:
            out = model(_images(i))
            out.square().mean().backward()
        else:
            out = step(model, i)
        seen.append(out)
        optimizer.step()
    return [t.detach() for t in (*seen, *model.parameters(), *model.buffers(), torch.random.get_rng_state())]


def _assert_same(model: nn.Module, step: Callable[[nn.Module, int], Any] | None = None, steps: int = STEPS) -> nn.Module:
    """Training with graphs is, bit for bit, training without; returns the model with them."""
    wanted = _train(_restructured(copy.deepcopy(model), "off"), step, steps)
    graphed = _restructured(copy.deepcopy(model))
    for a, b in zip(_train(graphed, step, steps), wanted, strict=True):
        assert torch.equal(a, b)
    return graphed


def _note(model: nn.Module) -> str:
    return next(note for note in bnrestructure.explain(model).notes if "device graphs" in note)


def test_training_is_the_same_and_python_has_no_part_in_it(tapes: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = registry.run
    monkeypatch.setattr(registry, "run", lambda *given: calls.append(1) or run(*given))  # type: ignore[func-returns-value]
    model = _assert_same(_Net())
    assert _note(model) == "the model: its steps are repeated as device graphs (1 recorded)"
    assert tapes[0].played == 2 * (STEPS - 3), "forward and backward of all steps but those of the warm-up, that of the proof included"
    calls.clear()
    model(_images(0)).sum().backward()
    assert not calls


def test_without_being_asked_nothing_is_recorded(tapes: list[Tape]) -> None:
    model = _restructured(_Net(), "off")
    _train(model)
    assert not tapes
    assert not [note for note in bnrestructure.explain(model).notes if "graphs" in note]


def test_a_device_without_graphs_says_so() -> None:
    model = _restructured(_Net())
    _train(model, steps=2)
    assert _note(model) == "the model: no device graphs: cpu has none"


def test_another_word_than_auto_and_off() -> None:
    model = _Net()
    with pytest.raises(UsageError, match="graphs is 'auto' or 'off', got 'on'"):
        bnrestructure.restructure(model, graphs="on")
    assert type(model) is _Net


def test_under_autocast(tapes: list[Tape]) -> None:
    def step(model: nn.Module, i: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(_images(i))
        out.float().square().mean().backward()
        return out

    _assert_same(_Net(), step)
    assert tapes[0].played


def test_results_are_the_callers(tapes: list[Tape]) -> None:
    """The next step does not overwrite them; nor is an edit in place seen by backward."""

    def step(model: nn.Module, i: int) -> Tensor:
        out = model(_images(i))
        loss = out.square().mean()
        loss.backward()
        out.detach().mul_(2.0)
        return out

    _assert_same(_Net(), step)


def test_two_calls_before_a_backward(tapes: list[Tape]) -> None:
    """The second finds the recording's memory taken, and runs as it is."""

    def step(model: nn.Module, i: int) -> Tensor:
        first, second = model(_images(i)), model(_images(100 + i))
        (first.square().mean() + second.square().mean()).backward()
        return second

    _assert_same(_Net(), step)
    assert tapes[0].played == 2 * (STEPS - 1), "one call of each step but the first: the second of the step after it is the fourth call"


def test_a_result_that_no_backward_follows_gives_the_memory_back(tapes: list[Tape]) -> None:
    def step(model: nn.Module, i: int) -> Tensor:
        model(_images(50 + i))
        out = model(_images(i))
        out.square().mean().backward()
        return out

    _assert_same(_Net(), step)


def test_gradients_accumulate(tapes: list[Tape]) -> None:
    def step(model: nn.Module, i: int) -> Tensor:
        for part in range(3):
            out = model(_images(10 * i + part))
            out.square().mean().backward()
        return out

    _assert_same(_Net(), step)


def test_backward_for_the_second_time_is_an_error(tapes: list[Tape]) -> None:
    model = _restructured(_Net())
    _train(model, steps=6)
    loss = model(_images(0)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward through a device graph for the second time"):
        loss.backward()


def test_an_input_that_needs_a_gradient(tapes: list[Tape]) -> None:
    def step(model: nn.Module, i: int) -> Tensor:
        x = _images(i).requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).square().mean(), x)
        return gradient

    _assert_same(_Net(), step)
    assert tapes[0].played


def test_a_result_without_a_gradient_beside_one_with(tapes: list[Tape]) -> None:
    def step(model: nn.Module, i: int) -> Tensor:
        out, features = model(_images(i))
        assert out.requires_grad
        assert not features.requires_grad
        out.square().mean().backward()
        return torch.cat([out.flatten(), features.flatten()])

    _assert_same(_With(lambda m, x: (_Net.forward(m, x), m.first(x).mean((2, 3)).detach())), step)
    assert tapes[0].played


def test_tied_weights_get_their_gradient_once(tapes: list[Tape]) -> None:
    class Tied(_Net):
        def __init__(self) -> None:
            super().__init__()
            self.third = nn.Conv2d(6, 6, 3, padding=1, bias=False)
            self.third.weight = self.second.weight

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.norm(self.first(x)))
            return self.head(self.third(self.other(self.second(y))).mean((2, 3)))

    _assert_same(Tied())
    assert tapes[0].played


def _frozen_later(model: nn.Module, i: int) -> Tensor:
    model.first.weight.requires_grad_(i < 5)  # type: ignore[union-attr, operator]
    return _plain(model, i)


def _assigned_later(model: nn.Module, i: int) -> Tensor:
    if i == 5:
        state = {name: value.clone() + 0.1 for name, value in model.state_dict().items() if value.is_floating_point()}
        model.load_state_dict(state, strict=False, assign=True)
    return _plain(model, i)


def _another_size(model: nn.Module, i: int) -> Tensor:
    out: Tensor = model(_images(i, batch=2 + i % 2))
    out.square().mean().backward()
    return out


def _without_gradients_between(model: nn.Module, i: int) -> Tensor:
    with torch.no_grad():
        model(_images(30 + i))
    return _plain(model, i)


def _evaluated_between(model: nn.Module, i: int) -> Tensor:
    model.eval()
    seen: Tensor = model(_images(30 + i)).detach()
    model.train()
    _plain(model, i)
    return seen


def _autocast_later(model: nn.Module, i: int) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=i % 3 == 2):
        out: Tensor = model(_images(i))
    out.float().square().mean().backward()
    return out


def _twice_under_autocast(model: nn.Module, i: int) -> Tensor:
    """The second call finds the weights that autocast has cast for the first one."""
    with torch.autocast("cpu", torch.bfloat16):
        for part in range(2):
            out: Tensor = model(_images(2 * i + part))
            out.float().square().mean().backward()
    return out


def _checkpointed(model: nn.Module, i: int) -> Tensor:
    out = checkpoint(model, _images(i), use_reentrant=False)
    out.square().mean().backward()
    return out


def _plain(model: nn.Module, i: int) -> Tensor:
    out: Tensor = model(_images(i))
    out.square().mean().backward()
    return out


LOOPS = [
    _frozen_later, _assigned_later, _another_size, _without_gradients_between, _evaluated_between, _autocast_later, _twice_under_autocast,
    _checkpointed,
]  # fmt: skip


@pytest.mark.parametrize("step", LOOPS)
def test_loops_that_change_something(step: Callable[[nn.Module, int], Tensor], tapes: list[Tape]) -> None:
    _assert_same(_Net(), step, steps=12)


def test_the_plan_tells_of_calls_that_are_not_repeated_beside_those_that_are(tapes: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_RECORDED", 1)
    model = _assert_same(_Net(), _another_size, steps=14)
    said = "its steps are repeated as device graphs (1 recorded); other calls are not: 1 kinds of calls are recorded already"
    assert said in _note(model)


# --- what must not be repeated -----------------------------------------------------------------------------------------


def _without(count: Callable[[list[Entry]], int]) -> Callable[[list[Entry]], list[Entry]]:
    """Leaves one entry out of each recording."""

    def spoil(entries: list[Entry]) -> list[Entry]:
        i = count(entries)
        return entries[:i] + entries[i + 1 :]

    return spoil


def _is_counter(entry: Entry) -> bool:
    return entry[0]._schema.name == "aten::add_" and not entry[1][0].is_floating_point()


def _counter(entries: list[Entry]) -> int:
    return next((i for i, entry in enumerate(entries) if _is_counter(entry)), len(entries))


def _last_of_forward(entries: list[Entry]) -> int:
    return len(entries) - 1 if any(map(_is_counter, entries)) else len(entries)


def _last_of_backward(entries: list[Entry]) -> int:
    return len(entries) if any(map(_is_counter, entries)) else len(entries) - 1


def _draw(entries: list[Entry]) -> int:
    return next((i for i, entry in enumerate(entries) if "bernoulli" in entry[0]._schema.name), len(entries))


FAULTS = [("result", _last_of_forward), ("result", _draw), ("buffer", _counter), ("gradient", _last_of_backward)]


@pytest.mark.parametrize(("what", "left_out"), FAULTS)
def test_a_recording_that_does_something_else_is_never_repeated(
    what: str, left_out: Callable[[list[Entry]], int], tapes: list[Tape]
) -> None:
    tapes.append(Tape(_without(left_out)))
    model = _assert_same(_Net())
    assert _note(model) == f"the model: no device graphs: a repeated step has another {what} than the step itself"
    assert tapes[0].played <= 2, "the step by which it was proved"


def test_a_recording_that_fails_leaves_the_program_as_it_is(tapes: list[Tape]) -> None:
    class Failing(Tape):
        def record(self, work: Callable[[], Any]) -> Any:
            super().record(work)
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    tapes.append(Failing())
    model = _assert_same(_Net())
    assert _note(model) == "the model: no device graphs: operation not permitted when stream is capturing"


class _Counting(nn.Module):
    """A part that only Python can run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2.0

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Tensor:
        return dys[0] * 2.0


class _With(_Net):
    def __init__(self, extra: Callable[[_Net, Tensor], Any], part: nn.Module | None = None) -> None:
        super().__init__()
        self.extra, self.part = extra, part

    def forward(self, x: Tensor) -> Any:
        return self.extra(self, x)


def _shared_result(m: Any, x: Tensor) -> Any:
    y = _Net.forward(m, x)
    return y, y.view(-1)


def _averaging() -> nn.Module:
    model = _Net()
    model.other.momentum = None
    return model


REFUSED = {
    "a cumulative average": (_averaging, "momentum=None"),
    "a part that is called": (lambda: _With(lambda m, x: _Net.forward(m, m.part(x)), _Counting()), "what that does in Python"),
    "a function of the user's": (lambda: _With(lambda m, x: _Net.forward(m, _Function.apply(x))), "what that does in Python"),
    "two results with gradients": (lambda: _With(lambda m, x: (_Net.forward(m, x), m.first(x).sum())), "several of its results"),
    "no result with a gradient": (lambda: _With(lambda m, x: _Net.forward(m, x).argmax(1)), "several of its results, or none"),
    "its input is a result": (lambda: _With(lambda m, x: (_Net.forward(m, x), x)), "share memory"),
    "results that share memory": (lambda: _With(_shared_result), "several of its results"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_recorded(case: str, tapes: list[Tape]) -> None:
    def step(model: nn.Module, i: int) -> Tensor:
        out = model(_images(i))
        first: Tensor = out[0] if isinstance(out, tuple) else out
        if first.requires_grad:
            first.square().mean().backward()
        return first

    build, reason = REFUSED[case]
    model = _assert_same(build(), step)
    notes = [note for note in bnrestructure.explain(model).notes if "no device graphs" in note]
    assert notes
    assert all(reason in note for note in notes)


def test_an_input_that_is_changed_in_place(tapes: list[Tape]) -> None:
    def step(model: nn.Module, i: int) -> Tensor:
        x = _images(i)
        out: Tensor = model(x)
        out.square().mean().backward()
        return torch.cat([x.flatten(), out.flatten()])

    model = _assert_same(_With(lambda m, x: _Net.forward(m, x.mul_(0.5))), step)
    assert _note(model) == "the model: no device graphs: it changes its input in place"
