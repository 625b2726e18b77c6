"""torchvision's models by name: built without downloads, with small inputs, or with parameters on the meta device to count sites."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["TOO_LARGE", "batch_norm_models", "build_model", "build_on_meta", "inputs_for"]

#: Models whose fp64 training steps, several copies side by side, do not fit in 24 GiB: counted on the meta device alone.
TOO_LARGE = frozenset({"regnet_y_32gf", "regnet_y_128gf"})


def build_model(name: str) -> nn.Module:
    """The model with random weights from a fixed seed, in training mode; quantizable models as float models."""
    torch.manual_seed(0)
    builder = torchvision.models.get_model_builder(name)
    parameters = inspect.signature(builder).parameters
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in parameters:
        options["weights_backbone"] = None
    if "quantize" in parameters:
        options["quantize"] = False
    if name in ("googlenet", "quantized_googlenet", "inception_v3", "quantized_inception_v3"):
        options["init_weights"] = False  # minutes of truncated normal numbers
    if ".detection" in builder.__module__ and "ssd" not in name:
        options |= {"min_size": 96, "max_size": 160}  # else they enlarge every image to 800 pixels
        if "rcnn" in name:
            options |= {"rpn_post_nms_top_n_train": 64, "box_batch_size_per_image": 32}  # else 512 regions an image
    model = builder(**options).train()
    if name.startswith("vgg"):  # its own head has 119 million parameters and no batch norm: gigabytes for each copy in float64
        model.classifier = nn.Linear(512 * 7 * 7, 10)
    if name == "resnet152":
        _damp_residual_branches(model)
    if name.startswith("keypointrcnn"):
        model.roi_heads.register_forward_pre_hook(_keypoints_in_float32)
    return model


def _damp_residual_branches(model: nn.Module) -> None:
    """Fifty blocks that each double the variance make a step that nothing reproduces: eager's own second step differs from itself by more
    than 1e-9 when its inputs move by one rounding. Blocks that add less, as in a trained network, leave an error to see."""
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.constant_(parameter, 0.2)


def _keypoints_in_float32(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Keypoint heads refuse targets in any other dtype, which would leave nothing to compare with in float64."""
    *rest, targets = args
    if targets is None:
        return None
    with torch._C.DisableTorchFunction():  # verify() has ``float()`` mean float64
        return (*rest, [t | {"keypoints": t["keypoints"].to(torch.float32)} for t in targets])


class _ParametersOnMeta(TorchFunctionMode):
    """Layers allocate on the meta device and do not initialise; other tensors are real (RegNet computes its widths with them)."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.empty:
            kwargs = {**kwargs, "device": "meta"}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs.get("tensor", args[0] if args else None)
        return function(*args, **kwargs)


def build_on_meta(name: str) -> nn.Module:
    """The model with its parameters on the meta device: quick, whatever its size."""
    if "ssd" in name:
        return build_model(name).to("meta")  # small, and runs itself once to learn its channels
    with _ParametersOnMeta():
        return build_model(name).to("meta")


def batch_norm_models() -> list[str]:
    """Every torchvision model with a batch norm layer."""
    return [
        name
        for name in torchvision.models.list_models()
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in build_on_meta(name).modules())
    ]


def _targets(count: int, size: int, generator: torch.Generator, *, masks: bool, keypoints: bool) -> list[dict[str, Tensor]]:
    targets = []
    for _ in range(count):
        corner = torch.rand(2, 2, generator=generator) * size * 0.4
        boxes = torch.cat([corner, corner + size * 0.3 + torch.rand(2, 2, generator=generator) * size * 0.25], 1)
        target = {"boxes": boxes, "labels": torch.tensor([1, 1])}
        if masks:
            target["masks"] = (torch.rand(2, size, size, generator=generator) > 0.5).to(torch.uint8)
        if keypoints:
            inside = boxes[:, None, :2] + torch.rand(2, 17, 2, generator=generator) * (boxes[:, None, 2:] - boxes[:, None, :2])
            target["keypoints"] = torch.cat([inside, torch.ones(2, 17, 1)], 2)
        targets.append(target)
    return targets


def inputs_for(name: str, seed: int = 1) -> tuple[Any, ...]:
    """Small float32 arguments for a training forward of the named model."""
    generator = torch.Generator().manual_seed(seed)
    module = torchvision.models.get_model_builder(name).__module__

    def images(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if ".detection" in module:
        size = 320 if "ssd" in name else 96
        pictures = [torch.rand(3, size, size, generator=generator) for _ in range(2)]
        return pictures, _targets(2, size, generator, masks="mask" in name, keypoints="keypoint" in name)
    if ".segmentation" in module:
        # A batch norm behind a global pool sees one value an image: of two, it only keeps the sign of their difference.
        return (images(4, 3, 65, 65),)
    if ".video" in module:
        frames, size = {"s3d": (16, 224), "mvit_v1_b": (16, 224), "mvit_v2_s": (16, 224)}.get(name, (4, 48))
        return (images(2, 3, frames, size, size),)
    if ".optical_flow" in module:
        return images(1, 3, 128, 128), images(1, 3, 128, 128)
    if "inception_v3" in name:
        return (images(2, 3, 299, 299),)
    if "googlenet" in name:
        return (images(3, 3, 96, 96),)
    if name.startswith("maxvit"):
        return (images(2, 3, 224, 224),)
    return (images(4, 3, 64, 64),)
