"""What a forward does around its tensors: gradients off for a part, other parameters in a layer's place, odd numbers, ``.data``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from equivalence import assert_same_training, restructured_copy
from test_semantics_tracing import _Base, _double
from torch import Tensor, nn
from torch.nn import functional as F

import bnrestructure


def _images() -> Tensor:
    return torch.randn(4, 3, 8, 8, dtype=torch.float64)


class SecondReader(_Base):
    """A tensor that is normalised has a second reader, before the first or behind it, with gradients off."""

    def __init__(self, first: bool, kind: str) -> None:
        super().__init__()
        self.first, self.kind, self.other = first, kind, nn.Conv2d(6, 6, 3, padding=1)

    def aside(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            return self.other(y) if self.kind == "conv" else F.relu(y) if self.kind == "relu" else F.max_pool2d(y, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        if self.first:
            z = self.aside(y)
            return self.bn2(self.conv2(y)) + z
        z = self.bn2(self.conv2(y))
        return z + self.aside(y)


@pytest.mark.parametrize("kind", ["conv", "relu", "pool"])
@pytest.mark.parametrize("first", [True, False])
def test_a_reader_without_gradients(first: bool, kind: str) -> None:
    assert_same_training(_double(SecondReader(first, kind)), _images())


class Halves(_Base):
    """A teacher without gradients and a student with them, behind one stem; or a batch norm without any."""

    def __init__(self, normalised: bool) -> None:
        super().__init__()
        self.normalised, self.stem, self.teacher = normalised, nn.Conv2d(3, 3, 1), nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.normalised:
            y = self.conv1(x)
            with torch.no_grad():
                y = self.bn1(y)
            return self.bn2(self.conv2(F.relu(y)))
        with torch.no_grad():
            target = self.teacher(x)
        return self.trunk(x) - target


@pytest.mark.parametrize("normalised", [False, True], ids=["teacher", "batch norm"])
def test_a_part_without_gradients(normalised: bool) -> None:
    assert_same_training(_double(Halves(normalised)), _images())


class Positions(_Base):
    """What is computed with gradients off here depends on none."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            rows = torch.linspace(0, 1, 8, dtype=x.dtype).view(1, 1, -1, 1).cos()
        return self.trunk(x) + rows


def test_what_needs_no_gradient_may_be_computed_without() -> None:
    model = _double(Positions())
    assert_same_training(model, _images())
    rewritten = restructured_copy(model)
    rewritten(_images())
    assert all(site.ran for site in bnrestructure.explain(rewritten).sites)
    assert "the whole model 1" in str(bnrestructure.explain(rewritten))


class Fails(_Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x.detach().flatten()[:1].repeat(2)
            return self.trunk(x) + y[(x.shape[0] - 3) :][0] + torch.stack([*y])[x.shape[0] - 3]


def test_an_error_leaves_gradients_on() -> None:
    model = restructured_copy(_double(Fails()))
    model(_images()[:3])
    with pytest.raises(IndexError):
        model(torch.cat([_images(), _images()]))
    assert torch.is_grad_enabled()


class Hyper(_Base):
    """Calls a layer, or a part, with other parameters than its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.factor = how, nn.Parameter(torch.tensor(2.0))
        self.part = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        if self.how == "layer":
            return self.bn2(torch.func.functional_call(self.conv2, {"weight": self.conv2.weight * self.factor}, (y,)))
        if self.how == "part":
            given = {name: p * self.factor for name, p in self.part.named_parameters()}
            return self.conv2(torch.func.functional_call(self.part, given, (y,)))
        own = self.conv2.weight
        del self.conv2.weight
        self.conv2.weight = own * self.factor
        z = self.conv2(y)
        del self.conv2.weight
        self.conv2.weight = own
        return self.bn2(z)


@pytest.mark.parametrize("how", ["layer", "part", "by hand"])
def test_other_parameters_in_a_layers_place(how: str) -> None:
    assert_same_training(_double(Hyper(how)), _images(), steps=3)


class Siamese(_Base):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.trunk(x) * 2 if x is y else self.trunk(x) - self.trunk(y)


def test_one_tensor_given_twice_is_one() -> None:
    model, x = _double(Siamese()), _images()
    rewritten = restructured_copy(model)
    for given in ((x, x), (x, x.flip(0)), (x, x)):
        torch.testing.assert_close(rewritten(*given), model(*given), rtol=1e-9, atol=1e-12)


class Odd(float):
    def __repr__(self) -> str:
        return f"<{float(self)}>"


class Multiplied(_Base):
    def __init__(self, factor: Any) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, more: Any = 1.0) -> Tensor:
        return self.trunk(x) * self.factor * more


@pytest.mark.parametrize("factor", [np.float64(2.5), np.float32(2.5), np.int64(3), Odd(2.5)], ids=lambda f: type(f).__name__)
def test_numbers_of_other_kinds(factor: Any) -> None:
    assert_same_training(_double(Multiplied(factor)), _images())
    assert_same_training(_double(Multiplied(1.0)), _images(), more=factor)


def test_a_zero_has_a_sign() -> None:
    model, x = _double(Multiplied(1.0)), _images()
    rewritten = restructured_copy(model)
    for more in (0.0, -0.0):
        assert torch.equal(rewritten(x, more).signbit(), model(x, more).signbit())


def _epsilon(m: Any) -> None:
    m.bn1.eps, m.bn2.momentum = np.float64(0.01), np.float32(0.25)


def _tensor_epsilon(m: Any) -> None:
    m.bn1.eps = torch.tensor(0.01)


def _padding(m: Any) -> None:
    m.conv2.padding = tuple(np.array([2, 1]))


@pytest.mark.parametrize("change", [_epsilon, _tensor_epsilon, _padding], ids=lambda f: f.__name__)
def test_layers_with_numbers_of_other_kinds(change: Any) -> None:
    model = _double(Multiplied(1.0))
    change(model)
    assert_same_training(model, _images())


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_default_dtype_that_is_not_the_models(backend: str) -> None:
    torch.manual_seed(0)
    model, x = Multiplied(1.0).train(), torch.randn(4, 3, 8, 8)
    rewritten = restructured_copy(model, backend=backend)
    with _default(torch.float64):
        found, expected = rewritten(x), model(x)
        found.sum().backward()
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class MakesTensors(_Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x) * torch.ones(6, 1, 1).fill_(1 / 3)


def test_a_default_dtype_that_changes() -> None:
    model, x = MakesTensors().train(), torch.randn(4, 3, 8, 8)
    rewritten = restructured_copy(model)
    rewritten(x)
    with _default(torch.float64):
        assert rewritten(x).dtype == model(x).dtype == torch.float64
    assert rewritten(x).dtype == torch.float32


class Averages(_Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.trunk(x)
        self.average.data = self.average.data * 0.9 + y.detach().mean((0, 2, 3)) * 0.1
        return y - self.average.view(-1, 1, 1)


def test_data_that_is_assigned() -> None:
    assert_same_training(_double(Averages()), _images(), steps=3)


class WritesMask(_Base):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.bn1(self.conv1(x))
        mask = torch.empty_like(y.detach()).fill_(0.25)
        if self.how == "comparison":
            mask.copy_(y.detach()).gt_(0)
        elif self.how == "narrower":
            mask = (y.detach() > 0).to(torch.float32)
            mask += y.detach()
        else:
            mask.bernoulli_(0.5)
        return self.conv2(F.relu(y) * (1 - mask)), mask


@pytest.mark.parametrize("how", ["comparison", "narrower", "draws"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_operations_in_place_keep_dtype_and_order(how: str, channels_last: bool) -> None:
    x = _images().to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    model = _double(WritesMask(how))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    torch.manual_seed(1)
    expected = model(x)[1]
    torch.manual_seed(1)
    found = restructured_copy(model)(x)[1]
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


class Dense(_Base):
    def __init__(self) -> None:
        super().__init__()
        self.bn3, self.conv3 = nn.BatchNorm2d(12), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        return self.conv3(F.relu(self.bn3(torch.cat([y, self.conv2(y)], 1))))


def test_an_empty_batch_through_a_concat() -> None:
    model, x = _double(Dense()), torch.randn(0, 3, 8, 8, dtype=torch.float64)
    rewritten = restructured_copy(model)
    for m in (model, rewritten):
        y = m(x)
        y.sum().backward()
        assert y.shape == (0, 4, 8, 8)
    for p, q in zip(model.parameters(), rewritten.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
