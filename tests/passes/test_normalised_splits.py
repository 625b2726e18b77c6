"""Splits of normalised tensors: whose parts are normalised by their readers, and where the whole tensor stays in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from equivalence import assert_same_training
from pass_tools import after
from small_models import conv_bn
from torch import Tensor, nn
from torch.nn import functional as F

import bnrestructure
from bnrestructure.graph.ir import ConcatBuffer, Conv, MaxPool, Normalise
from bnrestructure.graph.splits import part_of
from bnrestructure.passes.pipeline import PASSES

Body = Callable[[Any, Tensor], Any]


class _Parts(nn.Module):
    """A stem of 12 channels, and convolutions for each number of channels that a body makes of them."""

    def __init__(self, body: Body, act: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = conv_bn(3, 12, act=act or nn.SiLU())
        self.six, self.six_again, self.third = conv_bn(6, 6, act=nn.SiLU()), conv_bn(6, 6, 1, act=nn.SiLU()), conv_bn(4, 4)
        self.read4, self.read6, self.read12, self.read18 = (nn.Conv2d(n, 3, 3, padding=1) for n in (4, 6, 12, 18))
        self.after = conv_bn(12, 4)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, self.stem(x))


def _stage(m: _Parts, x: Tensor) -> Tensor:
    one, other = x.chunk(2, 1)
    return m.after(torch.cat([one, m.six_again(m.six(other))], 1))


def _c2f(m: _Parts, x: Tensor) -> Tensor:
    parts = list(x.chunk(2, 1))
    parts.append(parts[-1] + m.six(parts[-1]))
    return m.read18(torch.cat(parts, 1))


def _res2net(m: _Parts, x: Tensor) -> Tensor:
    parts = torch.split(x, 4, 1)
    first = m.third(parts[0])
    return m.read12(torch.cat([first, m.third(first + parts[1]), parts[2]], 1))


def _uneven(m: _Parts, x: Tensor) -> Tensor:
    six, four, two = x.split((6, 4, 2), dim=1)
    return m.read6(six) + m.read4(four) * two.mean()


def _parts_of_a_part(m: _Parts, part: Tensor) -> Tensor:
    one, other = F.batch_norm(part, None, None, training=True).chunk(2, 1)
    return m.read4(one) + m.third(other).sum()


FUSED: dict[str, Body] = {
    "a stage of CSPNet": _stage,
    "YOLO's C2f": _c2f,
    "Res2Net's scales": _res2net,
    "uneven parts, one of which is needed": _uneven,
    "convolutions alone": lambda m, x: sum(map(m.read6, x.chunk(2, dim=1))),
    "a pool": lambda m, x: F.max_pool2d(torch.split(x, 6, dim=1)[1], 2),
    "a part that is taken twice": lambda m, x: m.read6(torch.chunk(x, 2, 1)[0]) + m.six(torch.chunk(x, 2, 1)[0]).sum(),
    "a convolution reads the whole, too": lambda m, x: m.read6(x.chunk(2, 1)[0]) + m.read12(x),
    "the last part, counted from the end": lambda m, x: m.read6(x.chunk(2, 1)[-1]),
    "parts of a part that is normalised again": lambda m, x: _parts_of_a_part(m, x.split((8, 4), 1)[0]),
    "a part that the caller gets": lambda m, x: (lambda a, b: (m.read6(a), b))(*x.chunk(2, 1)),
}  # fmt: skip

KEPT: dict[str, Body] = {
    "a part that is normalised again": lambda m, x: m.read6(F.relu(F.batch_norm(x.chunk(2, 1)[1], None, None, training=True))),
    "along another dimension": lambda m, x: m.read12(x.chunk(2, 2)[0]),
    "others need the whole": lambda m, x: m.read6(x.chunk(2, 1)[0]) + x.exp().mean(),
    "parts that are needed": lambda m, x: sum(part.tanh() for part in x.chunk(2, 1)),
    "all parts, as they come": lambda m, x: torch.stack(x.chunk(2, 1)).tanh(),
}  # fmt: skip


def _graph(body: Body) -> Any:
    return after(_Parts(body).double(), *PASSES).graph


def _reads_a_part(graph: Any) -> bool:
    scales = [reader.scale for kind in (Conv, Normalise, MaxPool) for reader in kind.every(graph) if reader.scale is not None]
    concatenated = [vector for scale in scales if scale.target is torch.cat for vector in scale.all_input_nodes]
    return any(part_of(vector) for vector in (*scales, *concatenated))


def _image() -> Tensor:
    return torch.randn(4, 3, 9, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def _sum(outputs: Any) -> Tensor:
    total: Tensor = sum(o.square().sum() for o in (outputs if isinstance(outputs, tuple) else (outputs,)))  # type: ignore[assignment]
    return total


class _Summed(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return _sum(self.net(x))


@pytest.mark.parametrize("case", FUSED)
def test_parts_are_normalised_one_by_one(case: str) -> None:
    assert _reads_a_part(_graph(FUSED[case]))
    assert_same_training(_Summed(_Parts(FUSED[case])).double(), _image())


@pytest.mark.parametrize("case", KEPT)
def test_the_whole_is_normalised(case: str) -> None:
    assert not _reads_a_part(_graph(KEPT[case]))
    assert_same_training(_Summed(_Parts(KEPT[case])).double(), _image())


def test_a_part_that_is_needed_is_written_where_the_concat_keeps_it() -> None:
    graph = _graph(_c2f)
    assert all(normalise.in_buffer for normalise in Normalise.every(graph))
    assert not ConcatBuffer.every(graph)


def test_parts_and_branches_of_one_activation_are_concatenated_raw() -> None:
    (last,) = Normalise.every(_graph(_stage))
    assert all(reader.op == "output" for reader in last.out("z").users)


def test_a_convolution_reads_a_slice_of_the_concat_that_keeps_its_input() -> None:
    """SiLU of each tap costs more than to read what is there."""
    (reader,) = [conv for conv in Conv.every(_graph(_c2f)) if conv.statistics and conv.mean is None and conv.x.op != "placeholder"]
    assert reader.act == "identity"


@pytest.mark.parametrize("dims", [1, 3])
def test_other_numbers_of_dimensions(dims: int) -> None:
    conv, norm = (getattr(nn, f"{name}{dims}d") for name in ("Conv", "BatchNorm"))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = conv(3, 8, 3, padding=1), norm(8)
            self.one, self.two = conv(4, 4, 3, padding=1), conv(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            a, b = F.relu(self.norm(self.stem(x))).chunk(2, 1)
            return self.two(torch.cat([a, F.relu(self.one(b))], 1))

    assert_same_training(Net().double(), torch.randn(3, 3, *[6] * dims, dtype=torch.float64))


def test_the_plan_says_so() -> None:
    plan = bnrestructure.explain(_Parts(_c2f), _image().float())
    assert {site.name: site.status for site in plan.sites if site.name in ("stem.1", "six.1")} == {"stem.1": "fused", "six.1": "fused"}
