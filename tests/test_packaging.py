"""What is installed: one wheel for every Python and PyTorch of a platform, its version from the tags, every package in it."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import bnrestructure

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "bnrestructure" / "kernels" / "cpu" / "src"


@pytest.fixture
def distribution(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The Distribution that setup.py describes."""
    from distutils.core import run_setup

    import setuptools  # noqa: F401 (it brings distutils)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["setup.py", "--name"])
    return run_setup("setup.py", stop_after="init")


@pytest.mark.filterwarnings("ignore:setuptools-scm writes version files")
def test_a_wheel_is_for_every_python_of_its_platform(distribution: Any) -> None:
    distribution.script_name = "setup.py"
    wheel = distribution.get_command_obj("bdist_wheel")
    wheel.ensure_finalized()
    python, abi, platform = wheel.get_tag()
    assert (python, abi) == ("py3", "none")
    assert platform != "any"


def test_neither_pythons_nor_torchs_headers_are_compiled_in() -> None:
    """That is what the wheel's tag promises."""
    included = {name for path in SOURCES.iterdir() for name in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.M)}
    own = {path.name for path in SOURCES.iterdir()}
    system = {"cpuid.h", "immintrin.h", "sys/syscall.h", "unistd.h"}
    others = {name for name in included - own - system if "." in name or "/" in name}  # the C++ library's have neither
    assert not others


def test_every_package_is_listed() -> None:
    """A folder that pyproject.toml does not name is missing from wheels and there in an editable installation."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "bnrestructure").rglob("*.py")}
    assert found | {"bnrestructure.passes", "bnrestructure.patterns"} == listed


def test_the_version_is_the_installations() -> None:
    assert re.fullmatch(r"\d+\.\d+.*", bnrestructure.__version__)


def test_the_changelog_has_a_place_for_what_comes_next() -> None:
    """https://keepachangelog.com: sections of fixed names under versions."""
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## \[Unreleased\]$", text, re.M)
    assert set(re.findall(r"^### (.+)$", text, re.M)) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
