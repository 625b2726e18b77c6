"""Whatever wants the module itself gets it: exporters, meta and fake tensors, TorchScript; torch.compile says what it cannot do."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from equivalence import assert_same_values, restructured_copy, training_step
from small_models import build, input_for
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import bnrestructure

MODELS = ["residual", *(pytest.param(name, marks=pytest.mark.whole) for name in ("chain", "dense", "squeeze_excite"))]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_export_is_that_of_the_model_itself(name: str, training: bool, strict: bool) -> None:
    model, x = build(name).train(training), input_for(name)
    expected = torch.export.export(copy.deepcopy(model), (x,), strict=strict)
    actual = torch.export.export(restructured_copy(model), (x,), strict=strict)
    assert [str(n.target) for n in actual.graph.nodes] == [str(n.target) for n in expected.graph.nodes]


def test_training_goes_on_after_an_export() -> None:
    model, x = build("residual"), input_for("residual")
    rewritten = restructured_copy(model)
    assert_same_values(training_step(rewritten, x), training_step(model, x))
    torch.export.export(rewritten, (x,))
    assert_same_values(training_step(rewritten, x), training_step(model, x))
    assert bnrestructure.explain(rewritten).captures == {"the whole model": 1}


@pytest.mark.parametrize("name", MODELS)
def test_meta_and_fake_tensors(name: str) -> None:
    model, x = build(name), input_for(name)
    expected = model(x)
    on_meta = restructured_copy(model).to("meta")(x.to("meta"))
    assert on_meta.is_meta
    assert on_meta.shape == expected.shape
    rewritten = restructured_copy(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = rewritten(mode.from_tensor(x))
    assert fake.shape == expected.shape
    made = torch.fx.experimental.proxy_tensor.make_fx(restructured_copy(model))(x)
    assert_same_values({"made": made(x)}, {"made": expected})


def test_no_part_of_a_model_refuses_because_it_was_exported() -> None:
    model, x = build("chain"), input_for("chain")
    rewritten = bnrestructure.restructure(copy.deepcopy(model), backend="reference", strict=True)
    torch.export.export(rewritten, (x,))
    rewritten.to("meta")(x.to("meta"))
    assert bnrestructure.explain(rewritten).notes == []


@pytest.mark.parametrize("name", MODELS)
def test_torch_script_of_the_eval_model(name: str) -> None:
    model, x = build(name).eval(), input_for(name)
    rewritten = restructured_copy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(rewritten)
    assert torch.equal(scripted(x), model(x))
    rewritten.train()
    assert_same_values(training_step(rewritten, x), training_step(model.train(), x))


def test_one_graph_of_a_restructured_model_names_the_alternative() -> None:
    model = restructured_copy(build("chain"))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch.compile\(model, backend='bnrestructure'\)"):
        torch.compile(model, backend="eager", fullgraph=True)(input_for("chain"))


def test_a_restructured_model_under_torch_compile_trains_the_same() -> None:
    model, x = build("residual"), input_for("residual")
    rewritten = restructured_copy(model)
    torch._dynamo.reset()
    compiled = torch.compile(rewritten, backend="eager")
    for _ in range(2):
        compiled(x).sum().backward()
        model(x).sum().backward()
    assert bnrestructure.explain(rewritten).captures == {"the whole model": 1}
    assert_same_values(
        {n: p.grad for n, p in rewritten.named_parameters() if p.grad is not None},
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
    )


def test_compiled_autograd_runs_the_models_own_forward() -> None:
    model, x = build("residual"), input_for("residual")
    rewritten = restructured_copy(model)
    torch._dynamo.reset()
    for m in (model, rewritten):
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            m(x).sum().backward()
    assert_same_values(
        {n: p.grad for n, p in rewritten.named_parameters() if p.grad is not None},
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
    )
    assert any("compiled autograd" in note for note in bnrestructure.explain(rewritten).notes)


def test_a_slice_of_a_sequential_is_the_users_own() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    rewritten = restructured_copy(model)
    part: nn.Module = rewritten[:2]  # type: ignore[index]
    assert isinstance(part, nn.Sequential)
    assert torch.equal(part(x), model[:2](x))


class _Counting(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_class_names_stay_the_users() -> None:
    rewritten = restructured_copy(build("residual"))
    original = build("residual")
    assert [type(m).__name__ for m in rewritten.modules()] == [type(m).__name__ for m in original.modules()]
    assert [type(m).__qualname__ for m in rewritten.modules()] == [type(m).__qualname__ for m in original.modules()]
    assert repr(rewritten) == repr(original)


def test_an_attribute_that_the_forward_never_reads_captures_nothing_anew() -> None:
    model, x = build("residual"), input_for("residual")
    rewritten = bnrestructure.restructure(_Counting(copy.deepcopy(model)), backend="reference")
    for step in range(4):
        rewritten.global_step = step  # type: ignore[assignment]
        rewritten.inner.history = [step]  # type: ignore[union-attr, assignment]
        rewritten(x).sum().backward()
    assert bnrestructure.explain(rewritten).captures == {"the whole model": 1}


class _Scaled(_Counting):
    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


def test_a_region_that_is_captured_again_and_again_says_so_once() -> None:
    rewritten = bnrestructure.restructure(_Scaled(build("chain")), backend="reference")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(6):
            rewritten.scale = 1.0 + step  # type: ignore[assignment]
            rewritten(input_for("chain")).sum().backward()
    ours = [str(w.message) for w in caught if "bnrestructure" in str(w.message)]
    assert len(ours) == 1
    assert "scale of the model" in ours[0]
    assert bnrestructure.explain(rewritten).captures == {"the whole model": 6}
