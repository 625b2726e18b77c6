"""Restructured batch normalisation for training CNNs: the statistics ride on the convolution before, the rest on the one after.

After Jung et al., "Restructuring Batch Normalization to Accelerate CNN Training", arXiv 1807.01702.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnrestructure.api import explain, restructure, unrestructure
    from bnrestructure.core.errors import BNRestructureError, CaptureError, NotFullyFusedError, UsageError
    from bnrestructure.measure_kernels import prove, tune
    from bnrestructure.plan.plan import Plan, Site
    from bnrestructure.verification import VerificationReport, verify

    __version__: str

__all__ = [
    "BNRestructureError",
    "CaptureError",
    "NotFullyFusedError",
    "Plan",
    "Site",
    "UsageError",
    "VerificationReport",
    "explain",
    "prove",
    "restructure",
    "tune",
    "unrestructure",
    "verify",
]

_HOMES = {
    "bnrestructure.api": ("explain", "restructure", "unrestructure"),
    "bnrestructure.core.errors": ("BNRestructureError", "CaptureError", "NotFullyFusedError", "UsageError"),
    "bnrestructure.plan.plan": ("Plan", "Site"),
    "bnrestructure.measure_kernels": ("prove", "tune"),
    "bnrestructure.verification": ("VerificationReport", "verify"),
}


def __getattr__(name: str) -> Any:
    """Load on first use: ``import bnrestructure`` and ``bnrestructure --help`` must not wait for torch."""
    import importlib

    if name == "__version__":
        from importlib.metadata import version

        return version("bnrestructure")
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(home), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
