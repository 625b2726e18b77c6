"""The errors a user of the package can meet. Each message is one line that names the thing at fault."""

from __future__ import annotations

from typing import Any

__all__ = [
    "AttributeWrittenError",
    "BNRestructureError",
    "BrokenGraphError",
    "CaptureError",
    "NotFollowedError",
    "NotFullyFusedError",
    "UnsupportedCallError",
    "UsageError",
    "first_line",
]


class BNRestructureError(Exception):
    """Base of every error of this package."""


class UsageError(BNRestructureError, ValueError):
    """An argument that cannot be used: an unknown backend, pass or model name, an object that is not a Module."""


class CaptureError(BNRestructureError):
    """A module that the tracer cannot follow. Inside ``restructure`` it becomes a reason in the plan.

    ``reads``: what its forward had read of attributes by then (capture/reads.py), if that is known.
    """

    reads: Any = None


class AttributeWrittenError(CaptureError):
    """A module whose forward writes to an attribute: each time, or only the first."""


class NotFollowedError(CaptureError):
    """A module whose own code raised an error while it was captured."""


class BrokenGraphError(BNRestructureError):
    """A rule that every graph must keep does not hold after a pass: ``node`` is the name of the node that breaks it. A fault of ours."""

    def __init__(self, pass_name: str, node: str, rule: str, what: str) -> None:
        super().__init__(pass_name, node, rule, what)
        self.pass_name, self.node, self.rule, self.what = pass_name, node, rule, what

    def __str__(self) -> str:
        return f"after {self.pass_name}, node {self.node} breaks the rule {self.rule!r}: {self.what}"


class NotFullyFusedError(BNRestructureError):
    """``restructure(model, strict=True)`` and some batch norm is not fully fused."""


class UnsupportedCallError(BNRestructureError):
    """A kernel call that an implementation cannot answer: a dtype, a layout, or tensors that do not fit each other.

    Raised before anything is written. The reference answers the call then, so that PyTorch's own operators say what is wrong with it.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type's name when the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
