"""
Lightning: RestructureCallback
==============================

One callback. It restructures the network before the strategy wraps it, and gives the original forward back when fitting ends,
so that validation tools, exporters and whoever comes next find the plain model. Checkpoints are those of the plain model
throughout.
"""

from __future__ import annotations

import logging
import warnings

import lightning
import torch
from tiny import build, loader
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bnrestructure.integrations.lightning import RestructureCallback


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net: nn.Module = build()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self.net(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main() -> None:
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    callback = RestructureCallback()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=2, accumulate_grad_batches=2, callbacks=[callback], **quiet)
    model = Classifier()
    trainer.fit(model, loader(8))
    print(callback.plans["net"])
    print(f"loss {trainer.callback_metrics['loss']:.3f}; after fitting it is a plain {type(model.net).__name__} again")


if __name__ == "__main__":
    main()
