"""Inputs to follow a forward() with where nobody has called it yet: what its first layer seems to want."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bnrestructure.capture.arguments import Arguments
from bnrestructure.graph.boundaries import is_library_leaf

__all__ = ["guessed_arguments"]

#: Sizes to try of images, signals and volumes: the usual one first, then what smaller and larger inputs are built for.
_SIZES: dict[int, tuple[int, ...]] = {1: (256, 16000), 2: (224, 32, 28, 299, 64, 512), 3: (16, 32, 64)}
_TOKENS, _LAYERS_TO_TRY = -1, 12
_LAYERS: dict[type[nn.Module], int] = {
    nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3, nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3,
    nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3,
}  # fmt: skip


def guessed_arguments(module: nn.Module, forward: Callable[..., Any]) -> Iterator[Arguments]:
    """Calls that ``forward(module, ...)`` might take, likeliest first: one tensor, without data, for each required argument."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    required = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    keyword = [p.name for p in parameters if p.default is p.empty and p.kind is p.KEYWORD_ONLY]
    optional = any(p.kind in (p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)
    count = len(required) or int(optional and not keyword)
    if count + len(keyword) == 0:
        yield Arguments((), {})
        return
    for x in _tensors(module):
        yield Arguments((x,) * count, dict.fromkeys(keyword, x))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    home = next(module.parameters(), torch.empty(0, dtype=torch.get_default_dtype()))
    for shape, dtype in dict.fromkeys(_shapes(module)):
        with FakeTensorMode():
            x = torch.empty(shape, dtype=dtype or home.dtype, device=home.device)
        yield x


def _shapes(module: nn.Module) -> Iterator[tuple[tuple[int, ...], torch.dtype | None]]:
    """Shapes, and dtypes where they are not the parameters': which of the layers comes first, nobody knows before the forward runs."""
    layers = [m for m in module.modules() if _dimensions(m) or isinstance(m, nn.Linear | nn.Embedding)]
    wants = [_wants(m) for m in layers[:_LAYERS_TO_TRY]] + _functional(module)[:_LAYERS_TO_TRY]
    wanted = list(dict.fromkeys(want for want in wants if want is not None)) or [(2, 3)]
    for i, (dimensions, size) in enumerate(wanted):
        if dimensions == _TOKENS:
            yield (2, 16), torch.long
        elif dimensions == 0:
            yield (2, size), None
            yield (2, 16, size), None
        else:
            for n in _SIZES[dimensions][: 1 if i else None]:
                yield (2, size, *[n] * dimensions), None
    for dimensions, size in wanted[1:]:
        if dimensions > 0:
            yield from [((2, size, *[n] * dimensions), None) for n in _SIZES[dimensions][1:]]


def _functional(module: nn.Module) -> list[tuple[int, int] | None]:
    """What convolutions by function would read, with the parameters that belong to no layer: [C_out, C_in, *kernel]."""
    own = [p for m in module.modules() if not is_library_leaf(m) for p in m.parameters(recurse=False)]
    return [(p.dim() - 2, p.shape[1]) for p in own if 3 <= p.dim() <= 5]


def _wants(m: nn.Module) -> tuple[int, int] | None:
    """(spatial dimensions, channels or features) of what a layer reads."""
    if isinstance(m, nn.Embedding):
        return _TOKENS, 0
    if isinstance(m, nn.Linear):
        return 0, m.in_features
    found = getattr(m, "in_channels", None) or getattr(m, "num_features", None)
    return (_dimensions(m), found) if isinstance(found, int) else None


def _dimensions(m: nn.Module) -> int:
    """The number of spatial dimensions of what a convolution or a batch norm reads; 0 for any other layer."""
    return next((dimensions for kind, dimensions in _LAYERS.items() if isinstance(m, kind)), 0)
