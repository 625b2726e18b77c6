"""A training step in JAX: jit of loss and gradients, batch norm's running statistics among the results."""

from __future__ import annotations

import os

from protocol import arguments, serve

options = arguments()
if hasattr(os, "sched_setaffinity"):  # XLA's pool is as large as the processors it may use
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])

import jax  # noqa: E402 (the number of threads is set by now)
import jax.numpy as jnp  # noqa: E402
from jax_models import MODELS, parameter_count  # noqa: E402


def main() -> None:
    model = MODELS[options.model](dtype=jnp.bfloat16 if options.dtype == "bf16" else jnp.float32)
    images = jax.random.normal(jax.random.key(0), (options.batch, options.size, options.size, 3))
    labels = jnp.zeros((options.batch,), jnp.int32)
    variables = jax.jit(model.init)(jax.random.key(1), images)
    parameters, statistics = variables["params"], variables["batch_stats"]

    def loss_of(parameters: dict, statistics: dict) -> tuple[jax.Array, dict]:
        logits, changed = model.apply({"params": parameters, "batch_stats": statistics}, images, mutable=["batch_stats"])
        chosen = jax.nn.log_softmax(logits.astype(jnp.float32))[jnp.arange(len(labels)), labels]
        return -chosen.mean(), changed["batch_stats"]

    step = jax.jit(jax.value_and_grad(loss_of, has_aux=True))

    def run() -> float:
        nonlocal statistics
        (loss, statistics), gradients = step(parameters, statistics)
        jax.block_until_ready(gradients)
        return float(loss)

    serve(run, {"jax": jax.__version__, "parameters": str(parameter_count(variables))})


if __name__ == "__main__":
    main()
