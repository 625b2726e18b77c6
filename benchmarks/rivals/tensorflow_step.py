"""A training step in TensorFlow, of Keras' own models: ``--variant graph`` (oneDNN) or ``--variant xla``."""

from __future__ import annotations

from protocol import arguments, serve

options = arguments()

import tensorflow as tf  # noqa: E402 (the number of threads is set by now)

MODELS = {
    "densenet121": tf.keras.applications.DenseNet121,
    "densenet201": tf.keras.applications.DenseNet201,
    "resnet50": tf.keras.applications.ResNet50,
    "mobilenet_v2": tf.keras.applications.MobileNetV2,
}


def main() -> None:
    tf.config.threading.set_intra_op_parallelism_threads(options.threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.random.set_seed(0)
    if options.dtype == "bf16":
        tf.keras.mixed_precision.set_global_policy("mixed_bfloat16")
    shape = (options.size, options.size, 3)
    model = MODELS[options.model](weights=None, input_shape=shape, classes=1000, classifier_activation=None)
    images = tf.random.normal((options.batch, *shape))
    labels = tf.zeros((options.batch,), tf.int32)

    @tf.function(jit_compile=options.variant == "xla")
    def step() -> tuple[tf.Tensor, list[tf.Tensor]]:
        with tf.GradientTape() as tape:
            logits = tf.cast(model(images, training=True), tf.float32)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        return loss, tape.gradient(loss, model.trainable_variables)

    def run() -> float:
        loss, gradients = step()
        gradients[0].numpy()  # waits
        return float(loss.numpy())

    serve(run, {"tensorflow": tf.__version__})


if __name__ == "__main__":
    main()
