"""What each pass makes of whole models is the same program, for all N, sizes and weights: outputs, gradients and buffers.

Means and variances are atoms here, with the derivatives that test_nodes.py proves of them. Channels are implicit: every formula is about
one channel or, in a convolution, about all of them at once.
"""

from __future__ import annotations

import copy

import pytest
import torch
from algebra import NotProved
from pass_tools import after, graph_text
from prove import EPS, IMAGES, MOMENTUM, after_passes, edited, planted, prove_module
from small_models import BasicBlock, DenseLayer, build, conv_bn
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bnrestructure.graph.ir import fused_of
from bnrestructure.passes.pipeline import LADDER, PASSES


class Dense(nn.Module):
    """DenseNet: growing concats that batch norms read, and a transition whose average pool follows its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 4)
        self.layers = nn.ModuleList([DenseLayer(4, 3), DenseLayer(7, 3)])
        self.norm, self.relu, self.pool = nn.BatchNorm2d(10), nn.ReLU(), nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        return self.pool(self.relu(self.norm(torch.cat(features, 1))))


class Mixed(nn.Module):
    """A concat of normalised segments and one that is only activated, read by a convolution and by an average."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.bare = conv_bn(3, 4), conv_bn(4, 5), nn.Conv2d(3, 2, 3, padding=1)
        self.after, self.relu = conv_bn(11, 6, 1), nn.ReLU()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one = self.one(x)
        joined = torch.cat([one, self.two(one), self.relu(self.bare(x))], 1)
        return self.after(joined), joined.mean((2, 3))


class Shared(nn.Module):
    """Two batch norms of one tensor, a batch norm that is used twice, and one that nothing can ride on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.left, self.right = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.next, self.twice = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6, affine=False)
        self.first = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(torch.tanh(self.first(x)))
        left, right = torch.relu(self.left(y)), torch.sigmoid(self.right(y))
        return torch.relu(self.twice(self.next(left))), self.twice(self.next(right))


class Handed(nn.Module):
    """Results that are a concat and a join without an activation: gradients of theirs are the caller's, and no reader may add to them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.pool = conv_bn(3, 5), conv_bn(3, 5), nn.MaxPool2d(3, 2, 1)
        self.branch = nn.Sequential(conv_bn(5, 6), nn.Conv2d(6, 4, 1))
        self.join = nn.Sequential(conv_bn(5, 7), nn.Conv2d(7, 5, 1), nn.BatchNorm2d(5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left, right = self.pool(self.left(x)), self.pool(self.right(x))
        return torch.cat([left, self.branch(left)], 1), right + self.join(right)


class Residual(nn.Module):
    """A max pool, an identity join and one with a shortcut of its own; wide, for oneDNN's sake (kernels/aten_convolution.py)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = conv_bn(3, 17), nn.MaxPool2d(3, 2, 1)
        self.layer1, self.layer2 = BasicBlock(17, 17), BasicBlock(17, 19, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(self.layer1(self.pool(self.stem(x))))


class Slots(nn.Module):
    """A concat of branches that normalises write: one is read by a sum as well, one adds a shortcut; and a copied segment."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = conv_bn(3, 5), nn.MaxPool2d(3, 2, 1)
        self.one, self.two = conv_bn(5, 4), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.bare, self.after = nn.Conv2d(5, 4, 1), nn.Conv2d(13, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.pool(self.stem(x)))
        one = self.one(x)
        return self.after(torch.cat([one, torch.sigmoid(x), one + F.silu(self.two(one + self.bare(x)))], 1))


class Parts(nn.Module):
    """CSPNet's: a normalised tensor in two parts, one kept for the concat, the other read by a convolution and added to what that makes."""

    def __init__(self) -> None:
        super().__init__()
        self.four, self.five, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 5, 1), nn.BatchNorm2d(9)
        self.one, self.two, self.after = conv_bn(5, 5), conv_bn(4, 6), nn.Conv2d(15, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        whole = F.silu(self.norm(torch.cat([self.four(x), self.five(x)], 1)))
        left, right = torch.split(whole, [4, 5], 1)
        return self.after(torch.cat([self.two(left), right + self.one(right), left], 1))


OWN = {"parts": Parts, "slots": Slots, "dense": Dense, "mixed": Mixed, "shared": Shared, "handed": Handed, "residual": Residual}
#: Widths that only a concat has, with its segments' widths.
CONCATS = {
    "parts": {9: (4, 5), 15: (6, 5, 4)}, "dense": {7: (4, 3), 10: (4, 3, 3)},
    "mixed": {11: (4, 5, 2)}, "slots": {13: (4, 5, 4)}, "inception": {13: (3, 5, 3, 2)},
}  # fmt: skip
SHAPES = {"video": (IMAGES, 3, 83, 101, 109)}
MODELS = (*OWN, "chain", "preact", "inception", "inverted", "squeeze_excite", "functional", "strange", "video")


def model_of(name: str) -> nn.Module:
    """In training mode, with the numbers for eps and momentum that are read as symbols, and without what is no business of the passes."""
    torch.manual_seed(0)
    model = OWN[name]().train() if name in OWN else build(name, torch.float32)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eps, module.momentum = EPS, MOMENTUM
    if hasattr(model, "fc"):
        model.fc = nn.Identity()
    return model


def prove_passes(name: str, passes: tuple[str, ...]) -> None:
    """Prove that the model after ``passes`` is the model."""
    model = model_of(name)
    prove_graph(name, model, after_passes(model, passes))


def prove_graph(name: str, model: nn.Module, rewritten: fx.GraphModule) -> None:
    """Prove that a graph is the model of this name."""
    prove_module(copy.deepcopy(model), rewritten, SHAPES.get(name, (IMAGES, 3, 101, 109)), concats=CONCATS.get(name))


#: For each pass the models whose graphs show all that it does.
SHOWN = {
    "fission": ("chain", "shared"),
    "share-statistics": ("dense", "shared"),
    "fuse-statistics": ("chain", "preact"),
    "fuse-normalise": ("chain", "dense", "mixed", "parts", "squeeze_excite", "strange"),
    "fuse-residual": ("residual", "video"),
    "chain-readers": ("preact", "inception"),
    "eliminate-concat": ("dense", "mixed", "slots"),
    "fuse-join": ("residual", "inverted"),
}


@pytest.mark.parametrize(("last", "name"), [(last, name) for last, names in SHOWN.items() for name in names])
def test_the_pipeline_up_to_a_pass(last: str, name: str) -> None:
    names = PASSES[: PASSES.index(last) + 1]
    assert graph_text(after(model_of(name), *names)) != graph_text(after(model_of(name), *names[:-1]))
    prove_passes(name, names)


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_pipeline(name: str) -> None:
    prove_passes(name, PASSES)


@pytest.mark.parametrize("rung", ["rcf", "mvf", "bnff"])
@pytest.mark.parametrize("name", ["chain", "preact", "shared"])
def test_the_rungs_of_the_paper(name: str, rung: str) -> None:
    prove_passes(name, LADDER[rung])


#: (a model, a pass, the fused node whose last call is changed, its argument, the argument or value that it is given instead).
WRONG_GRAPHS = [
    ("chain", "fission", "normalise", "beta", "= scale"),
    ("chain", "fuse-normalise", "conv", "act", "identity"),
    ("chain", "fuse-normalise", "conv", "mean", "= beta"),
    ("strange", "fuse-normalise", "conv", "act", "gelu"),
    ("parts", "fuse-normalise", "conv", "scale", "= beta"),
    ("squeeze_excite", "fuse-normalise", "squeeze", "act", "identity"),
    ("squeeze_excite", "fuse-normalise", "conv", "scale", "= beta"),
    ("dense", "fuse-normalise", "avg_pool", "act", "identity"),
    ("residual", "fuse-normalise", "max_pool", "act", "identity"),
    ("residual", "fuse-residual", "residual", "act", "identity"),
    ("residual", "fuse-residual", "residual", "r_scale", "= scale"),
    ("residual", "fuse-residual", "residual", "r_mean", "= mean"),
    ("residual", "fuse-residual", "residual", "gain", "= r_gain"),
    ("residual", "fuse-join", "conv", "act", "identity"),
    ("residual", "fuse-join", "conv", "beta", "= scale"),
    ("dense", "eliminate-concat", "conv", "offset", 0),
    ("mixed", "eliminate-concat", "concat_buffer", "offset", 0),
    ("slots", "eliminate-concat", "normalise", "offset", 0),
]


@pytest.mark.parametrize(("name", "last", "node", "argument", "wrong"), WRONG_GRAPHS, ids=str)
def test_a_wrong_graph_has_no_proof(name: str, last: str, node: str, argument: str, wrong: str | int) -> None:
    model = model_of(name)
    gm = after_passes(model, PASSES[: PASSES.index(last) + 1])
    calls = [v for n in gm.graph.nodes if (v := fused_of(n)) is not None and n.target.__name__ == node]
    call = next(v for v in reversed(calls) if getattr(v, argument, None) is not None or argument == "offset")
    value = getattr(call, wrong[2:]) if isinstance(wrong, str) and wrong.startswith("= ") else wrong
    assert getattr(call, argument) != value
    call.update(**{argument: value})
    gm.recompile()
    with pytest.raises((NotProved, RuntimeError)):
        prove_graph(name, model, gm)


#: (the function, what stands in it, what is put in its place, a model, the last pass).
ERRORS = [
    ("PlainConv.backward", "dinto, None))", "None, None))", "dense", "eliminate-concat"),
    ("incoming_gradient", "written.offset, written.channels", "0, written.channels", "dense", "eliminate-concat"),
    ("opened", "into.shape[1], into.shape[1] + shape[1]", "into.shape[1], into.shape[1]", "dense", "eliminate-concat"),
    ("_ConcatBuffer.backward", "gradient.narrow(1, ctx.offset,", "gradient.narrow(1, 0,", "mixed", "eliminate-concat"),
    ("PlainConv.backward", "wanted, dpassed,", "wanted, None,", "preact", "chain-readers"),
    ("_ConcatBuffer.backward", "copy=ctx.own", "copy=False", "handed", "eliminate-concat"),
    ("_Normalise.backward", "dz + dslice", "dz", "slots", "eliminate-concat"),
    ("_Normalise.backward", "dz + dslice", "dslice", "slots", "eliminate-concat"),
    ("_Normalise.backward", "dr, dinto, *", "dr, None, *", "slots", "eliminate-concat"),
    ("_Residual.backward", "g=found.g.clone()", "g=found.g", "handed", "chain-readers"),
]


@pytest.mark.parametrize(
    ("function", "old", "new", "name", "last"), ERRORS, ids=[f"{f}: {new} for {old}" for f, old, new, *_ in ERRORS]
)
def test_an_error_in_a_node_has_no_proof(function: str, old: str, new: str, name: str, last: str) -> None:
    with planted(function, edited(old, new)), pytest.raises((NotProved, RuntimeError)):
        prove_passes(name, PASSES[: PASSES.index(last) + 1])
