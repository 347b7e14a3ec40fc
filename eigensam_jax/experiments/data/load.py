"""Data sets as arrays on the device, from local files: nothing is downloaded."""

import zlib
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

_CHUNK = 1_000  # images per count, which makes a wider copy


class Dataset(NamedTuple):
    """A training set, a test set and, in some, a validation set.

    Images are standardised for each channel by mean and standard deviation of the
    training set. For time series, images are windows (examples, length, channels), and
    labels are the values that follow, float32 of shape (examples, horizon, channels).
    For text, both are int32 of shape (examples, length).

    Attributes:
      train_images: float32, shape (examples, height, width, channels).
      train_labels: int32, shape (examples,).
      test_images, test_labels: of the test set.
      held_images, held_labels: of the validation set; None if there is none.
    """

    train_images: jax.Array
    train_labels: jax.Array
    test_images: jax.Array
    test_labels: jax.Array
    held_images: jax.Array | None = None
    held_labels: jax.Array | None = None

    @property
    def num_classes(self) -> int:
        """One more than the largest training label; the horizon of a series."""
        if jnp.issubdtype(self.train_labels.dtype, jnp.floating):
            return self.train_labels.shape[1]
        return int(self.train_labels.max()) + 1


def load(read: Reader, data_dir: Path | None = None) -> Dataset:
    """The data set that `read` finds in a folder.

    Images of uint8 are standardised on the device, floating-point ones before.

    Raises:
      UserError: if the folder or a file is missing, cut off or invalid.
    """
    images, labels, test_images, test_labels = read(data_dir)
    where = f"--data-dir {data_dir}: " if data_dir else ""
    for what, values in (("pixels", images), ("labels", labels)):
        if values.min() == values.max():
            raise UserError(f"{where}all {what} of the training set are the same")
    if test_labels.max() > labels.max():
        raise UserError(
            f"{where}the largest label is {labels.max()} in training and "
            f"{test_labels.max()} in the test set; they must be of the same classes"
        )
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


def checksum(dataset: Dataset) -> int:
    """CRC-32 of all images and labels."""
    value = 0
    for array in dataset:
        if array is not None:
            value = zlib.crc32(np.ascontiguousarray(array).data, value)
    return value


def only_file(folder: Path | None, suffix: str) -> Path:
    """The file with this suffix in a folder; UserError unless there is one."""
    if folder is None:
        raise UserError(f"--data-dir is needed: the folder of one {suffix} file")
    found = sorted(x for x in folder.glob(f"*{suffix}") if x.is_file())
    if len(found) != 1:
        raise UserError(
            f"--data-dir {folder} must hold one {suffix} file, not {len(found)}"
        )
    return found[0]


def first(dataset: Dataset, examples: int | None) -> Dataset:
    """Keeps the first `examples` training images; all if None or if there are fewer."""
    return dataset._replace(
        train_images=dataset.train_images[:examples],
        train_labels=dataset.train_labels[:examples],
    )


def in_random_order(dataset: Dataset) -> Dataset:
    """The training examples mixed, so that the first few are a sample of all.

    Those of a series follow, and may overlap, each other.
    """
    order = np.random.default_rng(0).permutation(len(dataset.train_labels))
    return dataset._replace(
        train_images=dataset.train_images[order],
        train_labels=dataset.train_labels[order],
    )


def with_label_noise(dataset: Dataset, share: float) -> Dataset:
    """Redraws a `share` of the training labels, uniformly from all classes."""
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
    """Tests on the validation set, or else on a random tenth of the training set."""
    if dataset.held_images is not None and dataset.held_labels is not None:
        return dataset._replace(
            test_images=dataset.held_images, test_labels=dataset.held_labels
        )
    order = np.random.default_rng(0).permutation(len(dataset.train_labels))
    kept, held = np.split(order, [num_for_tuning(dataset)])
    images, labels = dataset.train_images, dataset.train_labels
    return Dataset(images[kept], labels[kept], images[held], labels[held])


def standardised_values(images: np.ndarray) -> np.ndarray:
    """What standardisation makes of each pixel value, float32 (256, channels).

    `images` are the training set, uint8 (examples, height, width, channels). Images
    stay bytes until they are on the device, where they are looked up in this table.
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
