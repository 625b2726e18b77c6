"""One file per rewrite, and the pipeline that runs them in order."""

from bnrestructure.passes.base import Fuel, Pass, PassResult, Rule
from bnrestructure.passes.pipeline import LADDER, PASSES, resolve, run

__all__ = ["LADDER", "PASSES", "Fuel", "Pass", "PassResult", "Rule", "resolve", "run"]
