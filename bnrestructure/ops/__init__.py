"""What a fused node means: its arguments, its autograd, and nothing else. Kernels are in ``bnrestructure.kernels``."""

from bnrestructure.ops.average import avg_pool
from bnrestructure.ops.concat import UnchangedOutputs, concat_buffer, own_gradient, unchanged
from bnrestructure.ops.conv import ConvOutputs, conv
from bnrestructure.ops.conv_options import Shortcut
from bnrestructure.ops.residual import ResidualOutputs, residual
from bnrestructure.ops.slots import Slot
from bnrestructure.ops.statistics import FinalizeOutputs, More, Running, StatisticsOutputs, batch_norm, finalize, statistics
from bnrestructure.ops.sweeps import NormaliseOutputs, PoolOutputs, SqueezeOutputs, max_pool, normalise, squeeze
from bnrestructure.ops.synchronise import SynchroniseOutputs, synchronise

__all__ = [
    "ConvOutputs",
    "FinalizeOutputs",
    "More",
    "NormaliseOutputs",
    "PoolOutputs",
    "ResidualOutputs",
    "Running",
    "Shortcut",
    "Slot",
    "SqueezeOutputs",
    "StatisticsOutputs",
    "SynchroniseOutputs",
    "UnchangedOutputs",
    "avg_pool",
    "batch_norm",
    "concat_buffer",
    "conv",
    "finalize",
    "max_pool",
    "normalise",
    "own_gradient",
    "residual",
    "squeeze",
    "statistics",
    "synchronise",
    "unchanged",
]
