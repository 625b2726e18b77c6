"""RestructureCallback: what it restructures, and that the plain model is there afterwards, whatever happened."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bnrestructure.capture.swap import is_restructured
from bnrestructure.core.errors import NotFullyFusedError, UsageError

pytestmark = pytest.mark.integrations

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "integrations"))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def made(flat: bool = False, fails: bool = False) -> Any:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[bool] = []
            if flat:
                self.conv, self.bn, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
            else:
                self.net, self.head = net(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if flat:
                return self.head(torch.relu(self.bn(self.conv(x)))).mean((2, 3))
            return self.head(self.net(x))

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            if fails and index == 1:
                raise ArithmeticError("broken step")
            self.seen.append(is_restructured(self if flat else self.net))
            return cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module()


def fit(module: Any, callback: Any) -> Any:
    import lightning
    from tiny import loader

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, callbacks=[callback], **quiet)
    trainer.fit(module, loader(3))
    return trainer


def callback(**options: Any) -> Any:
    from bnrestructure.integrations.lightning import RestructureCallback

    return RestructureCallback(**options)


def test_the_networks_are_restructured_while_fitting() -> None:
    module, own = made(), callback()
    keys = list(module.state_dict())
    fit(module, own)
    assert module.seen == [True, True, True]
    assert not is_restructured(module.net)
    assert type(module.net) is nn.Sequential
    assert list(module.state_dict()) == keys
    assert {name: plan.counts["fused"] for name, plan in own.plans.items()} == {"net": 1}


def test_it_learns_what_the_plain_model_learns() -> None:
    ours, theirs = made(), made()
    theirs.load_state_dict(ours.state_dict())
    import lightning

    fit(ours, callback())
    fit(theirs, lightning.Callback())
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_a_module_whose_own_forward_calls_layers() -> None:
    module = made(flat=True)
    fit(module, callback())
    assert module.seen == [True, True, True]
    assert not is_restructured(module)


def test_after_an_error_the_model_is_plain() -> None:
    module = made(fails=True)
    with pytest.raises(ArithmeticError, match="broken step"):
        fit(module, callback())
    assert module.seen == [True]
    assert not is_restructured(module.net)


def test_submodules_by_name() -> None:
    module = made()
    fit(module, callback(modules=["net"]))
    assert module.seen[0]
    with pytest.raises(UsageError, match="Module has no submodule 'nett' to restructure"):
        fit(made(), callback(modules=["nett"]))


def test_strict_is_restructures() -> None:
    module = made()
    module.net = nn.Sequential(nn.BatchNorm2d(3), *net())
    with pytest.raises(NotFullyFusedError):
        fit(module, callback(strict=True))
    assert not is_restructured(module.net)
