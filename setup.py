"""Compiles the CPU kernels on install; everything else about the package is in pyproject.toml.

The kernels need a C++ compiler but no torch headers. Without one, or when it fails, the package installs all the same,
says so, and uses its reference kernels. ``BNRESTRUCTURE_REQUIRE_KERNELS=1`` makes that an error: a wheel for others must
hold the kernels of every instruction set.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

PACKAGE = "bnrestructure.kernels.cpu"
FOLDER = Path(__file__).parent.joinpath(*PACKAGE.split("."))


def kernel_build() -> ModuleType:
    """kernels/cpu/build.py, loaded by its path: importing the package would import torch, which is not there yet."""
    spec = importlib.util.spec_from_file_location("kernel_build", FOLDER / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class BuildKernels(build_py):
    """Adds the compiled libraries to what a wheel holds, or, in an editable install, puts them next to the sources."""

    def run(self) -> None:
        super().run()
        build = kernel_build()
        output = FOLDER if self.editable_mode else Path(self.build_lib).joinpath(*PACKAGE.split("."))
        objects = Path(self.get_finalized_command("build").build_temp) / "kernels"
        required = os.environ.get("BNRESTRUCTURE_REQUIRE_KERNELS") == "1"
        try:
            build.build(output, objects=objects)
        except build.BuildError as error:
            if required:
                raise
            message = "the CPU kernels were not built; the reference kernels will be used."
            print(f"warning: {message}\n{error}", file=sys.stderr)
        missing = [isa for isa in build.targets() if not (output / build.library_name(isa)).exists()]
        if required and missing:
            raise build.BuildError(f"no kernels were built for {', '.join(missing)}")


class PlatformWheel(bdist_wheel):
    """One wheel for every Python and PyTorch on a platform: the libraries are called through ctypes and know neither."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


class WithLibraries(Distribution):
    """The wheel holds machine code, so its name must say for which machine."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildKernels, "bdist_wheel": PlatformWheel}, distclass=WithLibraries)
