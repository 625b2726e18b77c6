"""What some tests need of the machine; without it they are skipped, for the reason that stands beside each."""

from __future__ import annotations

from importlib import util

import pytest
import torch

from bnrestructure.kernels import registry

#: PyTorch for macOS and Windows comes without Triton; on Linux it is always there, and these tests run.
needs_triton = pytest.mark.skipif(util.find_spec("triton") is None, reason="triton is not installed")

#: Without a compiler the package installs all the same, without these kernels: there is nothing to test then. With a
#: compiler they must be there: tests/kernels/test_cpu_build.py says so.
needs_kernels = pytest.mark.skipif(
    registry.unavailable_reason("cpu") is not None, reason=f"no CPU kernels: {registry.unavailable_reason('cpu')}"
)

#: These are about what is said where there is no GPU, as in CI. On a machine with one the same call works instead.
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
