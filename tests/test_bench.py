"""bnrestructure bench: paired timing, the check that refuses wrong numbers, measuring processes and their figures."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import mmap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bnrestructure.bench import ceilings, contenders
from bnrestructure.bench.check import check_numbers
from bnrestructure.bench.kinds import kind_of, time_by_kind
from bnrestructure.bench.paired import PairedTimings, Spread, time_paired
from bnrestructure.bench.picture import Picture, draw, picture_of
from bnrestructure.bench.process import JobFailedError, run_job
from bnrestructure.bench.resident import peak_growth
from bnrestructure.bench.settings import MALLOC, Settings
from bnrestructure.bench.table import verdicts
from bnrestructure.bench.workload import TrainingStep, Workload, training_loss
from bnrestructure.cli.main import main
from bnrestructure.core.edges import ConvGradients
from bnrestructure.core.errors import UsageError
from bnrestructure.core.memory_format import to_channels_last
from bnrestructure.kernels import reference
from bnrestructure.kernels.calls import ConvBackward

FACTORY = """
import torch
from torch import nn

def make():
    conv = lambda i, o: nn.Conv2d(i, o, 3, padding=1, bias=False)
    return nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )
"""
WRONG = """
from bnrestructure.kernels import reference
from bnrestructure.kernels.calls import ConvForward

_right = reference.RUN[ConvForward]

def _wrong(call):
    y, mean, var = _right(call)
    return y, mean, None if var is None else var * 1.05

reference.RUN[ConvForward] = _wrong
"""


def small_model() -> nn.Module:
    torch.manual_seed(0)
    namespace: dict = {}
    exec(FACTORY, namespace)
    return namespace["make"]()


@pytest.fixture
def factory(tmp_path: Path) -> str:
    (tmp_path / "small.py").write_text(FACTORY)
    return f"{tmp_path / 'small.py'}:make"


# --- paired timing ----------------------------------------------------------------------------------------------------


def test_variants_take_turns_and_warm_up_is_not_counted() -> None:
    calls: list[str] = []
    seconds = {"a": iter((100.0, 1.0, 2.0, 3.0)), "b": iter((100.0, 4.0, 5.0, 6.0))}

    def variant(name: str):  # type: ignore[no-untyped-def]
        def run() -> dict[str, float]:
            calls.append(name)
            return {"step": next(seconds[name])}

        return run

    timings = time_paired({name: variant(name) for name in "ab"}, rounds=3, warmup=1)
    assert "".join(calls) == "abababab"
    assert timings.samples == {"a": {"step": [1.0, 2.0, 3.0]}, "b": {"step": [4.0, 5.0, 6.0]}}


def test_ratios_are_paired_by_round() -> None:
    # A machine that slows down threefold half way: each round's ratio is 2 all the same.
    timings = PairedTimings({"slow": {"step": [2.0, 2.2, 6.0, 6.6]}, "fast": {"step": [1.0, 1.1, 3.0, 3.3]}})
    ratio = timings.ratio("slow", "fast")
    assert (ratio.median, ratio.q1, ratio.q3) == pytest.approx((2.0, 2.0, 2.0))
    assert timings.fastest(["slow", "fast"]) == "fast"


def test_quartiles_interpolate() -> None:
    spread = Spread.of([4.0, 1.0, 3.0, 2.0])
    assert (spread.q1, spread.median, spread.q3) == (1.75, 2.5, 3.25)
    with pytest.raises(ValueError, match="no values"):
        Spread.of([])


def test_a_variant_without_phases_is_timed_as_one_step() -> None:
    timings = time_paired({"sleep": lambda: time.sleep(0.01)}, rounds=2, warmup=0)
    assert all(0.01 <= seconds < 1 for seconds in timings.samples["sleep"]["step"])


def test_garbage_collection_is_put_back_even_after_an_error() -> None:
    def fails() -> None:
        assert not gc.isenabled()
        raise RuntimeError("broken variant")

    with pytest.raises(RuntimeError, match="broken variant"):
        time_paired({"a": fails}, rounds=1)
    assert gc.isenabled()
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        time_paired({}, rounds=0)


# --- settings and contenders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"warmup": -1}, "warmup must be at least 0"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"dtype": "fp8"}, "unknown dtype 'fp8'"),
        ({"malloc": ("jemalloc",)}, "unknown malloc setting 'jemalloc'"),
    ],
)
def test_settings_that_cannot_be_used(wrong: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Settings("resnet18", **wrong)


def test_contenders_and_rungs() -> None:
    plain = contenders.contenders(Settings("densenet121"), memory_efficient=True)
    assert plain == ["eager channels_last", "eager contiguous", "memory_efficient=True", "restructured"]
    all_of_them = contenders.contenders(Settings("resnet18", ladder=True, compile=True), memory_efficient=False)
    assert all_of_them == [
        "eager channels_last", "eager contiguous", "torch.compile",
        "ladder baseline", "ladder rcf", "ladder mvf", "ladder bnff", "restructured",
    ]  # fmt: skip
    assert contenders.rungs(Settings("resnet18", ladder=True))["icf"] == "restructured"


def test_memory_efficient_is_found_where_torchvision_has_it() -> None:
    from torchvision import models

    with torch.device("meta"):
        densenet, resnet = models.densenet121(), models.resnet18()
    assert contenders.has_memory_efficient(Workload(densenet, (), models.densenet121))
    assert not contenders.has_memory_efficient(Workload(densenet, ()))  # from a factory of the user's
    assert not contenders.has_memory_efficient(Workload(resnet, (), models.resnet18))


def test_channels_last_reaches_parameters_and_inputs() -> None:
    model, (x,) = to_channels_last(small_model(), (torch.randn(2, 3, 8, 8),))
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.dim() == 4)


# --- the step that is timed -------------------------------------------------------------------------------------------


def test_a_step_trains_and_its_phases_fit_into_it() -> None:
    model = small_model()
    seconds = TrainingStep(model, (torch.randn(2, 3, 8, 8),), "cpu")()
    assert 0 < seconds["forward"] + seconds["backward"] <= seconds["step"]
    assert all(p.grad is not None for p in model.parameters())


def test_autocast_reaches_the_forward_pass() -> None:
    found = []
    model = small_model()
    model.register_forward_hook(lambda _, __, output: found.append(output.dtype))
    TrainingStep(model, (torch.randn(2, 3, 8, 8),), "cpu", torch.bfloat16)()
    assert found == [torch.bfloat16]


def test_loss_of_what_models_return() -> None:
    scores = torch.zeros(2, 4, requires_grad=True)
    pixels = torch.zeros(2, 4, 3, 3, requires_grad=True)
    assert training_loss(scores).item() == pytest.approx(math.log(4))
    assert training_loss({"out": pixels, "aux": scores}).item() == pytest.approx(2 * math.log(4))
    assert training_loss({"boxes": scores.sum() + 2, "classes": scores.sum() + 3}) == 5
    with pytest.raises(UsageError, match="nothing to train on"):
        training_loss(torch.zeros(3, requires_grad=True))


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        ("aten::conv2d", "conv"),
        ("ConvolutionBackward0", "conv"),
        ("aten::batch_norm", "BN"),
        ("NativeBatchNormBackward0", "BN"),
        ("aten::relu_", "activation"),
        ("SiluBackward0", "activation"),
        ("aten::cat", "add/cat"),
        ("AddBackward0", "add/cat"),
        ("aten::max_pool2d", "pool"),
        ("MaxPool2DWithIndicesBackward0", "pool"),
        ("PlainConv", "fused conv"),
        ("PlainConvBackward", "fused conv"),
        ("_AvgPool", "fused pool"),
        ("_ResidualBackward", "residual"),
        ("aten::addmm", None),
        ("autograd::engine::evaluate_function: AddBackward0", None),
    ],
)
def test_kinds_of_events(event: str, kind: str | None) -> None:
    assert kind_of(event) == kind


def test_time_by_kind_of_an_eager_and_a_restructured_step() -> None:
    settings = Settings("small", backend="reference")
    x = torch.randn(2, 3, 16, 16)
    eager = TrainingStep(small_model(), (x,), "cpu")
    from bnrestructure import restructure

    ours = TrainingStep(restructure(small_model(), backend=settings.backend), (x,), "cpu")
    ours()
    plain, fused = (time_by_kind(step, "cpu") for step in (eager, ours))
    for kind in ("conv", "BN", "activation", "pool"):
        assert plain[kind]["forward"] > 0, kind
        assert plain[kind]["backward"] > 0, kind
    assert fused["fused conv"]["forward"] > 0
    assert fused["fused conv"]["backward"] > 0
    assert not {"BN", "activation"} & fused.keys()
    assert "fused conv" not in plain


# --- refusing wrong numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("passes", [None, "bnff"])
def test_right_numbers_pass(dtype: str, passes: str | None) -> None:
    settings = Settings("small", dtype=dtype, backend="reference")
    report = check_numbers(small_model(), (torch.randn(2, 3, 16, 16),), settings, passes)
    assert report.ok, str(report)
    assert len(report.comparisons) > 10


def test_wrong_numbers_do_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.RUN[ConvBackward]

    def without_mask(call: ConvBackward) -> ConvGradients:
        return right(dataclasses.replace(call, transform=call.transform._replace(act="identity")))

    monkeypatch.setitem(reference.RUN, ConvBackward, without_mask)
    settings = Settings("small", backend="reference")
    report = check_numbers(small_model(), (torch.randn(2, 3, 16, 16),), settings, None)
    assert not report.ok
    assert "gradient" in report.failed_kinds


def test_nothing_is_timed_when_the_numbers_are_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wrong.py").write_text(FACTORY + WRONG)
    figures = tmp_path / "figures.json"
    command = ["bench", f"{tmp_path / 'wrong.py'}:make", "--batch", "2", "--input-size", "16", "--backend", "reference"]
    assert main([*command, "--malloc", "tuned", "--json", str(figures)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert not figures.exists()
    assert "not timed, for the numbers are wrong" in err


# --- measuring processes ----------------------------------------------------------------------------------------------


@pytest.mark.whole
def test_a_benchmark_from_the_command_line(factory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "figures.json"
    command = [
        "bench",
        factory,
        "--batch",
        "2",
        "--input-size",
        "16",
        "--rounds",
        "2",
        "--warmup",
        "1",
        "--backend",
        "reference",
    ]
    assert (
        main([*command, "--malloc", "tuned", "--ladder", "--no-memory", "--threads", "1", "--json", str(figures)]) == 0
    )
    result = json.loads(figures.read_text())
    (section,) = result["sections"]
    assert section["malloc_environment"] == MALLOC["tuned"]
    assert result["environment"]["cpu"]["threads"] == 1
    assert set(result["environment"]) >= {"device", "commit", "date", "packages"}
    assert set(result["check"]["reports"]) == {
        "restructured",
        "ladder baseline",
        "ladder rcf",
        "ladder mvf",
        "ladder bnff",
    }
    assert set(section["variants"]) == {"eager channels_last", "eager contiguous", *result["check"]["reports"]}
    assert all(len(phases["step"]) == 2 for phases in section["samples"].values())
    step = section["comparison"]["step"]
    samples = section["samples"]
    against = section["comparison"]["against"]
    pairs = [a / b for a, b in zip(samples[against]["step"], samples["restructured"]["step"], strict=True)]
    assert step["ratio"]["median"] == pytest.approx(sum(pairs) / 2)
    assert step["theirs"] == pytest.approx(sum(samples[against]["step"]) / 2)
    assert result["ceilings"]["step_flops"] > 0
    plan = result["plan"]
    assert plan["restructured"]["bytes_after"] < plan["restructured"]["bytes_before"]
    assert plan["icf"]["bytes_after"] <= plan["bnff"]["bytes_after"] <= plan["rcf"]["bytes_after"]
    out = capsys.readouterr().out
    assert "restructured" in out
    assert "BNFF" in out
    assert "reference kernels were asked for" in out
    pytest.importorskip("matplotlib")
    for kind, name in (("all", "picture.png"), ("all", "picture.svg"), ("ladder", "l.png"), ("kinds", "k.png"), ("sites", "s.svg")):
        draw(result, Picture(kind, tmp_path / name))
        assert (tmp_path / name).stat().st_size > 5000


def test_memory_is_measured_in_a_process_of_its_own(factory: str) -> None:
    settings = Settings(factory, batch=8, input_size=(64,), backend="reference")
    eager, ours = (run_job("memory", settings, variant=name) for name in ("eager channels_last", "restructured"))
    activation = 8 * 8 * 64 * 64 * 4
    assert eager["saved_bytes"] >= 4 * activation  # two BN inputs, two ReLU outputs
    assert ours["saved_bytes"] < 0.75 * eager["saved_bytes"]
    assert eager["peak_bytes"] >= eager["saved_bytes"]


def test_errors_of_measuring_processes(tmp_path: Path) -> None:
    (tmp_path / "raises.py").write_text("def make():\n    raise KeyError('no such layer')\n")
    with pytest.raises(UsageError, match="raised KeyError: 'no such layer'"):
        run_job("check", Settings(f"{tmp_path / 'raises.py'}:make"))
    (tmp_path / "dies.py").write_text("import os\ndef make():\n    os._exit(3)\n")
    with pytest.raises(JobFailedError, match="check failed: exit status 3"):
        run_job("check", Settings(f"{tmp_path / 'dies.py'}:make"))
    start = time.monotonic()
    with pytest.raises(JobFailedError, match="check took more than 1 s"):
        run_job("check", Settings("resnet18", batch=64), limit=1.0)
    assert time.monotonic() - start < 30


def test_peak_growth_sees_what_is_freed_again() -> None:
    """The pages come from the system itself: malloc may hand out again what an earlier test's tensors left resident."""

    def touch(size: int) -> None:
        with mmap.mmap(-1, size) as pages:
            for page in range(0, size, mmap.PAGESIZE):
                pages[page] = 1

    touch(2**27)  # a peak before, which must not hide the one that is measured
    assert 2**26 * 0.95 <= peak_growth(lambda: touch(2**26), "cpu") <= 2**26 * 1.2


# --- what is said -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "said"),
    [((0.9, 0.88, 0.92), "SLOWER than"), ((1.2, 1.1, 1.3), "faster than"), ((1.01, 0.97, 1.04), "no different from")],
)
def test_the_verdict_says_which_way_it_went(ratio: tuple[float, float, float], said: str) -> None:
    step = {"theirs": 1.0, "ours": 1.0 / ratio[0], "ratio": dict(zip(("median", "q1", "q3"), ratio, strict=True))}
    memory = {"theirs": 400_000_000, "ours": 100_000_000, "ratio": 0.25}
    section = {"malloc": "default", "comparison": {"against": "eager contiguous", "step": step, "saved_bytes": memory}}
    (line,) = verdicts({"sections": [section]})
    assert f"restructured is {said} eager contiguous" in line.plain
    assert "saved tensors 0.25x (400 -> 100 MB)" in line.plain


def test_no_verdict_where_medians_and_ratios_disagree() -> None:
    step = {"theirs": 1.0, "ours": 1.01, "ratio": {"median": 1.02, "q1": 1.01, "q3": 1.03}}
    (line,) = verdicts({"sections": [{"malloc": "tuned", "comparison": {"against": "eager contiguous", "step": step}}]})
    assert "no different from" in line.plain


def test_a_picture_that_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected one of ladder, kinds, sites, memory, or a file's name that ends in \.png"):
        picture_of(str(tmp_path / "picture.txt"), "resnet18")
    with pytest.raises(UsageError, match=r"cannot draw memry"):
        picture_of("memry", "resnet18")
    with pytest.raises(UsageError, match="no such folder"):
        picture_of(str(tmp_path / "nowhere" / "picture.png"), "resnet18")


def test_pictures_by_name() -> None:
    pytest.importorskip("matplotlib")
    assert picture_of("memory", "my/models.py:net") == Picture("memory", Path("my-models.py-net-memory.png"))
    assert picture_of("sites=a.svg", "resnet18") == Picture("sites", Path("a.svg"))
    assert picture_of("a.pdf", "resnet18") == Picture("all", Path("a.pdf"))


def test_a_ceiling_is_found_in_seconds_where_products_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def slow(a: Tensor, b: Tensor) -> Callable[[], object]:
        sizes.append(len(a))
        return lambda: time.sleep(2 * len(a) ** 3 / 1e9)  # one GF/s

    monkeypatch.setattr(ceilings, "_gemm", slow)
    monkeypatch.setattr(ceilings, "_convolution", slow)
    assert 0.5e9 < ceilings.fma_ceiling("cpu", torch.float32) <= 1e9
    assert set(sizes) == {256, 512}
