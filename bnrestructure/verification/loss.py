"""A loss for models whose real loss is not known: outputs against fixed random cotangents."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bnrestructure.core.errors import UsageError

__all__ = ["default_loss", "named_tensors"]


def named_tensors(tree: Any, name: str) -> dict[str, Tensor]:
    """Every tensor in a pytree under a readable name: ``output``, ``output['aux']``, ``output[0]``."""
    leaves, _ = pytree.tree_flatten_with_path(tree)
    return {name + pytree.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def default_loss(output: Any) -> Tensor:
    """The sum over floating outputs of ``(output * cotangent).sum()``; a dict of scalar losses is added up.

    Cotangents are normal, of length about one for each output, and the same for every run: they depend on place and
    shape alone. They have few enough bits to be exact in bfloat16, so that casting them adds no error to any run.
    """
    floats = {
        name: t for name, t in named_tensors(output, "output").items() if t.is_floating_point() and t.requires_grad
    }
    if not floats:
        raise UsageError("the model's output has no floating tensor with a gradient; pass loss_fn")
    if isinstance(output, dict) and all(t.dim() == 0 for t in floats.values()):
        return torch.stack([t.double() for t in floats.values()]).sum()
    generator = torch.Generator().manual_seed(0)
    return torch.stack([_against_cotangent(t, generator) for t in floats.values()]).sum()


def _against_cotangent(t: Tensor, generator: torch.Generator) -> Tensor:
    cotangent = torch.randn(t.shape, generator=generator, dtype=torch.float64).bfloat16()
    scale = 2.0 ** -round(math.log2(max(t.numel(), 1)) / 2)
    return (t.double() * (cotangent.double() * scale).to(t.device)).sum()
