"""The C++ depthwise convolution against the reference kernel in float64; depthwise_cases.py has the rule."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from depthwise_cases import DEPTHWISE, GRADIENTS, Shape, check, check_backward, check_forward, make
from needs import needs_kernels
from torch import Tensor

from bnrestructure.kernels.calls import ConvBackward, ConvForward
from bnrestructure.kernels.cpu import KERNELS, library
from bnrestructure.kernels.reference import REFERENCE

pytestmark = [needs_kernels, pytest.mark.usefixtures("poisoned_memory")]

ACTIVATIONS = ("identity", "relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh", "leaky_relu(0.1)")

SHAPES = {
    "3x3": Shape(2, 32, (14, 14)),
    "3x3 stride 2": Shape(3, 24, (15, 13), stride=(2, 2)),
    "5x5": Shape(2, 40, (9, 17), kernel=(5, 5), padding=(2, 2)),
    "5x5 stride 2, even size": Shape(2, 17, (12, 12), kernel=(5, 5), stride=(2, 2), padding=(2, 2)),
    "7x7": Shape(1, 19, (11, 8), kernel=(7, 7), padding=(3, 3)),
    "one pixel": Shape(2, 33, (1, 1)),
    "one channel": Shape(4, 1, (6, 7)),
    "kernel larger than image": Shape(2, 8, (2, 3), kernel=(5, 5), padding=(2, 2)),
    "1x1": Shape(2, 5, (4, 5), kernel=(1, 1), padding=(0, 0)),
    "1x1 stride 3": Shape(2, 16, (7, 8), kernel=(1, 1), stride=(3, 3), padding=(0, 0)),
    "rectangular": Shape(2, 21, (10, 6), kernel=(1, 7), padding=(0, 3)),
    "no padding": Shape(2, 16, (9, 9), padding=(0, 0)),
    "stride does not divide": Shape(2, 30, (11, 14), kernel=(4, 2), stride=(3, 2), padding=(1, 0)),
    "stride 4 over kernel 2": Shape(2, 16, (13, 10), kernel=(2, 2), stride=(4, 4), padding=(0, 0)),
    "dilation 2": Shape(1, 18, (12, 12), padding=(2, 2), dilation=(2, 2)),
    "dilation 3, stride 2": Shape(2, 16, (17, 15), stride=(2, 2), padding=(2, 3), dilation=(3, 2)),
    "more padding than kernel": Shape(1, 12, (5, 5), padding=(4, 3)),
    "wide: several channel blocks": Shape(1, 1003, (6, 40), kernel=(5, 5), padding=(2, 2)),
    "many pixels": Shape(2, 20, (56, 57)),
}


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, dtype):
    case = make(shape, dtype)
    check_forward(case)
    check_backward(case)


@pytest.mark.parametrize("isa", library.available_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_on_every_instruction_set(act, dtype, isa):
    shape = Shape(2, 27, (9, 10), stride=(2, 1))
    with library.use(isa):
        for options in ({}, {"affine": False}, {"gate": True}):
            case = make(shape, dtype, act, **options)
            check_forward(case)
            check_backward(case)


@pytest.mark.parametrize("edge", ["full", "scale", "none"])
@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("affine", [False, True], ids=["raw", "affine"])
def test_edges(affine, gate, edge):
    case = make(SHAPES["5x5"], act="silu", affine=affine, gate=gate, edge=edge)
    check_forward(case)
    check_backward(case)


def test_identity_returns_no_sums():
    case = make(SHAPES["3x3"], act="identity", affine=False)
    check_backward(case)
    assert case.backward(DEPTHWISE).sum_p is None


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]
)
@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gated"])
def test_only_what_is_asked_for(needs, gate):
    case = make(SHAPES["3x3 stride 2"], gate=gate)
    check_backward(case, needs=needs)


def test_without_statistics_or_bias():
    case = make(SHAPES["3x3"], bias=False)
    y, mean, var = case.forward(DEPTHWISE, statistics=False)
    assert mean is None
    assert var is None
    check("y", y, case.forward(REFERENCE)[0], case.double().forward(REFERENCE)[0])


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_threads(threads, count, batch):
    threads(count)
    for gate in (False, True):
        case = make(Shape(batch, 72, (23, 21), stride=(2, 2)), gate=gate)
        check_forward(case)
        check_backward(case)
        first, second = case.backward(DEPTHWISE), case.backward(DEPTHWISE)
        for name in GRADIENTS:
            one, two = getattr(first, name), getattr(second, name)
            assert one is two is None or torch.equal(one, two), name


def test_two_callers_at_once():
    cases = [make(Shape(4, 64, (28, 28)), seed=seed) for seed in range(2)]
    expected = [case.backward(DEPTHWISE) for case in cases]
    failures = []

    def call(index: int) -> None:
        for _ in range(20):
            value = cases[index].backward(DEPTHWISE)
            if not (torch.equal(value.dx, expected[index].dx) and torch.equal(value.weight, expected[index].weight)):
                failures.append(index)

    callers = [threading.Thread(target=call, args=(index,)) for index in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures


def pitched(x: Tensor, offset: int = 3, channels: int = 11) -> Tensor:
    """x as a channel slice of a wider buffer filled with NaN."""
    n, c, h, w = x.shape
    wide = torch.full((n, c + channels, h, w), torch.nan, dtype=x.dtype).contiguous(memory_format=torch.channels_last)
    return wide[:, offset : offset + c].copy_(x)


def neighbours(view: Tensor) -> Tensor:
    """The channels of a :func:`pitched` tensor's buffer that are not its own."""
    n, c, h, w = view.shape
    wide = view.as_strided((n, c + 11, h, w), view.stride(), 0)
    return torch.cat([wide[:, :3], wide[:, 3 + c :]], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channel_slices_in_and_out(dtype):
    case = make(SHAPES["3x3 stride 2"], dtype)
    case = replace(case, x=pitched(case.x), dy=pitched(case.dy), edge=replace(case.edge, y=pitched(case.edge.y)))
    out = pitched(torch.full_like(case.edge.y, torch.nan))
    check_forward(case, out=out)
    assert case.forward(DEPTHWISE, out=out)[0] is out
    assert neighbours(out).isnan().all()
    check_backward(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gated"])
def test_accumulates_in_place(dtype, gate):
    case = make(SHAPES["5x5"], dtype, gate=gate)
    before = torch.randn_like(case.x)
    target = pitched(before)
    value = case.backward(DEPTHWISE, accumulate=target)
    assert value.dx is target
    assert neighbours(target).isnan().all()
    expected = case.backward(REFERENCE, accumulate=before.clone()).dx
    check("dx", value.dx, expected, case.double().backward(REFERENCE, accumulate=before.double()).dx)


def test_other_layouts_are_copied():
    case = make(SHAPES["3x3"])
    y, mean, _ = case.forward(DEPTHWISE)
    other = replace(case, x=case.x.contiguous(), dy=case.dy.contiguous(), weight=case.weight.repeat(1, 2, 1, 1)[:, :1])
    out = torch.full(y.shape, torch.nan)
    assert torch.equal(other.forward(DEPTHWISE, out=out)[0], y)
    assert torch.equal(out, y)
    assert torch.equal(other.forward(DEPTHWISE)[1], mean)
    target = torch.ones(case.x.shape)
    value = other.backward(DEPTHWISE, accumulate=target)
    assert value.dx is target
    torch.testing.assert_close(target, case.backward(DEPTHWISE).dx + 1)
    expanded = replace(case, dy=torch.ones(1, 1, 1, 1).expand(case.dy.shape))
    check_backward(expanded)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_weight_gradient_has_the_weights_layout(last):
    case = make(SHAPES["5x5"])
    layout = torch.channels_last if last else torch.contiguous_format
    case = replace(case, weight=case.weight.contiguous(memory_format=layout))
    dw = case.backward(DEPTHWISE).weight
    assert dw.stride() == case.weight.stride()
    check_backward(case)


def test_mixed_dtypes():
    """Mixed precision: fp32 activations and weights, a bf16 result; and bf16 activations with an fp32 weight."""
    case = make(SHAPES["5x5 stride 2, even size"])
    half = make(SHAPES["5x5 stride 2, even size"], torch.bfloat16)
    for mixed in (
        replace(case, dtype=torch.bfloat16, dy=half.dy, edge=half.edge),
        replace(half, weight=half.weight.float(), bias=half.bias.float()),
    ):
        check_forward(mixed)
        check_backward(mixed)


@pytest.mark.parametrize("ratio", [1e2, 1e4])
def test_mean_far_from_zero(ratio):
    """x far from zero in backward's sums; y far from zero in forward's statistics."""
    case = make(SHAPES["many pixels"], x_mean=ratio)
    case = replace(case, bias=torch.full_like(case.bias, ratio))
    check_forward(case)
    check_backward(case)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_nan_reaches_its_neighbourhood_and_no_further(act):
    case = make(SHAPES["3x3"], act=act, edge="none")
    case.x[1, 5, 4, 4] = torch.nan
    case = replace(case, transform=case.transform._replace(mean=torch.zeros(32)))
    y, mean, _ = case.forward(DEPTHWISE)
    assert torch.equal(y.isnan(), case.forward(REFERENCE)[0].isnan())
    assert int(y.isnan().sum()) == 9
    assert mean[5].isnan()
    value, expected = case.backward(DEPTHWISE), case.backward(REFERENCE)
    for name in ("dx", "sum_p", "sum_px", "weight"):
        assert torch.equal(getattr(value, name).isnan(), getattr(expected, name).isnan()), name


def test_says_what_it_cannot_do():
    case = make(SHAPES["3x3"])
    forward = ConvForward(case.x, case.transform, case.weight, case.bias, case.geometry, torch.float32)
    backward = ConvBackward(case.dy, case.edge, case.x, case.transform, case.weight, case.geometry, torch.float32)
    assert KERNELS.convolution_choices(forward)[0].implementation == "depthwise"
    assert KERNELS.supports(forward) is None
    assert KERNELS.supports(backward) is None
    refused = {
        "float64": replace(forward, x=case.x.double()),
        "computing in torch.float64": replace(forward, dtype=torch.float64),
        "an input of sizes": replace(forward, x=case.x[..., 0]),
        "empty": replace(forward, x=case.x[:0]),
        "groups": replace(forward, weight=case.weight[:-1]),
    }
    for words, call in refused.items():
        assert words in str(KERNELS.supports(call)), words


def test_several_outputs_a_channel_are_no_depthwise_convolution():
    case = make(SHAPES["3x3"])
    call = ConvForward(case.x, case.transform, case.weight.repeat(2, 1, 1, 1), None, case.geometry, torch.float32)
    assert KERNELS.convolution_choices(call)[0].implementation != "depthwise"
    torch.testing.assert_close(KERNELS.run(call).y, REFERENCE.run(call).y, rtol=1e-4, atol=1e-4)
