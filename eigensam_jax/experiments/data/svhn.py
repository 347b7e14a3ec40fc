"""SVHN's cropped digits (street view house numbers), from its two .mat files."""

from io import BytesIO
from pathlib import Path

import numpy as np
from scipy import io

from eigensam_jax.experiments.data import integrity
from eigensam_jax.experiments.data.integrity import FACTS, Arrays, Facts
from eigensam_jax.experiments.errors import UserError

_SHAPE = (32, 32, 3)
_CONTENT = "train_32x32.mat and test_32x32.mat, SVHN's format 2"


def svhn(data_dir: Path | None, facts: Facts = FACTS["svhn"]) -> Arrays:
    """73,257 and 26,032 images of shape (32, 32, 3) of the ten digits.

    Raises:
      UserError: if a file is missing, cut off or invalid.
    """
    folder = integrity.folder_of("svhn", data_dir, _CONTENT)
    path, test_path = folder / "train_32x32.mat", folder / "test_32x32.mat"
    integrity.check_there([path, test_path], _CONTENT)
    images, labels = _read(path, facts.train_counts)
    test_images, test_labels = _read(test_path, facts.test_counts)
    integrity.check_means(images, facts.train_means, str(path))
    return images, labels, test_images, test_labels


def _read(path: Path, counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Images from X (32, 32, 3, n) and digits from y (n, 1), which has 10 for 0."""
    content = integrity.read(path)
    try:
        found = io.loadmat(BytesIO(content), variable_names=("X", "y"))
    except Exception as error:  # damaged files raise all kinds of errors
        raise UserError(
            f"{path} cannot be read as .mat ({error}); it may be cut off: fetch it anew"
        ) from error
    images = _array(path, found, "X", (*_SHAPE, sum(counts)))
    labels = _array(path, found, "y", (sum(counts), 1))
    if labels.min() < 1 or labels.max() > 10:
        raise UserError(
            f"{path}: labels are from {labels.min()} to {labels.max()}, they "
            "should be 1 to 10, which is the digit 0; it is another file or damaged, "
            "fetch it anew"
        )
    digits = labels.ravel() % 10
    integrity.check_counts(digits, counts, str(path))
    return np.ascontiguousarray(images.transpose(3, 0, 1, 2)), digits


def _array(
    path: Path, found: dict[str, np.ndarray], name: str, shape: tuple[int, ...]
) -> np.ndarray:
    array = found.get(name, np.array(None))
    if array.shape != shape or array.dtype != np.uint8:
        what = f"{array.shape} of {array.dtype}" if name in found else "none"
        raise UserError(
            f"{path} should hold an array {name} of shape {shape} of uint8, got "
            f"{what}; it is damaged, another file or one saved anew: fetch the original"
        )
    return array
