"""Building and loading the CPU kernels: incremental, without a compiler, a forced instruction set, one OpenMP pool."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from needs import needs_kernels

from bnrestructure.kernels.cpu import build, library, processor

SOURCE = '#include "answer.h"\nextern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }\n'


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of one source and one header in place of the kernels."""
    try:
        build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "answer.cpp").write_text(SOURCE)
    (folder / "answer.h").write_text("#define ANSWER 41\n")
    monkeypatch.setattr(build, "SOURCES", folder)
    return folder


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def test_a_compiler_means_kernels() -> None:
    """Else a build that fails would pass unseen: the tests of the kernels skip where there are none."""
    try:
        build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    assert library.unavailable_reason() is None


def test_every_target_is_known_to_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BNRESTRUCTURE_CPU_SANITIZE", raising=False)  # `make sanitize` sets it
    assert list(library.CPU_LEVELS) == list(build.INSTRUCTION_SETS)
    assert set(build.targets()) <= set(library.CPU_LEVELS)
    assert library._path("avx2").name == build.library_name("avx2")


def test_rebuilds_only_what_changed(sources: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    made = build.build(output, ["portable"])
    assert [path.name for path in made] == ["_kernels_portable.so"]
    assert build.build(output, ["portable"]) == []
    later = made[0].stat().st_mtime + 10
    (sources / "answer.h").write_text("#define ANSWER 42\n")
    os.utime(sources / "answer.h", (later, later))
    assert build.build(output, ["portable"]) == made
    loaded = python(f"import ctypes; print(ctypes.CDLL({str(made[0])!r}).answer())")
    assert loaded.stdout.strip() == "42"


def test_a_failed_compilation_leaves_no_library(sources: Path, tmp_path: Path) -> None:
    (sources / "answer.h").write_text("#error no answer\n")
    with pytest.raises(build.BuildError, match="no answer"):
        build.build(tmp_path / "out", ["portable"])
    assert not list((tmp_path / "out").glob("*.so"))


def test_an_older_compiler_leaves_out_what_it_does_not_know(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler = build.find_compiler()
    old = tmp_path / "old"
    old.write_text(f'#!/bin/sh\ncase "$*" in *-mavx2*) echo "unrecognized -mavx2" >&2; exit 1;; esac\nexec {" ".join(compiler)} "$@"\n')
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    monkeypatch.setitem(build.INSTRUCTION_SETS, "avx2", ("-mavx2",))
    made = build.build(tmp_path / "out", ["avx2", "portable"])
    assert [path.name for path in made] == ["_kernels_portable.so"]
    assert "no kernels for avx2" in capsys.readouterr().err


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        build.find_compiler()


def test_nothing_built_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_FOLDER", tmp_path)
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.setattr(library, "_failure", None)
    reason = library.unavailable_reason()
    assert reason is not None
    assert "not compiled" in reason
    with pytest.raises(RuntimeError, match="not compiled"):
        library.load()


@needs_kernels
class TestLoading:
    @pytest.mark.parametrize("isa", library.available_isas())
    def test_the_environment_forces_an_instruction_set(self, isa: str) -> None:
        code = "from bnrestructure.kernels.cpu import library; print(library.isa_name())"
        assert python(code, BNRESTRUCTURE_CPU_ISA=isa).stdout.strip() == isa

    @pytest.mark.skipif(not processor.has_bfloat16_tiles(), reason="this processor has no matrix tiles (AMX)")
    def test_matrix_tiles_are_used_where_they_are(self) -> None:
        assert library.available_isas()[0] == "amx"

    def test_an_unknown_instruction_set_is_a_reason(self) -> None:
        code = "from bnrestructure.kernels import cpu; print(cpu.KERNELS.unavailable_reason())"
        assert "unknown instruction set 'sse'" in python(code, BNRESTRUCTURE_CPU_ISA="sse").stdout

    @pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc to read loaded libraries from")
    def test_one_openmp_runtime_is_shared_with_torch(self) -> None:
        code = (
            "import torch\nfrom bnrestructure.kernels import cpu\nfrom bnrestructure.kernels.calls import StatisticsForward\n"
            "cpu.KERNELS.run(StatisticsForward(torch.randn(4, 64, 32, 32)))\n"
            "print(len({l.split()[-1] for l in open('/proc/self/maps') if 'libgomp' in l or 'libomp' in l}))"
        )
        assert python(code).stdout.strip() == "1"
