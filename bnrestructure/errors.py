"""The errors a user of the package can meet. Each message is one line that names the thing at fault."""

from __future__ import annotations

__all__ = ["BNRestructureError", "CaptureError", "NotFullyFusedError", "UsageError"]


class BNRestructureError(Exception):
    """Base of every error of this package."""


class UsageError(BNRestructureError, ValueError):
    """An argument that cannot be used: an unknown backend, pass or model name, an object that is not a Module."""


class CaptureError(BNRestructureError):
    """A module that the tracer cannot follow. Inside ``restructure`` it becomes a reason in the plan."""


class NotFullyFusedError(BNRestructureError):
    """``restructure(model, strict=True)`` and some batch norm is not fully fused."""
