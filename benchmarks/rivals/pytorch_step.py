"""A training step in PyTorch: ``--variant eager`` (channels_last) or ``--variant restructured``."""

from __future__ import annotations

from protocol import arguments, serve

options = arguments()

import torch  # noqa: E402 (the number of threads is set by now)

from bnrestructure import restructure  # noqa: E402
from bnrestructure.bench.workload import TrainingStep  # noqa: E402
from bnrestructure.models.models import load_model  # noqa: E402


def main() -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = load_model(options.model).train().to(memory_format=torch.channels_last)
    images = torch.randn(options.batch, 3, options.size, options.size).to(memory_format=torch.channels_last)
    if options.variant == "restructured":
        restructure(model)
    step = TrainingStep(model, (images,), "cpu", torch.bfloat16 if options.dtype == "bf16" else None)

    def run() -> float:
        model.zero_grad(set_to_none=True)
        loss = step.forward()
        loss.backward()
        return loss.item()

    serve(run, {"torch": torch.__version__})


if __name__ == "__main__":
    main()
