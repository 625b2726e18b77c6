"""The C++ dense convolution, fused, hybrid and by Winograd's algorithm, against the reference kernel in float64."""

from __future__ import annotations

import dataclasses
import threading
from dataclasses import dataclass, replace

import pytest
import torch
from cpu_checks import LAYOUTS, assert_as_good, in_layout, to_double
from needs import needs_kernels
from torch import Tensor

from bnrestructure.core.edges import BackwardEdge, ConvGeometry, ConvGradients, Transform
from bnrestructure.core.errors import UnsupportedCallError
from bnrestructure.kernels.calls import ConvBackward, ConvForward, ConvResult, Kernels, StatisticsForward
from bnrestructure.kernels.choice import Node, OneOf
from bnrestructure.kernels.cpu import KERNELS, library
from bnrestructure.kernels.cpu.rule import CpuRule, rule
from bnrestructure.kernels.reference import REFERENCE

pytestmark = [needs_kernels, pytest.mark.usefixtures("poisoned_memory")]

FUSED, WINOGRAD = KERNELS.convolutions.by("fused"), KERNELS.convolutions.by("winograd")
ACTIVATIONS = ("identity", "relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh", "leaky_relu(0.1)")
EVERYTHING = (True, True, True)


@dataclass(frozen=True)
class Shape:
    """A convolution; kernel, stride, padding and dilation are (height, width)."""

    batch: int
    channels: int
    channels_out: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def geometry(self) -> ConvGeometry:
        return ConvGeometry(self.stride, self.padding, self.dilation, self.groups)


POINT = {"kernel": (1, 1), "padding": (0, 0)}
SHAPES = {
    "1x1": Shape(2, 32, 64, (8, 8), **POINT),
    "1x1 odd": Shape(3, 17, 35, (7, 5), **POINT),
    "1x1 stride 2": Shape(2, 16, 24, (10, 9), stride=(2, 2), **POINT),
    "1x1 stride 3 padded": Shape(2, 12, 9, (10, 10), kernel=(1, 1), stride=(3, 3), padding=(2, 2)),
    "1x1 on one pixel": Shape(1, 130, 70, (1, 1), **POINT),
    "1x1 more channels than a block": Shape(2, 600, 40, (4, 4), **POINT),
    "1x1 groups": Shape(2, 48, 24, (7, 7), groups=3, **POINT),
    "3x3": Shape(2, 64, 32, (14, 14)),
    "3x3 odd": Shape(3, 19, 37, (9, 7)),
    "3x3 stride 2": Shape(2, 24, 40, (11, 13), stride=(2, 2)),
    "3x3 stride 3, no padding": Shape(2, 16, 16, (8, 8), stride=(3, 3), padding=(0, 0)),
    "3x3 on 3x3": Shape(4, 70, 33, (3, 3)),
    "3x3 on one pixel": Shape(3, 18, 35, (1, 1)),
    "3x3 without padding": Shape(2, 20, 24, (9, 8), padding=(0, 0)),
    "3x3 padded by 2 and by 0": Shape(2, 17, 50, (6, 7), padding=(2, 0)),
    "3x3 dilated": Shape(2, 20, 12, (12, 11), padding=(2, 2), dilation=(2, 2)),
    "3x3 many strips": Shape(1, 5, 4, (90, 90)),
    "3x3 narrow groups": Shape(2, 32, 32, (9, 9), stride=(2, 2), groups=8),
    "3x3 wide groups": Shape(2, 40, 40, (6, 6), groups=2),
    "3x3 odd groups": Shape(2, 15, 25, (6, 6), groups=5),
    "1x7": Shape(2, 33, 18, (9, 8), kernel=(1, 7), padding=(0, 3)),
    "7x1": Shape(2, 33, 18, (9, 8), kernel=(7, 1), padding=(3, 0)),
    "1x3 stride 2x1": Shape(2, 8, 8, (8, 8), kernel=(1, 3), stride=(2, 1), padding=(0, 1)),
    "2x2": Shape(2, 70, 40, (5, 5), kernel=(2, 2), padding=(0, 0)),
    "3x5, everything different": Shape(2, 20, 12, (12, 11), (3, 5), (3, 2), (4, 1), (1, 2)),
    # Deep enough that a panel's weights are cut up by rows of the kernel, some of which meet nothing but padding.
    "3x3 deep": Shape(2, 200, 150, (4, 6)),
    "3x3 deep, stride 2": Shape(2, 160, 200, (7, 5), stride=(2, 2)),
    "3x3 deep, stride 4, unread rows and columns": Shape(2, 150, 160, (10, 9), stride=(4, 4), padding=(0, 0)),
    "3x3 deep, dilated into the padding": Shape(2, 180, 170, (2, 3), padding=(2, 2), dilation=(2, 2)),
    "3x3 deep, rows of padding alone": Shape(2, 170, 160, (3, 2), padding=(4, 4)),
    "5x5 deep on one pixel": Shape(2, 180, 170, (1, 1), kernel=(5, 5), padding=(2, 2)),
    # More than a matrix tile (AMX) of everything, rows that a product crosses and rows that it does not, and groups that fill tiles.
    "3x3 across rows": Shape(3, 72, 48, (14, 13)),
    "3x3 along rows": Shape(1, 40, 36, (6, 62)),
    "3x3 stride 2 along rows": Shape(2, 40, 36, (9, 70), stride=(2, 2)),
    "3x3 groups of tiles": Shape(2, 128, 64, (9, 7), groups=2),
    "3x3 groups of parts of tiles": Shape(2, 120, 72, (9, 7), groups=3),
    "3x3 stride 2 groups of odd parts": Shape(2, 105, 63, (11, 9), stride=(2, 2), groups=7),
    "1x1 groups of odd parts": Shape(2, 105, 63, (5, 7), groups=7, **POINT),
    "5x5 dilated across rows": Shape(2, 36, 40, (11, 10), kernel=(5, 5), padding=(4, 4), dilation=(2, 2)),
    "1x1 of whole lines": Shape(2, 64, 40, (9, 7), **POINT),
    "stem": Shape(2, 3, 20, (19, 21), kernel=(7, 7), stride=(2, 2), padding=(3, 3)),
}


@dataclass
class Case:
    """Random arguments for both directions."""

    x: Tensor
    transform: Transform
    weight: Tensor
    bias: Tensor
    geometry: ConvGeometry
    dy: Tensor
    edge: BackwardEdge
    dtype: torch.dtype
    into: Tensor | None = None

    def forward(self, module: Kernels | OneOf, out: Tensor | None = None) -> ConvResult:
        return module.run(ConvForward(
            self.x, self.transform, self.weight, self.bias, self.geometry, dtype=self.dtype, statistics=True, out=out
        ))

    def backward(self, module: Kernels | OneOf, needs: tuple[bool, bool, bool] = EVERYTHING) -> ConvGradients:
        into = None if self.into is None else self.into.clone(memory_format=torch.preserve_format)
        return module.run(ConvBackward(
            self.dy, self.edge, self.x, self.transform, self.weight, self.geometry,
            dtype=self.dtype, needs=needs, accumulate=into,
        ))  # fmt: skip

    def double(self) -> Case:
        into = None if self.into is None else self.into.double()
        return Case(
            self.x.double(), to_double(self.transform), self.weight.double(), self.bias.double(), self.geometry,
            self.dy.double(), to_double(self.edge), torch.float64, into,
        )  # fmt: skip


def make_case(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    act: str = "relu",
    *,
    affine: bool = True,
    gate: bool = False,
    edge: bool = True,
    accumulate: bool = False,
    layout: str = "channels_last",
    offset: float = 0.0,
) -> Case:
    """Random arguments; ``offset`` moves x's mean away from 0 in units of its deviation."""
    n, c, out = shape.batch, shape.channels, shape.channels_out
    vectors = (torch.randn(c) * 0.3 + offset, torch.rand(c) + 0.5, torch.randn(c) * 0.3) if affine else (None,) * 3
    size_out = shape.geometry.output_size(shape.size, shape.kernel)
    weight = torch.randn(out, c // shape.groups, *shape.kernel)
    y = in_layout(torch.randn(n, out, *size_out).to(dtype), "channels_last")
    return Case(
        in_layout((torch.randn(n, c, *shape.size) + offset).to(dtype), layout),
        Transform(*vectors, act, torch.rand(n, c) if gate else None),
        weight / weight[0].numel() ** 0.5,
        torch.randn(out),
        shape.geometry,
        in_layout(torch.randn(n, out, *size_out).to(dtype), layout),
        BackwardEdge(*torch.rand(3, out) + 0.1, y, torch.randn(out)) if edge else BackwardEdge(),
        dtype,
        in_layout(torch.randn(n, c, *shape.size).to(dtype), layout) if accumulate else None,
    )


def check_forward(case: Case, module: Kernels | OneOf) -> None:
    y, mean, var = case.forward(module)
    truth = case.double().forward(REFERENCE)
    assert_as_good("y", y, case.forward(REFERENCE)[0], truth[0])
    # Statistics are those of y as stored, whatever its own error.
    exact = REFERENCE.run(StatisticsForward(y.double()))
    assert_as_good("statistics", (mean, var), REFERENCE.run(StatisticsForward(y)), exact)


def check_backward(case: Case, module: Kernels | OneOf) -> None:
    found, plain, truth = case.backward(module), case.backward(REFERENCE), case.double().backward(REFERENCE)
    for name, *parts in zip(ConvGradients._fields, found, plain, truth, strict=True):
        assert_as_good(name, *parts, factor=8.0 if name in ("sum_p", "sum_px", "gate", "bias") else 4.0)


def everywhere(*names: str, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)) -> pytest.MarkDecorator:
    """``module``, ``name`` and ``dtype``: the shapes of these names with every implementation that is for them."""
    cases = []
    for name in names:
        shape = SHAPES[name]
        weight = (shape.channels_out, shape.channels // shape.groups, *shape.kernel)
        for dtype in dtypes:
            node = Node((shape.batch, shape.channels, *shape.size), weight, shape.geometry, dtype, True)
            for implementation in CpuRule().candidates(node, "forward"):
                label = f"{implementation}-{name}-{dtype}".replace("torch.", "")
                cases.append(pytest.param(KERNELS.convolutions.by(implementation), name, dtype, id=label))
    return pytest.mark.parametrize(("module", "name", "dtype"), cases)


@everywhere(*SHAPES)
def test_shapes(module: Kernels | OneOf, name: str, dtype: torch.dtype) -> None:
    case = make_case(SHAPES[name], dtype)
    check_forward(case, module)
    check_backward(case, module)


@everywhere("1x1", "3x3 odd", dtypes=(torch.float32,))
def test_an_edge_may_still_have_to_be_divided(module: Kernels | OneOf, name: str, dtype: torch.dtype) -> None:
    case = make_case(SHAPES[name], dtype)
    edge = case.edge
    assert edge.a is not None
    assert edge.b is not None
    undivided = dataclasses.replace(case, edge=BackwardEdge(edge.s, edge.a * 4, edge.b * 8, edge.y, edge.mean, 8))
    for found, expected in zip(undivided.backward(module), case.backward(module), strict=True):
        assert found is None if expected is None else torch.equal(found, expected)


@everywhere("1x1 odd", "3x3 odd", "3x3 stride 2", "3x3 odd groups", "1x1 stride 2")
@pytest.mark.parametrize("gate", [False, True])
def test_accumulates_in_place(module: Kernels | OneOf, name: str, gate: bool, dtype: torch.dtype) -> None:
    case = make_case(SHAPES[name], dtype, "silu", gate=gate, accumulate=True, layout="slice")
    check_backward(case, module)
    into = in_layout(case.into, "slice")
    dx = module.run(ConvBackward(
        case.dy, case.edge, case.x, case.transform, case.weight, case.geometry,
        dtype=dtype, needs=(True, False, False), accumulate=into,
    )).dx  # fmt: skip
    assert dx is into
    n, c, h, w = into.shape
    around = into.as_strided((n, c + 7, h, w), into.stride(), into.storage_offset() - 3)
    assert around[:, :3].isnan().all()
    assert around[:, 3 + c :].isnan().all()


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("affine", [False, True])
@everywhere("1x1 odd", "3x3 odd", dtypes=(torch.float32,))
def test_activations(module: Kernels | OneOf, name: str, dtype: torch.dtype, act: str, affine: bool) -> None:
    case = make_case(SHAPES[name], dtype, act, affine=affine)
    check_forward(case, module)
    check_backward(case, module)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("edge", [False, True])
@everywhere("1x1", "3x3 odd")
def test_layouts(module: Kernels | OneOf, name: str, dtype: torch.dtype, layout: str, edge: bool) -> None:
    case = make_case(SHAPES[name], dtype, layout=layout, edge=edge, act="identity", affine=edge)
    out = in_layout(torch.full_like(case.forward(REFERENCE)[0], torch.nan), layout)
    y, *_ = case.forward(module, out)
    assert y is out
    assert_as_good("y", y, case.forward(REFERENCE)[0], case.double().forward(REFERENCE)[0])
    check_backward(case, module)


@pytest.mark.parametrize("offset", [1e2, 1e4])
@everywhere("1x1", "3x3", dtypes=(torch.float32,))
def test_large_means(module: Kernels | OneOf, name: str, dtype: torch.dtype, offset: float) -> None:
    case = make_case(SHAPES[name], dtype, offset=offset)
    check_forward(case, module)
    check_backward(case, module)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
@everywhere("3x3 stride 2", "3x3 odd", dtypes=(torch.float32,))
def test_only_what_is_needed(module: Kernels | OneOf, name: str, dtype: torch.dtype, needs: tuple[bool, bool, bool]) -> None:
    case = make_case(SHAPES[name], dtype)
    everything, some = case.backward(module), case.backward(module, needs)
    needed = dict.fromkeys(("dx", "sum_p", "sum_px"), needs[0]) | {"gate": False, "weight": needs[1], "bias": needs[2]}
    for name, value in some._asdict().items():
        assert (value is not None) == needed.get(name, False), name
        if value is not None:
            torch.testing.assert_close(value, getattr(everything, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("threads", [1, 3])
def test_weight_gradient_of_more_than_is_staged_at_once(dtype: torch.dtype, threads: int) -> None:
    # 26 MB of output gradient, and sums beyond any second-level cache: see prefers_whole_batch() and kMostStaged in
    # src/conv_weight_gradient.cpp.
    case = make_case(Shape(3, 576, 512, (65, 65), **POINT), dtype)
    needs = (False, True, True)
    truth, expected = case.double().backward(REFERENCE, needs), case.backward(REFERENCE, needs)
    previous = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = case.backward(FUSED, needs)
    finally:
        torch.set_num_threads(previous)
    assert_as_good("gradients", tuple(found), tuple(expected), tuple(truth))


def check_twice(case: Case, module: Kernels | OneOf) -> None:
    """Right, and the same bits each time."""
    check_forward(case, module)
    check_backward(case, module)
    first, second = case.backward(module), case.backward(module)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.sum_px, second.sum_px)


@pytest.mark.parametrize("isa", library.available_isas())
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads_and_instruction_sets(isa: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with library.use(isa):
            for name in ("1x1 odd", "3x3 odd", "3x3 stride 2", "3x3 narrow groups", "stem"):
                for dtype in (torch.float32, torch.bfloat16):
                    check_twice(make_case(SHAPES[name], dtype), FUSED)
            for name in ("3x3 across rows", "3x3 stride 2 along rows", "3x3 groups of tiles", "1x1 of whole lines"):
                check_twice(make_case(SHAPES[name], torch.bfloat16), FUSED)
            for name in ("3x3 odd", "3x3 many strips", "3x3 padded by 2 and by 0", "3x3 odd groups"):
                check_twice(make_case(SHAPES[name]), WINOGRAD)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("module", "names"),
    [(FUSED, ("1x1", "3x3", "3x3 stride 2", "stem")), (WINOGRAD, ("3x3", "3x3 odd", "3x3 many strips"))],
    ids=["fused", "winograd"],
)
def test_concurrent_calls(module: Kernels | OneOf, names: tuple[str, ...]) -> None:
    cases = [make_case(SHAPES[name]) for name in names]
    expected = [case.backward(module).weight for case in cases]
    failures: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(cases[i].backward(module).weight, expected[i]):
                failures.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


@pytest.mark.parametrize("isa", library.available_isas())
@pytest.mark.parametrize("name", ["3x3", "3x3 across rows", "3x3 groups of tiles", "3x3 groups of parts of tiles", "1x1 odd"])
def test_infinity_stays_where_it_is_read(name: str, isa: str) -> None:
    """What pads an operand to whole vectors or matrix tiles is not a neighbour's infinity times zero.

    Narrow groups that share a vector or a tile are different: off their diagonal there are zeros, and an infinity becomes a NaN.
    """
    case = make_case(SHAPES[name], torch.bfloat16)
    case.x[0, 3, 4, 2] = torch.inf
    case.dy[0, 2, 3, 1] = torch.inf
    reference_y, reference_gradients = case.forward(REFERENCE)[0], case.backward(REFERENCE)
    with library.use(isa):
        y, gradients = case.forward(FUSED)[0], case.backward(FUSED)
    assert torch.equal(y.isfinite(), reference_y.isfinite())
    assert torch.equal(gradients.dx.isfinite(), reference_gradients.dx.isfinite())


@everywhere("3x3", dtypes=(torch.float32,))
def test_nan_propagates(module: Kernels | OneOf, name: str, dtype: torch.dtype) -> None:
    case = make_case(SHAPES[name], dtype)
    case.x[0, 5, 4, 4] = torch.nan
    y, mean, _ = case.forward(module)
    assert torch.equal(y.isnan(), case.forward(REFERENCE)[0].isnan())
    assert mean.isnan().all()


def test_supports() -> None:
    case = make_case(SHAPES["3x3"])
    call = ConvForward(case.x, case.transform, case.weight, None, case.geometry, torch.float32)
    assert KERNELS.supports(call) is None
    refused = {
        "float64": replace(call, dtype=torch.float64),
        "3-D": replace(call, x=case.x[..., None], weight=case.weight[..., None]),
        "mish": replace(call, transform=Transform(act="mish")),
        "groups": replace(call, weight=case.weight[:, 1:]),
        "empty": replace(call, x=case.x[:0]),
    }
    for words, wrong in refused.items():
        assert words in str(KERNELS.supports(wrong)), words
        with pytest.raises(UnsupportedCallError, match=words):
            KERNELS.run(wrong)


def test_choice() -> None:
    same = ConvGeometry((1, 1), (1, 1), (1, 1), 1)
    deep = Node((16, 512, 7, 7), (512, 512, 3, 3), same, torch.bfloat16, True)
    image = deep._replace(x=(16, 3, 7, 7), weight=(512, 3, 3, 3))
    in_groups = deep._replace(weight=(512, 16, 3, 3), geometry=same._replace(groups=32))
    point = Node((16, 256, 28, 28), (128, 256, 1, 1), ConvGeometry((1, 1), (0, 0), (1, 1), 1), torch.bfloat16, True)
    assert rule(deep, "forward", "avx512bf16").implementation == "hybrid"
    for direction in ("forward", "backward"):
        for node in (deep, image, point, in_groups):
            assert rule(node, direction, "avx512bf16+amx").implementation == "hybrid"
        assert rule(point, direction, "avx512bf16").implementation == "fused"
        for node in (deep, point, in_groups):
            assert rule(node, direction, "amx").implementation == "fused"
        assert rule(image, direction, "amx").implementation == "hybrid"
    few = in_groups._replace(x=(16, 128, 7, 7), weight=(128, 4, 3, 3))
    assert rule(few, "forward", "avx512bf16+amx").implementation == "hybrid"
    assert rule(few, "backward", "avx512bf16+amx").implementation == "hybrid dgrad, fused wgrad"
    for direction in ("forward", "backward"):
        assert rule(point._replace(dtype=torch.float32), direction, "avx512bf16+amx").implementation == "fused"
        for node, implementation in ((deep, "winograd"), (image, "fused"), (in_groups, "fused"), (point, "fused")):
            assert rule(node._replace(dtype=torch.float32), direction, "avx512").implementation == implementation
