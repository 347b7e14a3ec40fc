"""Characters of a text, to be told from those before."""

from itertools import pairwise
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from eigensam_jax.experiments.data import load
from eigensam_jax.experiments.data.load import Dataset
from eigensam_jax.experiments.errors import UserError

LENGTH = 64  # of a window, in characters
_LEAST = 20 * LENGTH  # of a text, so that each part has a window
_SHARES = (0.8, 0.9)  # of the text, where the training and the validation part end


def characters(folder: Path | None) -> Dataset:
    """The windows of a text file, and of each character the one that follows.

    The first eight tenths are for training, the next for validation, the last for the
    test. Characters are numbered in the order of Unicode; those that are not among the
    training labels count as the first.

    Returns:
      int32 images and labels of shape (windows, `LENGTH`), without overlap.

    Raises:
      UserError: if the folder has no single .txt file, or it is not UTF-8 or too short.
    """
    path = load.only_file(folder, ".txt")
    try:
        text = np.array([*path.read_text("utf-8")])
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text in UTF-8: {error}") from error
    if len(text) < _LEAST:
        raise UserError(
            f"{path} has {len(text)} characters; at least {_LEAST} are needed"
        )
    ends = [int(share * len(text)) for share in (0, *_SHARES, 1)]
    count = (ends[1] - 1) // LENGTH
    known = np.unique(text[1 : count * LENGTH + 1])  # the training labels
    numbers = np.searchsorted(known, text) % len(known)
    numbers = np.where(known[numbers] == text, numbers, 0)
    parts = [_windows(numbers[first:last]) for first, last in pairwise(ends)]
    (images, labels), (held, held_labels), (test, test_labels) = parts
    return Dataset(images, labels, test, test_labels, held, held_labels)


def _windows(numbers: np.ndarray) -> tuple[jnp.ndarray, jnp.ndarray]:
    count = (len(numbers) - 1) // LENGTH
    both = (numbers[:-1], numbers[1:])
    images, labels = (x[: count * LENGTH].reshape(count, LENGTH) for x in both)
    return jnp.asarray(images, jnp.int32), jnp.asarray(labels, jnp.int32)
