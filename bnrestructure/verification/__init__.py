"""Numerical equivalence of a restructured model with the original, judged against the original in float64."""

from bnrestructure.verification.report import Comparison, VerificationReport
from bnrestructure.verification.verifier import verify

__all__ = ["Comparison", "VerificationReport", "verify"]
