"""A batch of real photographs for the examples: crops of the two that scikit-learn ships (a temple, a flower)."""

from __future__ import annotations

import torch
from sklearn.datasets import load_sample_images
from torch import Tensor

# What torchvision's own ImageNet models are trained with.
_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def photo_batch(count: int, size: int) -> tuple[Tensor, Tensor]:
    """``count`` normalised crops [count, 3, size, size] (float32, channels_last), and each one's photo [count], int64.

    The crops alternate between the photos and step across them, so that no two are alike. ``size`` is at most 427, the
    height of the photos.
    """
    photos = [torch.tensor(image).permute(2, 0, 1).float() / 255 for image in load_sample_images().images]
    crops = []
    for i in range(count):
        photo = (photos[i % 2] - _MEAN) / _STD
        room = min(photo.shape[1:]) - size
        start = room * (i // 2) // max(1, (count - 1) // 2)
        crops.append(photo[:, start : start + size, start : start + size])
    labels = torch.arange(count) % 2
    return torch.stack(crops).contiguous(memory_format=torch.channels_last), labels
