"""
transformers' Trainer
=====================

The model is restructured before it goes into the Trainer. ``save_pretrained`` and the Trainer's checkpoints hold the plain
model's ``state_dict``; ``unrestructure`` before saving keeps the class's own name in the configuration, too.
"""

from __future__ import annotations

import tempfile

import torch
from tiny import batches
from torch import Tensor
from torch.utils.data import Dataset
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

import bnrestructure


class Images(Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.images, self.labels = (torch.cat(parts) for parts in zip(*batches(8, size=32), strict=True))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=4)
    model = ResNetForImageClassification(config)
    bnrestructure.restructure(model)
    print(bnrestructure.explain(model))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=8, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
            logging_strategy="no",
        )  # fmt: skip
        result = Trainer(model=model, args=arguments, train_dataset=Images()).train()
        print(f"loss {result.training_loss:.3f}")
        bnrestructure.unrestructure(model).save_pretrained(folder)
        again = ResNetForImageClassification.from_pretrained(folder)
        print(f"saved and loaded as {type(again).__name__}")


if __name__ == "__main__":
    main()
