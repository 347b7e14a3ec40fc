"""Characters of a text, to be told from those before."""

from io import StringIO
from itertools import pairwise
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from eigensam_jax.experiments.data import integrity, load
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
      int32 images and labels of shape (windows, `LENGTH`), without overlap; those for
      training in random order.

    Raises:
      UserError: if the folder has no single .txt file, or it is not UTF-8 or too short.
    """
    path = load.only_file(folder, ".txt")
    try:
        lines = StringIO(integrity.read(path).decode("utf-8"), newline=None)
        text = np.array([*lines.read()])
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text in UTF-8: {error}") from error
    if len(text) < _LEAST:
        raise UserError(
            f"{path} has {len(text)} characters; at least {_LEAST} are needed"
        )
    ends = [int(share * len(text)) for share in (0, *_SHARES, 1)]
    known = np.unique(_windows(text[: ends[1]])[1])  # among the training labels
    numbers = np.searchsorted(known, text) % len(known)
    numbers = np.where(known[numbers] == text, numbers, 0)
    parts = [_windows(numbers[first:last]) for first, last in pairwise(ends)]
    train, held, test = ([jnp.asarray(x, jnp.int32) for x in part] for part in parts)
    return load.in_random_order(Dataset(*train, *test, *held))


def _windows(text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Windows, and what follows each of their entries."""
    count = (len(text) - 1) // LENGTH
    first, second = (x[: count * LENGTH] for x in (text[:-1], text[1:]))
    return first.reshape(count, LENGTH), second.reshape(count, LENGTH)
