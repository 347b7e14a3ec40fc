"""The digits that come with scikit-learn."""

from pathlib import Path

import numpy as np
from sklearn import datasets, model_selection

from eigensam_jax.experiments.data.integrity import Arrays
from eigensam_jax.experiments.errors import UserError


def digits(data_dir: Path | None) -> Arrays:
    """1,797 images of 8×8 pixels; a fifth of each class is the test set."""
    if data_dir is not None:
        raise UserError(
            f"--data-dir {data_dir}: digits comes with scikit-learn and reads no "
            "folder; leave --data-dir out, or name the data in it with --dataset"
        )
    bunch = datasets.load_digits()
    images, test_images, labels, test_labels = model_selection.train_test_split(
        bunch.images[..., None].astype(np.uint8),
        bunch.target,
        test_size=0.2,
        random_state=0,
        stratify=bunch.target,
    )
    return images, labels, test_images, test_labels
