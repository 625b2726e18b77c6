"""What the plan says of a model on a GPU that is not here: the kernel of each convolution and why, and the refusals."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from needs import needs_no_gpu
from torch import nn

import bnrestructure
from bnrestructure.core.edges import ConvGeometry
from bnrestructure.kernels import registry
from bnrestructure.kernels.choice import Node
from bnrestructure.kernels.cuda import rule as rules
from bnrestructure.kernels.cuda.rule import CudaRule, rule
from bnrestructure.plan.plan import Plan


def model(stride: int = 1, groups: int = 1, channels: int = 256) -> nn.Module:
    """A 1x1 convolution and a 3x3 one, both between batch norms; on the meta device, as nothing is computed."""
    with torch.device("meta"):
        return nn.Sequential(
            nn.Conv2d(16, channels, 1), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride, padding=1, groups=groups), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, 32, 1),
        )  # fmt: skip


def images(*shape: int, dtype: torch.dtype = torch.bfloat16, channels_last: bool = True) -> torch.Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=layout)


def planned(network: nn.Module, x: torch.Tensor, backend: str = "cuda") -> Plan:
    return bnrestructure.explain(network.to(x.dtype), x, backend=backend)


def test_each_convolution_has_a_kernel_and_a_reason() -> None:
    """3x3 between wide tensors is bound by computing: cuDNN's product. 1x1 is bound by memory: fused."""
    first, middle, last = planned(model(), images(256, 16, 14, 14)).kernels
    assert (first.forward, first.backward) == ("fused", "fused")
    assert (middle.forward, middle.backward) == ("hybrid", "hybrid")
    assert (last.forward, last.backward) == ("fused", "fused")
    assert re.fullmatch(r"by rule: should take 0\.\d\d of the fused kernels' time \(estimated, not timed\)", middle.forward_reason)
    assert first.forward_reason.startswith("by rule: sweeps around cuDNN's product would cost more")


def test_the_two_products_of_a_backward_pass_are_chosen_apart() -> None:
    """A dense block's growth convolutions: a narrow output makes dgrad cheap, and wgrad transforms its wide input nine times."""
    geometry = ConvGeometry((1, 1), (1, 1), (1, 1), 1)
    node = Node((256, 128, 28, 28), (24, 128, 3, 3), geometry, torch.bfloat16, True)
    assert rule(node, "backward").implementation == "fused dgrad, hybrid wgrad"


@pytest.mark.parametrize(
    ("changes", "kernel", "reason"),
    [
        ({"groups": 256}, "depthwise", "depthwise"),
        ({"groups": 4}, "fused", "groups"),
        ({"groups": 256, "kernel": 15}, "depthwise", "depthwise"),
        ({"tf32": False, "dtype": torch.float32}, "fused", "TF32"),
        ({"gated": True}, "fused", "gate"),
        ({}, "hybrid", "estimated"),
        ({"dtype": torch.float32}, "fused", "sweeps around"),
    ],
    ids=str,
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_rules(changes: dict[str, Any], kernel: str, reason: str, direction: str) -> None:
    of = {"groups": 1, "kernel": 3, "gated": False, "dtype": torch.bfloat16, "tf32": True} | changes
    geometry = ConvGeometry((1, 1), (1, 1), (1, 1), of["groups"])
    weight = (256, 256 // of["groups"], of["kernel"], of["kernel"])
    machine = "tf32" if of["tf32"] else "exact products"
    node = Node((256, 256, 14, 14), weight, geometry, of["dtype"], True, of["gated"], machine=machine)
    found = rule(node, direction)
    assert found.implementation == kernel
    assert reason in found.reason
    assert found.implementation in CudaRule().candidates(node, direction)


@pytest.mark.parametrize(("gated", "kernel"), [(False, "hybrid"), (True, "reference")])
@pytest.mark.parametrize(("size", "stride"), [(17, 1), (16, 16)])
def test_very_wide_depthwise_kernels_are_not_ours(size: int, stride: int, gated: bool, kernel: str) -> None:
    geometry = ConvGeometry((stride, stride), (size // 2, size // 2), (1, 1), 256)
    node = Node((256, 256, 34, 34), (256, 1, size, size), geometry, torch.bfloat16, True, gated)
    for direction in ("forward", "backward"):
        found = rule(node, direction)
        assert found.implementation == kernel
        assert "registers" in found.reason
        assert found.implementation in CudaRule().candidates(node, direction)


@pytest.mark.parametrize(("precision", "tf32"), [("ieee", False), ("tf32", True)])
def test_tf32_may_be_chosen_by_the_newer_switch(precision: str, tf32: bool) -> None:
    """In a process of its own: once it was used, torch.backends.cudnn.allow_tf32 raises for good."""
    code = (
        "import torch; from bnrestructure.kernels.cuda import KERNELS; from bnrestructure.core.edges import ConvGeometry, Transform\n"
        "from bnrestructure.kernels.calls import ConvForward\n"
        f"torch.backends.cudnn.conv.fp32_precision = {precision!r}\n"
        "geometry = ConvGeometry((1, 1), (1, 1), (1, 1), 1)\n"
        "x, weight = (torch.empty(shape, device='meta') for shape in ((256, 64, 56, 56), (64, 64, 3, 3)))\n"
        "forward, _ = KERNELS.convolution_choices(ConvForward(x, Transform(), weight, None, geometry, torch.float32))\n"
        "print('without TF32' not in forward.reason)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.split() == [str(tf32)], found.stderr


def test_the_rule_weighs_the_sweeps() -> None:
    """The more channels share a tile's prologue, and the less there is to sweep, the less the hybrid can win."""

    def share(channels: int, out: int, kernel: int) -> float:
        geometry = ConvGeometry((1, 1), (kernel // 2,) * 2, (1, 1), 1)
        node = Node((256, channels, 28, 28), (out, channels, kernel, kernel), geometry, torch.bfloat16, True)
        costs = rules._forward_costs(node)
        return costs["hybrid"] / costs["fused"]

    assert share(128, 128, 1) > 1 > share(128, 128, 5)
    assert share(256, 256, 3) < share(64, 256, 1)


@pytest.mark.parametrize(
    ("x", "what"),
    [
        (images(2, 16, 8, 8, dtype=torch.float64), "torch.float64"),
        (images(2, 16, 8, 8, dtype=torch.float8_e5m2), "torch.float8_e5m2"),
    ],
    ids=["float64", "float8"],
)
def test_types_that_no_kernel_takes_are_the_references(x: torch.Tensor, what: str) -> None:
    kernels = planned(model(), x).kernels
    assert kernels
    for kernel in kernels:
        assert (kernel.forward, kernel.backward) == ("reference", "reference")
        assert what in kernel.forward_reason
        assert "fp32, bf16 and fp16" in kernel.forward_reason


def test_three_dimensions_are_two_where_they_can_be() -> None:
    with torch.device("meta"):
        network = nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 4, (1, 3, 3)))
    kernels = bnrestructure.explain(network, torch.empty(2, 2, 5, 5, 5, device="meta"), backend="cuda").kernels
    assert [k.shape for k in kernels] == [(2, 2, 5, 5, 5), (2, 4, 3, 3, 3)]
    assert (kernels[0].forward, kernels[0].backward) == ("hybrid", "hybrid")
    assert "3-D kernel" in kernels[0].forward_reason
    assert "by rule" in kernels[1].forward_reason
    in_float64 = bnrestructure.explain(
        network.double(), torch.empty(2, 2, 5, 5, 5, dtype=torch.float64, device="meta"), backend="cuda"
    )
    assert {k.forward for k in in_float64.kernels} == {"reference"}


@pytest.mark.parametrize(
    ("x", "copied"),
    [
        (images(4, 16, 8, 8), False),
        (images(4, 16, 8, 8, channels_last=False), True),
        (images(4, 16, 8, 8).transpose(2, 3), True),
        (images(4, 32, 8, 8)[:, ::2], True),
        (images(4, 32, 8, 8)[:, :16], False),
    ],
    ids=["channels_last", "NCHW", "transposed", "every other channel", "a slice of channels"],
)
def test_layouts_that_are_copied_are_told_of(x: torch.Tensor, copied: bool) -> None:
    """They are right all the same: tests/cuda/interpreted runs the kernels on them."""
    plan = planned(model(), x)
    assert any("is not channels_last: each step copies it first" in note for note in plan.notes) == copied
    assert all(k.forward != "reference" for k in plan.kernels)


def test_autocast_decides_the_type(monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(256, 16, 14, 14, dtype=torch.float32)
    wide = planned(model(), x).kernels
    # A torch.autocast block for a device that is not there does nothing.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    narrow = planned(model(), x).kernels
    assert [k.forward for k in narrow] == ["fused", "hybrid", "fused"]
    assert narrow[1].forward_reason != wide[1].forward_reason


@needs_no_gpu
def test_the_plan_says_that_there_is_no_gpu() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    plan = bnrestructure.explain(network, torch.randn(2, 3, 4, 4), backend="cuda")
    assert any("the model is on cpu" in note and "no CUDA device" in note for note in plan.notes)
    assert [k.forward for k in plan.kernels] == ["fused", "fused"]
    with pytest.raises(bnrestructure.UsageError, match="no CUDA device"):
        bnrestructure.restructure(network, backend="cuda")


def test_auto_and_other_devices_say_why_the_reference_runs() -> None:
    assert registry.reason_for_device("auto", "cuda") is None
    assert registry.reason_for_device("cuda", "cuda") is None
    assert registry.reason_for_device("auto", "mps") == "there are no mps kernels"
    assert registry.reason_for_device("cuda", "xpu") == "there are no xpu kernels"
    assert "the tensor is on cpu" in str(registry.reason_for_device("cuda", "cpu"))
    assert "reference" in str(registry.reason_for_device("reference", "cuda"))
    kernels = bnrestructure.explain(model(), images(2, 16, 8, 8, dtype=torch.float32), backend="auto").kernels
    assert {k.forward_reason for k in kernels} == {"there are no meta kernels"}


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    from bnrestructure.cli.main import main

    assert main(["plan", "resnet18", "--backend", "cuda", "--batch", "2", "--input-size", "32", "--kernels"]) == 0
    said = capsys.readouterr().out
    assert "by rule" in said
    if not torch.cuda.is_available():
        assert "no CUDA device" in said
