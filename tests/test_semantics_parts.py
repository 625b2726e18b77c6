"""Parts of models that are called by themselves, read values, are of their own making, or write to their modules."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from equivalence import assert_same_training
from stems import built, stem
from torch import Tensor, nn

import bnrestructure


class BypassesItsBackbone(nn.Module):
    """A forward that cannot be followed whole, and that calls the parts of its backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(stem(), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.backbone[0](x)
        if y.mean() > 1e9:
            y = y / 2
        return self.backbone[1](y)


def test_parts_that_are_called_by_somebody_else_run_rewritten() -> None:
    model, x = built(BypassesItsBackbone), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    rewritten = assert_same_training(model, x, steps=2)
    plan = bnrestructure.explain(rewritten)
    assert {site.name: site.ran for site in plan.sites} == {"backbone.0.1": True, "backbone.1.0": True}
    assert plan.captures["backbone.0"] == plan.captures["backbone.1"] == 1
    assert any("values of a tensor" in note for note in plan.notes)


def test_a_layer_of_its_own_making_is_left_to_the_model() -> None:
    """Layers that are no submodules: without parameters they are followed, with parameters the module runs as it was."""

    class Makes(nn.Module):
        def __init__(self, layer: type[nn.Module]) -> None:
            super().__init__()
            self.stem, self.norm, self._kind = stem(), nn.BatchNorm2d(4), layer

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self._kind()(self.stem(x)))

    class Conv(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(4, 4, 1, dtype=torch.float64, device="meta")
            self.weight, self.bias = nn.Parameter(torch.eye(4, dtype=torch.float64).view(4, 4, 1, 1)), None

    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for kind, captured in ((nn.ReLU, True), (Conv, False)):
        torch.manual_seed(0)
        rewritten = assert_same_training(Makes(kind).double(), x)
        assert all(site.ran is captured for site in bnrestructure.explain(rewritten).sites if site.name == "norm")


def test_a_capture_writes_to_no_buffer_and_no_attribute() -> None:
    """Of layers that it runs to see what they return: compiled, opaque, recurrent, and PyTorch's own."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.calls, self.seen = nn.BatchNorm2d(4, momentum=None), 0, torch.zeros(())

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen += 1
            return self.norm(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    model = nn.Sequential(stem(), Counts(), script, nn.Dropout(0.3))
    state = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    bnrestructure.explain(model, torch.randn(2, 3, 6, 6))
    torch.set_rng_state(random_state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert (model[1].calls, float(model[1].seen)) == (0, 0.0)


class ByValue(nn.Module):
    """Runs its layers as often as the values say; ``kind`` is what it returns beyond a limit that random numbers do not reach."""

    def __init__(self, kind: str = "tensor") -> None:
        super().__init__()
        self.layers, self.kind = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)), kind

    def forward(self, x: Tensor) -> Any:
        for _ in range(3):
            if x.abs().mean() > 0.6:
                break
            x = x + self.layers(x)
        return (x,) if self.kind == "tuple" and x.abs().mean() > 100 else x[: 1 + int(x.min() > 0)] if self.kind == "size" else x


class AroundValues(nn.Module):
    def __init__(self, kind: str = "tensor", decides: bool = False) -> None:
        super().__init__()
        self.stem, self.part, self.last, self.decides = stem(), ByValue(kind), stem(kind=nn.Conv2d), decides
        self.between = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(self.stem(x))
        y = y[0] if isinstance(y, tuple) else y
        return self.last(self.between(y)) * (2 if self.decides and y.shape[0] > 1 else 1)


def test_around_a_part_that_reads_values() -> None:
    """Only that part stays a call; its own layers run rewritten."""
    rewritten = assert_same_training(built(AroundValues), torch.randn(3, 3, 6, 6, dtype=torch.float64), steps=3)
    plan = bnrestructure.explain(rewritten)
    assert plan.counts == {"fused": 3, "partial": 0, "kept": 0}
    assert all(site.ran for site in plan.sites)
    assert plan.captures["the whole model"] == 1


def test_sizes_that_follow_from_values_decide_nothing() -> None:
    torch.manual_seed(0)
    model = AroundValues("size", decides=True).double()
    rewritten = assert_same_training(model, torch.randn(3, 3, 6, 6, dtype=torch.float64), steps=2)
    plan = bnrestructure.explain(rewritten)
    assert any("decides by sizes that may follow from values (part reads some)" in note for note in plan.notes)
    assert plan.counts["kept"] == 0


def test_a_result_of_another_kind_than_was_captured_is_an_error_that_says_so() -> None:
    torch.manual_seed(0)
    model = bnrestructure.restructure(AroundValues("tuple").double(), backend="reference")
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    model(x)
    with torch.no_grad():
        model.stem[3].bias.fill_(1e6)
    with pytest.raises(RuntimeError, match="part returned a tuple, and something else when the model was captured"):
        model(x)


class WritesAtFirst(nn.Module):
    """Settles at its first call what kind of problem it has; with ``always`` it counts its calls."""

    def __init__(self, always: bool = False) -> None:
        super().__init__()
        self.stem, self.always, self.calls, self.kind = stem(), always, 0, ""

    def forward(self, x: Tensor) -> Tensor:
        if not self.kind:
            self.kind = "regression"
        if self.always:
            self.calls += 1
        return self.stem(x) * (2 if self.kind == "regression" else 3)


@pytest.mark.parametrize("always", [False, True])
def test_what_only_the_first_call_writes_is_no_reason_afterwards(always: bool) -> None:
    torch.manual_seed(0)
    rewritten = assert_same_training(WritesAtFirst(always).double(), torch.randn(2, 3, 6, 6, dtype=torch.float64), steps=5)
    plan = bnrestructure.explain(rewritten)
    assert plan.captures["the whole model"] == 2
    assert ("the whole model" in plan.regions) is not always
    assert all(site.ran for site in plan.sites)
    assert any("writes the attribute" in note for note in plan.notes)


class ListOfParts(nn.Module):
    """Asks a value, and calls the parts that it keeps in lists and dicts by turns."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.named = nn.ModuleList([stem(), stem()]), nn.ModuleDict({"last": stem()})

    def forward(self, x: Tensor) -> Tensor:
        which = int(x.sum() > 0)
        return self.parts[which](x) + self.named["last"](x)


def test_a_plan_knows_the_parts_in_lists_of_a_model_that_is_not_followed() -> None:
    plan = bnrestructure.explain(built(ListOfParts), backend="reference")
    assert plan.counts == {"fused": 3, "partial": 0, "kept": 0}
    assert plan.regions == ["parts.0", "parts.1", "named.last"]
