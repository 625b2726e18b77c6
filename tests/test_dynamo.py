"""``torch.compile(model, backend="bnrestructure")`` computes what eager computes, whatever becomes of the rest."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bnrestructure import dynamo
from bnrestructure.graph.ir import BatchNorm, is_fused
from bnrestructure.graph.provenance import provenance


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """The graphs that the backend rewrote, as they ran."""
    seen: list[fx.GraphModule] = []
    original = dynamo.pipeline.rewrite

    def rewrite(gm: fx.GraphModule, *args: Any) -> Any:
        seen.append(gm)
        return original(gm, *args)

    monkeypatch.setattr(dynamo.pipeline, "rewrite", rewrite)
    return seen


class Block(nn.Module):
    """A residual block and a concat, with in-place activations, foreign operations between and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 6, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(10)
        self.conv3 = nn.Conv2d(10, 4, 3)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x * 2) + 0.1
        x = self.relu(self.bn0(self.stem(x)))
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        x = self.relu(y)
        x = torch.sin(x) * x
        x = torch.cat([self.left(x), self.right(x)], 1)
        x = self.conv3(self.relu(self.bn3(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def pair(cls: type[nn.Module] = Block) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = cls().double()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
    return model, copy.deepcopy(model)


def assert_same_step(compiled: Any, model: nn.Module, eager: nn.Module, x: Tensor) -> None:
    """Output, gradients of input and parameters, and buffers after one training step."""
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    model.zero_grad()
    eager.zero_grad()
    out, expected = compiled(a), eager(b)
    cotangent = torch.randn(expected.shape, dtype=expected.dtype)
    out.backward(cotangent)
    expected.backward(cotangent)
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(out, expected, **close)
    torch.testing.assert_close(a.grad, b.grad, **close)
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}", **close)
    for (name, p), q in zip(model.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda text, name=name: f"{name}: {text}", **close)


@pytest.mark.parametrize("rest", ["eager", "inductor"])
def test_a_training_step_equals_eager(rest: str, graphs: list[fx.GraphModule]) -> None:
    model, eager = pair()
    options = {"rest": rest, "backend": "reference"}
    # inductor takes long to compile: there, one graph for all batch sizes from the start
    dynamic = True if rest == "inductor" else None
    compiled = torch.compile(model, backend=dynamo.bnrestructure, options=options, dynamic=dynamic)
    for batch in (2, 3) if rest == "inductor" else (2, 3, 5):
        assert_same_step(compiled, model, eager, torch.randn(batch, 3, 9, 8, dtype=torch.float64))
    assert any(is_fused(node) for node in graphs[0].graph.nodes)
    statistics = [s for node in graphs[0].graph.nodes for s in provenance(node).statistics_of]
    assert {"bn0", "bn1", "bn2", "bn3"} <= set(statistics)
    assert len(graphs) <= 2, "one graph for the first batch size, one for all others"


class Own(nn.BatchNorm2d):
    """Whose momentum and eps Dynamo hands to the graph as arguments where shapes are dynamic."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum, self.eps)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, Own])
def test_dynamic_shapes_from_the_start(norm: type[nn.BatchNorm2d], graphs: list[fx.GraphModule]) -> None:
    """One graph for all batches, in which every batch norm is fused, and its numbers are the model's as they are then."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4, momentum=0.3), nn.ReLU(), nn.Conv2d(4, 4, 3), norm(4, eps=1e-2), nn.ReLU())
    model.append(nn.Conv2d(4, 2, 1)).double()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend=dynamo.bnrestructure, options={"rest": "eager", "backend": "reference"}, dynamic=True)
    for batch, size in ((2, 9), (3, 8), (5, 11)):
        assert_same_step(compiled, model, eager, torch.randn(batch, 3, size, size, dtype=torch.float64))
    assert len(graphs) == 1
    halves = [provenance(node) for node in graphs[0].graph.nodes if is_fused(node)]
    assert sum(len(known.normalises) for known in halves) == sum(len(known.statistics_of) for known in halves) == 2
    assert BatchNorm.every(graphs[0].graph) == []


class Clip(nn.Module):
    """3-D convolutions of each kind that kernels/folded tells apart."""

    def __init__(self) -> None:
        super().__init__()
        self.volume, self.bn0 = nn.Conv3d(2, 5, 3, padding=1, bias=False), nn.BatchNorm3d(5)
        self.space, self.bn1 = nn.Conv3d(5, 6, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(6)
        self.time, self.bn2 = nn.Conv3d(6, 5, (3, 1, 1), padding=(1, 0, 0)), nn.BatchNorm3d(5)
        self.last = nn.Conv3d(5, 3, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.bn0(self.volume(x)))
        x = x + self.bn2(self.time(F.silu(self.bn1(self.space(x)))))
        return self.last(x)


def test_three_dimensions_on_the_cpu_kernels(graphs: list[fx.GraphModule]) -> None:
    """The registered operators return no views, whose aliases torch.compile would not know of."""
    torch.manual_seed(0)
    model = Clip()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend=dynamo.bnrestructure, options={"rest": "eager", "backend": "auto"})
    for batch in (2, 3):
        x = torch.randn(batch, 2, 4, 6, 6)
        for m in (model, eager):
            m.zero_grad()
        out, expected = compiled(x), eager(x)
        out.square().mean().backward()
        expected.square().mean().backward()
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert any(is_fused(node) for node in graphs[0].graph.nodes)


def test_found_by_name() -> None:
    assert "bnrestructure" in torch._dynamo.list_backends(exclude_tags=()) or _registered_by_the_project_file()


def _registered_by_the_project_file() -> bool:
    """In a tree that is not installed there is no entry point; then what the project file says must be true."""
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    entry = project["project"]["entry-points"]["torch_dynamo_backends"]["bnrestructure"]
    return entry == f"{dynamo.bnrestructure.__module__}:{dynamo.bnrestructure.__name__}"


def test_the_rest_is_compiled_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[str]] = []

    class Recorded(nn.Module):
        def __init__(self, graph_module: fx.GraphModule, mode: str | None) -> None:
            super().__init__()
            made.append(
                [
                    str(getattr(n.target, "__name__", n.target))
                    for n in graph_module.graph.nodes
                    if n.op == "call_function"
                ]
            )
            self.inner = graph_module

        def forward(self, *args: Any) -> Any:
            return self.inner(*args)

    monkeypatch.setattr(dynamo, "_Piece", Recorded)
    model, eager = pair()
    compiled = torch.compile(model, backend=dynamo.bnrestructure, options={"backend": "reference"})
    assert_same_step(compiled, model, eager, torch.randn(2, 3, 9, 8, dtype=torch.float64))
    assert [names for names in made if "tanh" in names]
    assert [names for names in made if "sin" in names]
    assert [names for names in made if "linear" in names]
    assert not [
        name for names in made for name in names if name in ("conv", "finalize", "residual", "normalise", "add_")
    ]


@pytest.mark.parametrize("how", ["eval", "no_grad", "no batch norm", "frozen"])
def test_graphs_without_work_for_us_go_to_the_rest_whole(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole: list[fx.GraphModule] = []

    def spy(gm: fx.GraphModule, example_inputs: Any, rest: str, mode: str | None) -> Any:
        whole.append(gm)
        return gm.forward

    monkeypatch.setattr(dynamo, "_whole", spy)
    model: nn.Module = Block() if how != "no batch norm" else nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    if how == "eval":
        model.eval()
    if how == "frozen":
        for m in model.modules():
            m.training = not isinstance(m, nn.BatchNorm2d)
    compiled = torch.compile(model, backend=dynamo.bnrestructure, options={"backend": "reference"})
    x = torch.randn(2, 3, 8, 8)
    with torch.set_grad_enabled(how != "no_grad"):
        torch.testing.assert_close(compiled(x), copy.deepcopy(model)(x))
    assert len(whole) == 1
    assert not any(is_fused(node) for node in whole[0].graph.nodes)


def test_inductor_gets_an_inference_graph() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double().eval()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend=dynamo.bnrestructure)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), eager(x))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(6, 3, 3, 3)), nn.Parameter(torch.randn(4, 6, 1, 1))
        self.gamma, self.beta = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.randn(6))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(F.conv2d(x, self.w1), self.mean, self.var, self.gamma, self.beta, training=True)
        return F.conv2d(y.relu(), self.w2)


def test_functional_calls(graphs: list[fx.GraphModule]) -> None:
    model, eager = pair(Functional)
    compiled = torch.compile(model, backend=dynamo.bnrestructure, options={"rest": "eager", "backend": "reference"})
    assert_same_step(compiled, model, eager, torch.randn(2, 3, 7, 7, dtype=torch.float64))
    assert sum(is_fused(node) for node in graphs[0].graph.nodes) >= 2


def test_one_value_per_channel_is_pytorchs_error() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    compiled = torch.compile(model, backend=dynamo.bnrestructure, options={"rest": "eager", "backend": "reference"})
    with pytest.raises(Exception, match="Expected more than 1 value per channel when training"):
        compiled(torch.randn(1, 3, 3, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ret": "eager"}, "no option 'ret'; did you mean 'rest'?"),
        ({"rest": "tensorrt"}, "'rest' is one of inductor, eager"),
        ({"backend": "gpu"}, "unknown backend 'gpu'"),
        ({"passes": "fision"}, "did you mean 'fission'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, str], message: str) -> None:
    compiled = torch.compile(Block(), backend=dynamo.bnrestructure, options=options)
    with pytest.raises(Exception, match="UsageError") as caught:
        compiled(torch.randn(2, 3, 8, 8))
    assert message in str(caught.value)


class Layouts(nn.Module):
    """What minds in which layout the fused nodes answer: dropout's mask, a write through a view, a view behind a graph break."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.dropout(F.silu(self.bn1(self.conv1(x))), 0.5, self.training))
        y.flatten(1).mul_(2.0)
        y = self.conv3(F.silu(self.bn2(y)))
        torch._dynamo.graph_break()
        return y.view(y.shape[0], -1)


def test_layouts_are_eagers_where_they_show(graphs: list[fx.GraphModule]) -> None:
    """In float32 with the kernels that users get, which answer in channels_last whatever they are given."""
    torch.manual_seed(0)
    model = Layouts()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend=dynamo.bnrestructure, options={"rest": "eager"})
    found = []
    for run in (compiled, eager):
        torch.manual_seed(1)
        x = torch.randn(4, 3, 8, 8, requires_grad=True)
        out = run(x)
        out.square().sum().backward()
        found.append([out, x.grad, *(p.grad for p in (eager if run is eager else model).parameters())])
    assert any(is_fused(node) for node in graphs[0].graph.nodes)
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
