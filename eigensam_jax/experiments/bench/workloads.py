"""The networks whose training steps are measured, with random images and labels."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from eigensam_jax.experiments.registry import MODELS
from eigensam_jax.tree_math import PyTree

NUM_CLASSES = 10
SEED = 0


class Workload(NamedTuple):
    """A network and its inputs.

    Attributes:
      make: from a number of classes to the network.
      image_shape: height, width, channels.
      batch_size: the default.
      keywords: arguments beside the images, in training.
    """

    make: Callable[[int], Any]
    image_shape: tuple[int, int, int]
    batch_size: int
    keywords: dict[str, Any]


class Batch(NamedTuple):
    """Random examples.

    Attributes:
      images: standard normal, float32, shape (batch, height, width, channels).
      labels: uniform, int32.
    """

    images: jax.Array
    labels: jax.Array


Loss = Callable[[PyTree, PyTree, Batch], jax.Array]


def _mlp(width: int, num_classes: int) -> Any:
    from eigensam_jax.experiments.models.small import MLP

    return MLP(num_classes, width)


def mlp(width: int) -> Workload:
    """Two hidden layers of this width, for 28×28 images."""
    return Workload(partial(_mlp, width), _SMALL, 256, {})


_SMALL, _LARGE = (28, 28, 1), (32, 32, 3)
WORKLOADS = {
    "wide_mlp": mlp(1024),
    "strided_cnn": Workload(MODELS["strided_cnn"].make, _SMALL, 256, {}),
    "resnet18": Workload(MODELS["resnet18"].make, _LARGE, 32, {"train": True}),
    "vit": Workload(MODELS["vit"].make, _LARGE, 32, {}),
}


def init(workload: Workload) -> tuple[PyTree, PyTree]:
    """The network's parameters, and its other variables: running statistics or none."""
    images = jnp.zeros((1, *workload.image_shape))
    key = jax.random.key(SEED)
    variables = dict(workload.make(NUM_CLASSES).init(key, images, **workload.keywords))
    return variables.pop("params"), variables


def make_batch(workload: Workload, batch_size: int) -> Batch:
    """The same random batch every time."""
    images, labels = jax.random.split(jax.random.key(SEED + 1))
    shape = (batch_size, *workload.image_shape)
    return Batch(
        jax.random.normal(images, shape),
        jax.random.randint(labels, (batch_size,), 0, NUM_CLASSES),
    )


def make_loss(workload: Workload, dtype: DTypeLike) -> Loss:
    """(params, other variables, batch) -> the mean cross-entropy, in training mode.

    Parameters and images are cast to `dtype`; the loss is float32. New running
    statistics are dropped, so a pass at perturbed weights cannot change them.
    """
    model = workload.make(NUM_CLASSES)

    def loss(params: PyTree, others: PyTree, batch: Batch) -> jax.Array:
        params, images = jax.tree.map(lambda x: x.astype(dtype), (params, batch.images))
        logits, _ = model.apply(
            {"params": params, **others},
            images,
            **workload.keywords,
            mutable=list(others),
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), batch.labels
        )
        return jnp.mean(losses)

    return loss
