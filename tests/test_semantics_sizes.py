"""Sizes that decide in other ways than by a comparison: as text, by their type, by an error; and layers named as functions are."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from equivalence import assert_same_training, assert_same_values, restructured_copy, training_step
from stems import stem
from torch import Tensor, nn
from torch.nn import functional as F

import bnrestructure


class _Net(nn.Module):
    """A stem, two heads that a size may choose between, and a body that does."""

    def __init__(self, body: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = stem(4)
        self.h6, self.h8 = (nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(2))
        self.heads = nn.ModuleDict({"6": self.h6, "8": self.h8})
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x, self.stem(x))


def _division(m: Any, x: Tensor, y: Tensor) -> Tensor:
    try:
        factor = 6 // (x.shape[2] - 6)
    except ZeroDivisionError:
        factor = 5
    return m.h6(y) * factor


def _pair(size: Any) -> tuple[Any, Any]:
    return (size, size) if type(size) is int else size


#: What decides by a size that is not compared with anything.
DECIDING: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "a key": lambda m, x, y: m.heads[str(x.shape[2])](y),
    "an attribute's name": lambda m, x, y: getattr(m, f"h{x.shape[-1]}")(y),
    "an attribute's name, of another tensor": lambda m, x, y: getattr(m, f"h{y.size(2)}")(y),
    "a name by %": lambda m, x, y: getattr(m, "h%d" % x.shape[2])(y),  # noqa: UP031  (as people write it)
    "a name by %s": lambda m, x, y: getattr(m, "h%s" % x.shape[2])(y),  # noqa: UP031
    "a name by format": lambda m, x, y: getattr(m, "h{}".format(x.shape[2]))(y),  # noqa: UP032
    "a number read from text": lambda m, x, y: m.h6(y) * float(f"{x.shape[2]}"),
    "text in text": lambda m, x, y: m.h6(y) if "8" in repr(x.shape) else m.h8(y),
    "a message that is looked at": lambda m, x, y: m.h6(y) if len(f"size {x.shape[2] * 10}") > 8 and f"{x.shape[3]}" == "8" else m.h8(y),
    "a division by zero": _division,
    "numpy": lambda m, x, y: m.h6(y) * float(np.sqrt(x.shape[2]) + np.prod(y.shape[1:])),
}


@pytest.mark.parametrize("body", DECIDING)
def test_a_size_decides_for_sizes_like_it(body: str) -> None:
    model = _Net(DECIDING[body]).double()
    rewritten = restructured_copy(model)
    for side in (6, 8, 6):
        x = torch.randn(3, 3, side, side, dtype=torch.float64)
        assert_same_values(training_step(rewritten, x), training_step(model, x))
    plan = bnrestructure.explain(rewritten)
    assert plan.captures["the whole model"] == 2
    assert plan.sites[0].ran  # the stem; of the heads one runs at a time


def _merged(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """As a U-Net adds what has lost a row on its way down."""
    up = F.interpolate(F.max_pool2d(y, 2), scale_factor=2.0)
    try:
        y = y + up
    except RuntimeError:
        y = y + F.pad(up, (0, 1, 0, 1))
    return m.h6(y)


@pytest.mark.parametrize("sides", [(6, 7, 6), (7, 6, 7)], ids=str)
def test_what_a_size_raises_may_be_caught(sides: tuple[int, ...]) -> None:
    model = _Net(_merged).double()
    rewritten = restructured_copy(model)
    for side in sides:
        x = torch.randn(3, 3, side, side, dtype=torch.float64)
        assert_same_values(training_step(rewritten, x), training_step(model, x))
    assert bnrestructure.explain(rewritten).captures["the whole model"] == 2


def _repeated(m: Any, parts: Any) -> Tensor:
    return torch.cat([m.h6(part) for part in parts])


#: What goes through the parts of a tensor, as many as follow from a size.
PARTS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "images": lambda m, x, y: _repeated(m, [t[None] for t in y]),
    "images, unbound": lambda m, x, y: _repeated(m, [t[None] for t in y.unbind()]),
    "images, with their number": lambda m, x, y: _repeated(m, [t[None] * (i + 1) for i, t in enumerate(torch.unbind(y, 0))]),
    "twos of images": lambda m, x, y: _repeated(m, y.split(2)),
    "chunks of images": lambda m, x, y: _repeated(m, torch.chunk(y, 3, dim=0)),
    "rows": lambda m, x, y: m.h6(torch.stack(y.unbind(2), 2)),
}


@pytest.mark.parametrize("body", PARTS)
def test_the_number_of_parts_follows_from_a_size(body: str) -> None:
    model = _Net(PARTS[body]).double()
    rewritten = restructured_copy(model)
    for n, side in ((4, 6), (6, 6), (3, 8), (4, 6)):
        x = torch.randn(n, 3, side, side, dtype=torch.float64)
        assert_same_values(training_step(rewritten, x), training_step(model, x))


def _attention(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """Heads and channels are as many as the layers have, whatever the size."""
    n, c, h, w = y.shape
    q, k, v = m.qkv(y.flatten(2).transpose(1, 2)).reshape(n, h * w, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
    one, other = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, h * w, c).transpose(1, 2).view(n, c, h, w), y
    left, right = m.h8(y).chunk(2, 1)
    return m.h6(one + other) + torch.cat([right, left], 1)


def test_parts_that_follow_from_layers_need_no_other_capture() -> None:
    model = _Net(_attention)
    model.qkv = nn.Linear(4, 12)
    model = model.double()
    rewritten = restructured_copy(model)
    for side in (6, 8, 10):
        x = torch.randn(3, 3, side, side, dtype=torch.float64)
        assert_same_values(training_step(rewritten, x), training_step(model, x))
    assert bnrestructure.explain(rewritten).captures["the whole model"] == 1


#: What asks for the type of a tensor or of a size.
KINDS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "a size": lambda m, x, y: m.h6(y) if type(x.shape[2]) is int else m.h8(y),
    "a size, elsewhere": lambda m, x, y: m.h6(F.interpolate(y, _pair(x.shape[2]), mode="nearest")),
    "all sizes": lambda m, x, y: m.h6(y) if type(x.shape) is torch.Size else m.h8(y),
    "the input": lambda m, x, y: m.h6(y) if type(x) is Tensor else m.h8(y),
    "a result": lambda m, x, y: {Tensor: m.h6, list: m.h8}[type(y)](y),
    "a module": lambda m, x, y: m.h6(y) if type(m.h6) is nn.Sequential and isinstance(type(m.h6), type) else m.h8(y),
}


@pytest.mark.parametrize("body", KINDS)
def test_a_type_is_what_it_is_in_eager_mode(body: str) -> None:
    model = _Net(KINDS[body]).double()
    rewritten = restructured_copy(model)
    for side in (6, 8):
        x = torch.randn(3, 3, side, side, dtype=torch.float64)
        assert_same_values(training_step(rewritten, x), training_step(model, x))
    assert bnrestructure.explain(rewritten).captures["the whole model"] == 1
    assert "type" not in globals()


def _logged(m: Any, x: Tensor, y: Tensor) -> Tensor:
    logging.getLogger(__name__).warning("sizes %s", x.shape)
    return m.h6(y)


def _warned(m: Any, x: Tensor, y: Tensor) -> Tensor:
    warnings.warn(f"{tuple(x.shape)}: a height of " + str(x.shape[2]), stacklevel=2)
    return m.h6(y)


def _raising(m: Any, x: Tensor, y: Tensor) -> Tensor:
    try:
        if x.dim() == 4:
            raise KeyError("sizes {} and {}".format(x.shape, y.shape[2]))  # noqa: UP032
    except KeyError:
        y = y * 2
    return m.h6(y)


def _asserted(m: Any, x: Tensor, y: Tensor) -> Tensor:
    torch._assert(x.shape[2] % 2 == 0, f"a height of {x.shape[2]} should be even")
    assert x.shape[3] % 2 == 0, f"and so should a width of {x.shape[3]}"
    return m.h6(y)


def _printed(m: Any, x: Tensor, y: Tensor) -> Tensor:
    print("sizes", x.shape, f"{y.shape[2]:>4}", "%s" % y.shape[3])  # noqa: UP031
    return m.h6(y)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("body", [_asserted, _printed, _warned, _raising, _logged])
def test_a_message_decides_nothing(body: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    model = _Net(body).double()
    rewritten = restructured_copy(model)
    for side in (6, 8, 10, 12):
        x = torch.randn(3, 3, side, side, dtype=torch.float64)
        assert_same_values(training_step(rewritten, x), training_step(model, x))
    assert bnrestructure.explain(rewritten).captures["the whole model"] == 1


def test_text_of_code_without_source_decides() -> None:
    """Nobody can tell what becomes of it."""
    namespace: dict[str, Any] = {"print": str}
    exec("def body(m, x, y):\n    return m.heads[print(x.shape[2])](y)", namespace)
    model = _Net(namespace["body"]).double()
    rewritten = restructured_copy(model)
    for side in (6, 8):
        x = torch.randn(3, 3, side, side, dtype=torch.float64)
        assert_same_values(training_step(rewritten, x), training_step(model, x))


@pytest.mark.parametrize("name", ["new_conv", "conv_like", "detach", "conv"])
def test_a_layer_may_be_called_like_a_function_that_takes_no_gradient(name: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, nn.Conv2d(3, 4, 3, padding=1))
            self.norm, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.get_submodule(name)(x)
            with torch.no_grad():
                attention = y.sigmoid()
            return self.last(F.relu(self.norm(y))) * attention

    assert_same_training(Named().double(), torch.randn(3, 3, 6, 6, dtype=torch.float64))


@pytest.mark.parametrize("layer", [nn.AvgPool2d(2), nn.Flatten(2), nn.GLU(1)], ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("name", ["dropout", "gelu", "silu", "clone", "layer"])
def test_a_layer_may_be_called_like_a_function_that_keeps_the_shape(name: str, layer: nn.Module) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = stem(4)
            self.add_module(name, layer)

        def forward(self, x: Tensor) -> Tensor:
            y = self.get_submodule(name)(self.stem(x))
            return y.reshape(y.shape[0], y.shape[1], -1) * y.shape[2]

    assert_same_training(Named().double(), torch.randn(3, 3, 6, 6, dtype=torch.float64))


def test_a_weight_of_another_shape_is_noticed() -> None:
    """Pruning by assignment to ``data`` leaves the layer's own numbers as they were."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(3, 8, 1, bias=False)
            self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([F.relu(norm(conv(x))) for norm, conv in zip(self.norms, (self.a, self.b), strict=True)], 1)

    model = Wide().double()
    rewritten = restructured_copy(model)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    assert_same_values(training_step(rewritten, x), training_step(model, x))
    for m in (model, rewritten):
        m.a.weight.data = m.a.weight.data[:4].clone()
        m.a.weight.grad = None
        m.norms[0] = nn.BatchNorm2d(4).double()
    assert_same_values(training_step(rewritten, x), training_step(model, x))


def test_where_a_tensor_begins_in_memory() -> None:
    """A forward that asks runs as it was."""

    class Offsets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = stem(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.stem(x) * (1 + x.storage_offset())

    model = Offsets().double()
    rewritten = restructured_copy(model)
    whole = torch.randn(6, 3, 6, 6, dtype=torch.float64)
    for x in (whole[:3], whole[3:]):
        assert_same_values(training_step(rewritten, x), training_step(model, x))
