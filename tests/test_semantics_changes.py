"""What changes between two steps, an attribute, a layer, a hook, a weight, a tensor of any kind: the next step sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from equivalence import assert_same_training, assert_same_values, restructured_copy, training_step
from test_semantics_tracing import _Base, _double
from torch import Tensor, nn
from torch.nn import functional as F

import bnrestructure


class Configurable(_Base):
    def __init__(self) -> None:
        super().__init__()
        self.rate, self._scale, self.widths, self.config = 0.0, 1.0, [1.0, 2.0], {"power": 1}

    def forward(self, x: Tensor) -> Tensor:
        y = self.trunk(x) * self._scale * sum(self.widths)
        return F.dropout(y, self.rate, self.training) ** self.config["power"]


def _set_rate(m: Any) -> None:
    m.rate = 0.5


def _set_private(m: Any) -> None:
    m._scale = 3.0


def _set_item(m: Any) -> None:
    m.widths[0] = 5.0


def _set_key(m: Any) -> None:
    m.config["power"] = 3


def _set_momentum(m: Any) -> None:
    m.bn1.momentum, m.bn2.eps = 0.7, 0.1


def _freeze(m: Any) -> None:
    m.bn1.eval()


def _stop_tracking(m: Any) -> None:
    m.bn1.track_running_stats = False


def _replace_layer(m: Any) -> None:
    torch.manual_seed(3)
    m.conv2 = nn.Conv2d(6, 6, 1, bias=False).double()


def _replace_norm(m: Any) -> None:
    m.bn2 = nn.GroupNorm(2, 6).double()


def _replace_forward(m: Any) -> None:
    own = m.bn2.forward
    m.bn2.forward = lambda x: own(x) * 2


def _replace_model_forward(m: Any) -> None:
    own = m.forward
    m.forward = lambda x: own(x) * 2


def _add_hook(m: Any) -> None:
    m.bn1.register_forward_hook(lambda module, args, output: output * 2)


def _change_stride(m: Any) -> None:
    m.conv2.stride = (2, 2)


def _replace_weight(m: Any) -> None:
    m.conv1.weight = nn.Parameter(m.conv1.weight.detach() * 2)


def _drop_bias(m: Any) -> None:
    m.conv1.bias, m.bn1.bias = None, None


def _freeze_weights(m: Any) -> None:
    m.conv1.requires_grad_(False)
    m.bn2.requires_grad_(False)


CHANGES = [
    _set_rate, _set_private, _set_item, _set_key, _set_momentum, _freeze, _stop_tracking, _replace_layer, _replace_norm,
    _replace_forward, _replace_model_forward, _add_hook, _change_stride, _replace_weight, _drop_bias, _freeze_weights,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__.strip("_"))
def test_change_between_steps_is_noticed(change: Any) -> None:
    model, x = _double(Configurable()), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    assert_same_training(model, x, steps=3, between=lambda m, step: change(m) if step == 0 else None)


def test_hook_removed_between_steps() -> None:
    model, x = _double(Configurable()), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    rewritten = restructured_copy(model)
    handles = [m.bn1.register_forward_hook(lambda module, args, output: output * 2) for m in (model, rewritten)]
    assert_same_values(training_step(rewritten, x), training_step(model, x))
    for handle in handles:
        handle.remove()
    assert_same_values(training_step(rewritten, x), training_step(model, x))


class Scaled(_Base):
    """Multiplies by a tensor that is no parameter and no buffer, or by one that is; ``asks`` is what its code asks of it first."""

    def __init__(self, scale: Any, asks: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        if type(scale) is Tensor and scale.requires_grad:
            self.register_buffer("scale", scale.detach())
        else:
            self.scale = scale
        self.asks = asks

    def forward(self, x: Tensor) -> Tensor:
        y = self.trunk(x)
        if self.asks is not None and not self.asks(self):
            return y + 1
        return y * self.scale


def _tensor(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.full(shape, 3.0, dtype=dtype)


def _buffer() -> Tensor:
    return _tensor(6, 1, 1).requires_grad_()


def _parameter() -> nn.Parameter:
    return nn.Parameter(_tensor(6, 1, 1))


@pytest.mark.parametrize("inside", [False, True], ids=["the model's", "a part's"])
def test_a_tensor_that_is_no_buffer_is_looked_up(inside: bool) -> None:
    scaled = Scaled(_tensor(6, 1, 1))
    model = nn.Sequential(scaled, nn.BatchNorm2d(6)) if inside else scaled

    def change(m: Any, step: int) -> None:
        (m[0] if inside else m).scale = _tensor(6, 1, 1) * step

    assert_same_training(_double(model), torch.randn(4, 3, 8, 8, dtype=torch.float64), steps=3, between=change)


def _delete(m: Any) -> None:
    del m.scale


def _make_buffer(m: Any) -> None:
    scale = m.scale
    del m.scale
    m.register_buffer("scale", scale)


def _set(value: Callable[[], Any]) -> Callable[[Any], None]:
    def change(m: Any) -> None:
        m.scale = value()

    return change


def _is_there(m: Any) -> bool:
    return m.scale is not None


#: (the tensor, what the code asks of it, what happens to it between two steps)
TENSORS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any] | None, Callable[[Any], None]]] = {
    "another shape": (lambda: _tensor(6, 1, 1), lambda m: m.scale.shape[0] == 6, _set(lambda: _tensor(1))),
    "another shape of a buffer": (_buffer, lambda m: m.scale.dim() == 3, _set(lambda: _tensor(1))),
    "another dtype": (lambda: _tensor(6, 1, 1), lambda m: m.scale.dtype is torch.float64, _set(lambda: _tensor(6, 1, 1).float())),
    "none": (lambda: _tensor(6, 1, 1), _is_there, _set(lambda: None)),
    "no buffer": (_buffer, _is_there, _set(lambda: None)),
    "no parameter": (_parameter, _is_there, _set(lambda: None)),
    "a frozen parameter": (_parameter, lambda m: m.scale.requires_grad, lambda m: m.scale.requires_grad_(False)),
    "deleted": (lambda: _tensor(6, 1, 1), lambda m: hasattr(m, "scale"), _delete),
    "a deleted buffer": (_buffer, lambda m: hasattr(m, "scale"), _delete),
    "a buffer from now on": (lambda: _tensor(6, 1, 1), None, _make_buffer),
    "a number that becomes a tensor": (lambda: 1, None, _set(lambda: _tensor(6, 1, 1))),
    "a tensor that becomes a number": (lambda: _tensor(6, 1, 1), None, _set(lambda: 2.0)),
}


@pytest.mark.parametrize("name", TENSORS)
def test_what_is_asked_of_a_tensor_may_change(name: str) -> None:
    scale, asks, change = TENSORS[name]
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    assert_same_training(_double(Scaled(scale(), asks)), x, steps=3, between=lambda m, step: change(m) if step == 0 else None)


def test_a_tensor_that_is_gone_raises_what_eager_raises() -> None:
    model = restructured_copy(_double(Scaled(_tensor(6, 1, 1))))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    training_step(model, x)
    del model.scale
    with pytest.raises(AttributeError, match="'Scaled' object has no attribute 'scale'"):
        model(x)


class _Debugged(_Base):
    """Reads values, which no graph can, while a flag is set."""

    def __init__(self) -> None:
        super().__init__()
        self.debug = True

    def forward(self, x: Tensor) -> Tensor:
        if self.debug and float(x.detach().mean()) > 1e9:
            raise ArithmeticError("it explodes")
        y: Tensor = self.trunk(x)
        return y * 2.0


def test_a_part_is_looked_at_again_when_what_could_not_be_followed_may_be_gone() -> None:
    model = _Debugged().double()
    rewritten = restructured_copy(model)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    for debug, ran in ((True, False), (True, False), (False, True), (True, True), (False, True)):
        model.debug = rewritten.debug = debug
        assert_same_values(training_step(rewritten, x), training_step(model, x))
        assert all(site.ran for site in bnrestructure.explain(rewritten).sites) is ran
    assert bnrestructure.explain(rewritten).captures == {"the whole model": 2}
