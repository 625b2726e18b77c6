"""ATen's product between the sweeps of this device: one launch adds up the last sweep's sums and converts the weight's gradient."""

from __future__ import annotations

from torch import Tensor

from bnrestructure.core.edges import ConvGradients
from bnrestructure.kernels import hybrid
from bnrestructure.kernels.calls import ConvBackward
from bnrestructure.kernels.cuda.residual import residual_backward
from bnrestructure.kernels.cuda.sums import Sums
from bnrestructure.kernels.cuda.sweeps import normalise_backward

__all__ = ["Hybrid"]


class Hybrid(hybrid.Hybrid):
    """See :class:`bnrestructure.kernels.hybrid.Hybrid`."""

    def finish(self, call: ConvBackward, factor: float, g: Tensor | None, dw: Tensor | None, db: Tensor | None) -> ConvGradients:
        """The gradients."""
        if g is None or dw is None or (call.join is None and call.transform.mean is None):
            return super().finish(call, factor, g, dw, db)
        sums, more = Sums(), call.accumulate
        weight = sums.restored(dw, call.weight, factor)
        if call.join is not None:
            of = *call.join.operands[:-1], call.x, call.join.act
            dx, *found = residual_backward(g, None, *of, factor=1 / factor, more=more, sums=sums)
            gradients = ConvGradients(dx, found[0], found[1], None, weight, db, found[2])
        else:
            dx, *found = normalise_backward(g, call.x, call.transform, accumulate=more, factor=1 / factor, sums=sums)
            gradients = ConvGradients(dx, found[0], found[1], found[2], weight, db)
        sums.finish()
        return gradients
