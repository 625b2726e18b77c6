"""tune() and prove(): the kernels of a training step timed, or held against float64, now; what was found is kept on disk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bnrestructure.api import restructure
from bnrestructure.core.errors import UsageError, first_line
from bnrestructure.core.generators import preserved_generators
from bnrestructure.kernels import registry, tuning
from bnrestructure.kernels.proof.prover import trusting
from bnrestructure.kernels.tuning import Measurement
from bnrestructure.verification.loss import default_loss

__all__ = ["prove", "tune"]

#: Steps that prove() takes at the most: each may call for kinds that the one before did not.
_MOST_WAVES = 8


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

    A model on a GPU is tuned for ``backend="cuda"``, its kernels timed by the device's own clock (CUDA events), for that model of GPU; the
    candidates run in this process, proved or not. On the CPU times hold for a thread count. Run it with nothing else running. Raises
    UsageError where there is nothing to choose from (no kernels that can run, a model on another device or on several) and when the
    model fails on these inputs.
    """
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    device = _device(model, arguments, "tune")

    def listen(found: Measurement) -> None:
        if progress is not None:
            progress(found.call)

    with trusting(registry.proved(device)), tuning.measuring(listen) as found:
        _step(model, arguments, device, loss_fn, passes)
    return found


def prove(
    model: nn.Module,
    inputs: Any,
    *,
    loss_fn: Callable[[Any], Tensor] | None = None,
    passes: str | Sequence[str] | None = None,
) -> dict[str, str]:
    """Have the kernels of a training step proved now, where they are proved before they are used: on a GPU. Returns what is wrong.

    A restructured model has them proved in the background, while its own forward runs. This is for those who cannot train meanwhile: before
    a CUDA graph is captured, before processes are started that train together. It takes training steps of copies, by which the calls are
    known, and waits until each was held against float64 on the device (kernels/proof). The result is kernel call, in words -> its fault,
    and empty where all is right, as it is on the CPU, where nothing has to be proved. Calls with a fault are answered by the reference.
    Arguments and errors are those of :func:`tune`.
    """
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    device = _device(model, arguments, "prove")
    kernels = registry.proved(device)
    if kernels is None:
        return {}
    for _ in range(_MOST_WAVES):  # once kernels answer, their results may be laid out otherwise: other kinds of calls
        _step(model, arguments, device, loss_fn, passes)
        if not kernels.outstanding:
            break
        if device == "cuda":
            torch.cuda.empty_cache()  # the processes that prove need memory, too
        kernels.wait()
    return kernels.faults()


def _step(
    model: nn.Module, inputs: tuple[Any, ...], device: str, loss_fn: Callable[[Any], Tensor] | None, passes: str | Sequence[str] | None
) -> None:
    """One training step of a restructured copy. The model and the random generators are left untouched."""
    candidate = restructure(copy.deepcopy(model), backend=device, passes=passes).train()
    # As in training, where the first convolution's input takes no gradient.
    arguments = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), inputs)
    with preserved_generators():
        try:
            (loss_fn or default_loss)(candidate(*arguments)).backward()
        except UsageError:
            raise
        except Exception as error:  # a user's forward or loss may raise anything on these inputs
            raise UsageError(f"the model fails on these inputs: {type(error).__name__}: {first_line(error)}") from error


def _device(model: nn.Module, arguments: tuple[Any, ...], purpose: str) -> str:
    """The type of the one device that the model and its inputs are on, if there are kernels for this purpose, a verb, on it."""
    tensors = [*model.parameters(), *(t for t in pytree.tree_leaves(arguments) if isinstance(t, Tensor))]
    devices = sorted({str(t.device) for t in tensors})
    if len(devices) > 1:
        raise UsageError(f"there is nothing to {purpose} on one device: the model and its inputs are on {' and '.join(devices)}")
    device = devices[0].partition(":")[0] if devices else "cpu"
    if device not in ("cpu", "cuda"):
        raise UsageError(f"there is nothing to {purpose}: there are no {device} kernels")
    if (reason := registry.unavailable_reason(device)) is not None:
        raise UsageError(f"there is nothing to {purpose}: {reason}")
    return device
