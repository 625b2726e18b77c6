"""Example inputs for MODEL: by kind of torchvision model, by size, or from the user's own function."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bnrestructure.core.errors import UsageError
from bnrestructure.core.memory_format import to_channels_last
from bnrestructure.kernels import registry
from bnrestructure.models.models import builder_module, call_factory, load_factory

__all__ = ["example_inputs", "on_gpu"]

#: Models that take one input size only, or need one this large.
_SIZES = {
    "inception_v3": 299,
    "quantized_inception_v3": 299,
    "maxvit_t": 224,
    "s3d": 224,
    "mvit_v1_b": 224,
    "mvit_v2_s": 224,
}
_VIDEO_FRAMES = 16
_CLASSES = 5


def example_inputs(
    model_name: str, model: Any, *, batch: int, size: tuple[int, ...] | None, source: str | None, small: bool = False
) -> tuple[Any, ...]:
    """The model's arguments, with targets for detection models. ``size`` is [C,] [T,] H, W; ``small`` for runs in
    float64.

    Raises UsageError when ``source`` does not give a tuple, the size has a dimension too many, or they do not fit into memory.
    """
    if source is not None:
        given = call_factory(source, load_factory(source))
        return given if isinstance(given, tuple) else (given,)
    generator = torch.Generator().manual_seed(0)
    kind = builder_module(model_name).removeprefix("torchvision.models.").split(".")[0]
    if kind == "detection":
        image = _image(size, 3, 96 if small else 320)
        _fitting(batch, image)
        return _detection(batch, image, generator)
    if kind == "optical_flow":
        shape = _fitting(batch, _image(size, 3, 128))
        return tuple(torch.rand(batch, *shape, generator=generator) * 2 - 1 for _ in range(2))
    if kind == "video":
        video = _video(size, _SIZES.get(model_name, 32 if small else 112), small)
        return (torch.randn(batch, *_fitting(batch, video), generator=generator),)
    usual, channels = _usual_size(model_name, model, small, kind)
    return (torch.randn(batch, *_fitting(batch, _image(size, channels, usual)), generator=generator),)


def _fitting(batch: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a sample, where this machine's memory could hold a batch of it in float32. Raises UsageError."""
    wanted, memory = 4 * batch * math.prod(shape), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted > memory:
        asked = "x".join(map(str, (batch, *shape)))
        raise UsageError(f"an input of {asked} takes {wanted // 10**9:,} GB, and this machine has {memory // 10**9:,} GB")
    return shape


def on_gpu(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[nn.Module, tuple[Any, ...]]:
    """Both on the GPU, 4-D and 5-D tensors channels_last. Raises UsageError where our kernels cannot run on one."""
    if (reason := registry.unavailable_reason("cuda")) is not None:
        raise UsageError(f"backend 'cuda' was asked for, but {reason}")

    return to_channels_last(model.to("cuda"), pytree.tree_map_only(Tensor, lambda x: x.to("cuda"), inputs))


def _usual_size(model_name: str, model: Any, small: bool, kind: str) -> tuple[int, int]:
    """(height and width, channels)."""
    cfg = getattr(model, "default_cfg", None)  # timm
    if isinstance(cfg, dict) and "input_size" in cfg:
        channels, height, _ = cfg["input_size"]
        return height, channels
    if model_name.startswith("vit_"):
        return int(model.image_size), 3
    small_size = 96 if kind == "segmentation" else 64
    return _SIZES.get(model_name, small_size if small else 224), 3


def _image(size: tuple[int, ...] | None, channels: int, usual: int) -> tuple[int, int, int]:
    match size or (usual,):
        case (n,):
            return channels, n, n
        case (h, w):
            return channels, h, w
        case (c, h, w):
            return c, h, w
    raise UsageError(f"--input-size {'x'.join(map(str, size or ()))} has a dimension too many for this model")


def _video(size: tuple[int, ...] | None, usual: int, small: bool) -> tuple[int, ...]:
    frames = 4 if small and usual < 100 else _VIDEO_FRAMES
    if size is not None and len(size) == 4:
        return size
    c, h, w = _image(size, 3, usual)
    return c, frames, h, w


def _detection(batch: int, shape: tuple[int, int, int], generator: torch.Generator) -> tuple[Any, ...]:
    """Images of slightly different sizes, and for each one two boxes with labels, masks and keypoints."""
    c, h, w = shape
    images = [torch.rand(c, h - 8 * (i % 2), w, generator=generator) for i in range(batch)]
    return images, [_target(image, generator) for image in images]


def _target(image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    _, h, w = image.shape
    boxes = torch.tensor([[0.1, 0.2, 0.6, 0.8], [0.3, 0.1, 0.9, 0.5]]) * torch.tensor([w, h, w, h])
    masks = torch.zeros(2, h, w, dtype=torch.uint8)
    masks[:, h // 4 : h // 2, w // 3 : w // 2] = 1
    keypoints = torch.rand(2, 17, 3, generator=generator) * torch.tensor([w, h, 1.0])
    keypoints[..., 2] = 1
    return {
        "boxes": boxes,
        "labels": torch.randint(1, _CLASSES, (2,), generator=generator).clamp(max=1),
        "masks": masks,
        "keypoints": keypoints,
    }
