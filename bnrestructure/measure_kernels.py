"""tune(): time the candidate kernels on the user's own shapes, and keep the choice on disk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bnrestructure.api import restructure
from bnrestructure.errors import UsageError, first_line
from bnrestructure.kernels import registry, tuning
from bnrestructure.kernels.tuning import Measurement
from bnrestructure.verify.draws import preserved_generators
from bnrestructure.verify.loss import default_loss

__all__ = ["tune"]


def tune(
    model: nn.Module,
    inputs: Any,
    *,
    loss_fn: Callable[[Any], Tensor] | None = None,
    passes: str | Sequence[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Measurement]:
    """Take one training step of a restructured copy of the model, timing each convolution node's candidate kernels in it.

    Returns what was measured, one entry for each node of a new shape; nothing for shapes that were measured before. From then
    on, in this process and in later ones, these nodes run what was the fastest. The measurements are kept in a file that
    ``bnrestructure doctor`` names (see kernels/tuning.py). The model and the random generators are left untouched.

    inputs     a tensor or a tuple of arguments, of the size, dtype and memory format that will be trained on; call within
               ``torch.autocast`` for training under autocast
    loss_fn    ``loss_fn(output)``; by default outputs times fixed random cotangents, or the sum of a dict of losses

    Times hold for a thread count; run it with nothing else running. Raises UsageError where there is nothing to choose from
    (no compiled kernels, a model that is not on the CPU) and when the model fails on these inputs.
    """
    reason = registry.unavailable_reason("cpu")
    if reason is not None:
        raise UsageError(f"there is nothing to tune: {reason}")
    candidate = restructure(copy.deepcopy(model), passes=passes).train()
    devices = {p.device.type for p in candidate.parameters()}
    if devices - {"cpu"}:
        raise UsageError(f"only CPU kernels are tuned, and the model is on {', '.join(sorted(devices))}")
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    # As in training, where the first convolution's input takes no gradient.
    arguments = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), arguments)

    def listen(found: Measurement) -> None:
        if progress is not None:
            progress(found.call)

    with preserved_generators(), tuning.measuring(listen) as found:
        try:
            (loss_fn or default_loss)(candidate(*arguments)).backward()
        except UsageError:
            raise
        except Exception as error:  # a user's forward or loss may raise anything on these inputs
            raise UsageError(f"the model fails on these inputs: {type(error).__name__}: {first_line(error)}") from error
    return found
