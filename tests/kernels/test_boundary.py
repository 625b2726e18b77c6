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
from bnrestructure.core.edges import ConvGeometry, Transform
from bnrestructure.core.errors import UnsupportedCallError
from bnrestructure.kernels.cpu import library, memory, structures

pytestmark = needs_kernels

POINT = ConvGeometry((1, 1), (0, 0), (1, 1), 1)


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


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_product_of_pytorchs_is_not_asked_to_read_what_has_no_memory(name: str) -> None:
    tensors = {"weight": torch.randn(8, 4, 3, 3, 3), "bias": torch.randn(8)}
    tensors[name] = tensors[name].to("meta")
    geometry = ConvGeometry((1, 1, 1), (1, 1, 1), (1, 1, 1), 1)
    with pytest.raises(RuntimeError, match="Tensor on device meta is not on the expected device cpu"):
        ops.conv(torch.randn(2, 4, 5, 5, 5), Transform(act="relu"), **tensors, geometry=geometry, backend="cpu")


def test_a_gate_of_another_dtype_whose_storage_was_cut_is_an_error() -> None:
    gate = torch.rand(2, 4, 1, 1, dtype=torch.float64)
    gate.untyped_storage().resize_(gate.nbytes - 1)
    with pytest.raises(RuntimeError, match="reaches beyond its storage"):
        ops.conv(torch.randn(2, 4, 6, 6), Transform(gate=gate), torch.randn(5, 4, 1, 1), None, POINT, backend="cpu")


@pytest.mark.parametrize("spoiled", ["x", "weight", "mean"])
def test_a_storage_that_was_cut_is_an_error(spoiled: str) -> None:
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    tensors = {"x": x, "mean": torch.zeros(4), "scale": torch.ones(4), "beta": torch.zeros(4), "weight": torch.randn(5, 4, 1, 1)}
    tensors[spoiled].untyped_storage().resize_(tensors[spoiled].nbytes - 1)
    x, *vectors, weight = tensors.values()
    with pytest.raises(RuntimeError, match="reaches beyond its storage"):
        ops.conv(x, Transform(*vectors), weight, None, POINT, backend="cpu")


def test_a_storage_that_is_cut_before_backward_is_an_error() -> None:
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = ops.conv(x, Transform(act="relu"), torch.randn(5, 4, 1, 1), None, POINT, backend="cpu").y
    x.untyped_storage().resize_(16)
    with pytest.raises(RuntimeError, match="reaches beyond its storage"):
        y.sum().backward()


def test_what_a_kernel_does_not_expect_is_told_apart_from_what_is_not_there() -> None:
    x, keep = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last), memory.Keep()
    assert memory.pixels(x, (2, 4, 3, 3), torch.float32, keep) == (x.data_ptr(), 4)
    assert not keep
    with pytest.raises(UnsupportedCallError):
        memory.pixels(x, (2, 4, 3, 4), torch.float32, keep)
    for shape, dtype in (((2, 4, 3, 4), torch.float32), ((2, 4, 3, 3), torch.bfloat16)):
        with pytest.raises(UnsupportedCallError):
            memory.written(x, shape, dtype)
    with pytest.raises(RuntimeError, match="reaches beyond"):
        memory.span(x, 73)
    for vector in (torch.zeros(5), torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64)):
        with pytest.raises(UnsupportedCallError):
            memory.vector(vector, keep, 4)
        with pytest.raises(UnsupportedCallError):
            memory.vectors(keep, 4, vector, vector)
    with pytest.raises(UnsupportedCallError):
        memory.vectors(keep, 4, torch.zeros(4), None)
    assert memory.vectors(keep, 4, None, None) == [0, 0]
    for copied in (torch.ones(1).expand(4), torch.ones(8)[::2], torch.ones(4, dtype=torch.float64), torch._neg_view(-torch.ones(4))):
        keep.clear()
        assert memory.vector(copied, keep, 4) == keep[0].data_ptr()
        assert keep[0].tolist() == [1.0] * 4


def test_a_view_with_the_negative_bit_is_copied_and_never_written() -> None:
    """Each of its numbers has the other sign in memory."""
    x, keep = torch._neg_view(torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)), memory.Keep()
    memory.pixels(x, (2, 4, 3, 3), torch.float32, keep)
    assert not keep[0].is_neg()
    assert torch.equal(keep[0], x)
    with pytest.raises(UnsupportedCallError, match="negative bit"):
        memory.written(x, (2, 4, 3, 3), torch.float32)
    running = torch._neg_view(torch.ones(4))
    with pytest.raises(UnsupportedCallError, match="negative bit"):
        memory.parameter(running, 4, None)


def test_addresses_are_taken_in_one_file() -> None:
    folder = Path(library.__file__).parent
    found = [path.name for path in sorted(folder.glob("*.py")) if ".data_ptr(" in path.read_text()]
    assert found == ["memory.py"]


def test_both_sides_of_the_boundary_declare_the_same_structures(monkeypatch: pytest.MonkeyPatch) -> None:
    text = structures.layout()
    assert "ForwardArguments" in text
    assert "problem 0 264," in text
    assert library.available_isas()
    library._fault.cache_clear()
    monkeypatch.setattr(library, "layout", lambda: text.replace("x_pitch", "pitch_x"))
    assert library.available_isas() == []
    assert all("built of other sources" in reason for reason in library.damaged().values())
    monkeypatch.undo()
    library._fault.cache_clear()


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


@pytest.mark.parametrize(("word", "tried"), [("DEFAULT", {"portable"}), ("AVX2", {"portable", "avx2"})])
def test_damaged_libraries_have_none_loaded_that_the_cpu_may_not_run(
    word: str, tried: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: word)
    monkeypatch.setattr(library, "_fault", lambda path: f"{path.name} is damaged")
    assert library.damaged().keys() == tried & {isa for isa in library.CPU_LEVELS if library._path(isa).exists()}
    assert library.available_isas() == []


def test_a_library_that_the_cpu_may_not_run_is_not_tried_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / library._path("avx512").name).write_bytes(b"")
    monkeypatch.setattr(library, "_FOLDER", tmp_path)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with pytest.raises(RuntimeError, match=r"_kernels_avx512.*was not tried"):
        library._open(None)


def test_nothing_but_damaged_libraries_is_a_reason(tmp_path: Path) -> None:
    for path in _copies(tmp_path):
        path.write_bytes(b"no library" * 100)
    assert "is damaged" in _loaded_from(tmp_path).partition("{")[0]
