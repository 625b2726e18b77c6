"""Numerical equivalence of a restructured model with the original, judged against the original in float64."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from bnrestructure.verify.report import Comparison, VerificationReport
from bnrestructure.verify.verifier import verify

__all__ = ["Comparison", "VerificationReport", "verify"]


class _CallableModule(ModuleType):
    """``bnrestructure.verify`` names a function and this package: importing the package must not hide the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> VerificationReport:
        return verify(*args, **kwargs)


_CallableModule.__call__.__doc__ = verify.__doc__
sys.modules[__name__].__class__ = _CallableModule
