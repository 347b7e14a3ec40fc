"""Image data sets as arrays on the device, read from where they already are.

Nothing is downloaded. `digits` comes with scikit-learn; `mnist` and `fashion_mnist` are
read from a folder of idx files, plain or gzipped, in the format of the MNIST database;
`cifar10`, `cifar100` and `svhn` from a folder in the format of their authors.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eigensam_jax.experiments.data.integrity import Arrays
from eigensam_jax.experiments.errors import UserError

Reader = Callable[[Path | None], Arrays]

_CHUNK = 1_000  # images: more at once would be copied as wider numbers


class Dataset(NamedTuple):
    """Images and labels, split into a training and a test set.

    Attributes:
      train_images: float32, shape (examples, height, width, channels), each channel
        standardised by its mean and standard deviation over all training pixels.
      train_labels: int32, shape (examples,).
      test_images: as `train_images`, standardised by the training set's figures.
      test_labels: as `train_labels`.
      held_images: held out of both, to choose by; None for a part of the training set.
      held_labels: as `train_labels`.

    Windows of time series have the shape (examples, length, channels), and what follows
    them, (examples, horizon, channels), is in place of labels.
    """

    train_images: jax.Array
    train_labels: jax.Array
    test_images: jax.Array
    test_labels: jax.Array
    held_images: jax.Array | None = None
    held_labels: jax.Array | None = None

    @property
    def num_classes(self) -> int:
        """One more than the largest training label; of a series, the horizon."""
        if jnp.issubdtype(self.train_labels.dtype, jnp.floating):
            return self.train_labels.shape[1]
        return int(self.train_labels.max()) + 1


def load(read: Reader, data_dir: Path | None = None) -> Dataset:
    """The data set that `read` finds in a folder.

    Its images are bytes, which are standardised on the device, or floating-point
    numbers, of which a copy is made.

    Raises:
      UserError: if the folder or a file is missing, cut off or not in its format.
    """
    images, labels, test_images, test_labels = read(data_dir)
    standardise: Callable[[np.ndarray], jax.Array]
    if images.dtype == np.uint8:
        look_up = jax.jit(jax.vmap(lambda values, x: values[x], (1, -1), -1))
        standardise = partial(look_up, jnp.asarray(standardised_values(images)))
    else:
        mean, deviation = images.mean((0, 1, 2)), images.std((0, 1, 2))
        standardise = lambda x: jnp.asarray((x - mean) / deviation, jnp.float32)
    train, test = standardise(images), standardise(test_images)
    labels, test_labels = (x.astype(np.int32) for x in (labels, test_labels))
    return Dataset(train, jnp.asarray(labels), test, jnp.asarray(test_labels))


def first(dataset: Dataset, examples: int, name: str) -> Dataset:
    """The data set of a name with so many of its training images.

    Raises:
      UserError: if there are not as many.
    """
    images, labels = dataset.train_images, dataset.train_labels
    if examples > len(labels):
        raise UserError(
            f"--train-examples {examples} is more than the {len(labels)} training "
            f"images of {name}; use at most {len(labels)}"
        )
    return dataset._replace(
        train_images=images[:examples], train_labels=labels[:examples]
    )


def with_label_noise(dataset: Dataset, share: float) -> Dataset:
    """A `share` of the training labels, drawn anew from all classes alike."""
    if not share:
        return dataset
    rng = np.random.default_rng(0)
    labels = np.asarray(dataset.train_labels)
    drawn = rng.integers(0, dataset.num_classes, len(labels), labels.dtype)
    noisy = np.where(rng.random(len(labels)) < share, drawn, labels)
    return dataset._replace(train_labels=jnp.asarray(noisy))


def num_for_tuning(dataset: Dataset) -> int:
    """The number of training images that `for_tuning` keeps."""
    if dataset.held_images is not None:
        return len(dataset.train_labels)
    return len(dataset.train_labels) * 9 // 10


def for_tuning(dataset: Dataset) -> Dataset:
    """What is held out as the test set: a tenth of the training set, drawn at random.

    Or what the data set itself holds out, where it does.
    """
    if dataset.held_images is not None and dataset.held_labels is not None:
        return dataset._replace(
            test_images=dataset.held_images, test_labels=dataset.held_labels
        )
    order = np.random.default_rng(0).permutation(len(dataset.train_labels))
    kept, held = np.split(order, [num_for_tuning(dataset)])
    images, labels = dataset.train_images, dataset.train_labels
    return Dataset(images[kept], labels[kept], images[held], labels[held])


def standardised_values(images: np.ndarray) -> np.ndarray:
    """What each value of a pixel is after standardisation, for each channel.

    Images stay bytes until they are on the device, where they are looked up in this.

    Args:
      images: the training set, uint8, shape (examples, height, width, channels).

    Returns:
      (value − mean) / standard deviation, float32, shape (256, channels).
    """
    values = np.arange(256.0)[:, None]
    counts = np.zeros((256, images.shape[-1]))
    for i in range(0, len(images), _CHUNK):
        for channel in range(images.shape[-1]):
            pixels = images[i : i + _CHUNK, ..., channel].ravel()
            counts[:, channel] += np.bincount(pixels, minlength=256)
    weights = counts / counts.sum(0)
    mean = (weights * values).sum(0)
    deviation = np.sqrt((weights * (values - mean) ** 2).sum(0))
    table: np.ndarray = ((values - mean) / deviation).astype(np.float32)
    return table
