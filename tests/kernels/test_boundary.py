"""What crosses into C++: no call, however spoiled, reads or writes what is not a tensor's own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzz_boundary import fuzz
from needs import needs_kernels
from torch import nn

import bnrestructure
from bnrestructure import ops
from bnrestructure.core.errors import UnexpectedTensorError
from bnrestructure.kernels.cpu import library, memory

pytestmark = needs_kernels

POINT = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}


def test_random_spoiled_calls() -> None:
    """``make fuzz`` runs many more."""
    seed = int(os.environ["BNR_RANDOM_SEED"])
    findings = fuzz(seed, 300)
    assert not findings.failures, "\n".join(findings.failures)
    assert findings.counts["same"] > 100
    assert findings.counts["error"] > 30
    assert findings.counts["no memory: error"] > 10


def test_weights_on_another_device_than_the_input() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)).to("meta")
    with pytest.raises(RuntimeError, match="Tensor on device meta is not on the expected device cpu"):
        bnrestructure.restructure(model)(torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("spoiled", ["x", "weight", "mean"])
def test_a_storage_that_was_cut_is_an_error(spoiled: str) -> None:
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    tensors = {"x": x, "mean": torch.zeros(4), "scale": torch.ones(4), "beta": torch.zeros(4), "weight": torch.randn(5, 4, 1, 1)}
    tensors[spoiled].untyped_storage().resize_(tensors[spoiled].nbytes - 1)
    with pytest.raises(RuntimeError, match="reaches beyond its storage"):
        ops.conv(*tensors.values(), None, backend="cpu", **POINT)


def test_a_storage_that_is_cut_before_backward_is_an_error() -> None:
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = ops.conv(x, None, None, None, torch.randn(5, 4, 1, 1), None, act="relu", backend="cpu", **POINT).y
    x.untyped_storage().resize_(16)
    with pytest.raises(RuntimeError, match="reaches beyond its storage"):
        y.sum().backward()


def test_what_a_kernel_does_not_expect_is_told_apart_from_what_is_not_there() -> None:
    x = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    assert memory.of_pixels(x, 4, (2, 4, 3, 3), torch.float32) == x.data_ptr()
    for shape, dtype in (((2, 4, 3, 4), torch.float32), ((2, 4, 3, 3), torch.bfloat16)):
        with pytest.raises(UnexpectedTensorError):
            memory.of_pixels(x, 4, shape, dtype)
    with pytest.raises(RuntimeError, match="reaches beyond"):
        memory.of_pixels(x, 5, (2, 4, 3, 3), torch.float32)
    for vector in (torch.zeros(5), torch.zeros(1).expand(4), torch.zeros(8)[::2], torch.zeros(4, dtype=torch.float64)):
        with pytest.raises(UnexpectedTensorError):
            memory.of_vector(vector, 4)


def _copies(folder: Path) -> list[Path]:
    for isa in library.available_isas():
        shutil.copy(library._path(isa), folder)
    return [folder / library._path(isa).name for isa in library.available_isas()]


def _loaded_from(folder: Path) -> str:
    """What the loader says of the libraries in this folder: in a process of its own, for a damaged one might end it."""
    code = (
        "import sys, pathlib; from bnrestructure.kernels.cpu import library\n"
        f"library._FOLDER = pathlib.Path({str(folder)!r})\n"
        "print(library.unavailable_reason() or library.isa_name(), library.damaged())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other formats")
def test_a_truncated_library_disables_its_instruction_set_alone(tmp_path: Path) -> None:
    best, *others = _copies(tmp_path)
    whole = best.stat().st_size
    for size in (0, 10, 64, whole // 2, whole - 1):
        os.truncate(best, size)
        said = _loaded_from(tmp_path)
        assert f"{best.name} is damaged" in said
        assert others
        assert said.startswith(library.available_isas()[1])


def test_nothing_but_damaged_libraries_is_a_reason(tmp_path: Path) -> None:
    for path in _copies(tmp_path):
        path.write_bytes(b"no library" * 100)
    assert "is damaged" in _loaded_from(tmp_path).partition("{")[0]
