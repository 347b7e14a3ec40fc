"""Windows of multivariate time series, from a CSV file in the layout of ETT.

The first line names the columns, the first column is the date, the others are hourly
series. As in the literature, months have 30 days: the first 12 are for training and
standardisation, the next 4 for validation, the last 4 for the test.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from eigensam_jax.experiments.data.load import Dataset
from eigensam_jax.experiments.errors import UserError

LENGTH = 512  # of a window, in hours
_MONTH = 30 * 24
_MONTHS = (12, 16, 20)  # where the parts end


def forecasting(folder: Path | None, horizon: int) -> Dataset:
    """All windows of `LENGTH` hours, and the `horizon` hours after each.

    Returns:
      Standardised float32 images (windows, `LENGTH`, series) and labels (windows,
      `horizon`, series).

    Raises:
      UserError: if the folder has no single CSV file, or it is invalid or too short.
    """
    values = _read(folder)
    train = values[: _MONTHS[0] * _MONTH]
    deviation = train.std(0)
    if not deviation.all():
        raise UserError("--data-dir: a series is constant over the first 12 months")
    values = ((values - train.mean(0)) / deviation).astype(np.float32)
    ends = [months * _MONTH for months in _MONTHS]
    starts = [0, *(end - LENGTH for end in ends[:-1])]  # forecasts begin at `end`
    parts = [
        _windows(values[first:last], horizon)
        for first, last in zip(starts, ends, strict=True)
    ]
    (images, labels), (held, held_labels), (test, test_labels) = parts
    return Dataset(images, labels, test, test_labels, held, held_labels)


def _read(folder: Path | None) -> np.ndarray:
    if folder is None:
        raise UserError(
            "--data-dir is needed: the folder of a CSV file such as ETTh1.csv, of Zhou "
            "et al.'s ETDataset"
        )
    found = sorted(folder.glob("*.csv"))
    if len(found) != 1:
        raise UserError(f"--data-dir {folder} must hold one CSV file, not {len(found)}")
    try:
        values = np.loadtxt(found[0], delimiter=",", skiprows=1, dtype=str, ndmin=2)
        numbers = values[:, 1:].astype(np.float64)
    except ValueError as error:
        raise UserError(
            f"{found[0]} is not a table of numbers after a date: {error}"
        ) from error
    needed = _MONTHS[-1] * _MONTH
    if len(numbers) < needed or not numbers.shape[1] or not np.isfinite(numbers).all():
        raise UserError(
            f"{found[0]} has {len(numbers)} hours of {numbers.shape[1]} series; at "
            f"least {needed} hours of finite numbers are needed"
        )
    return numbers[:needed]


def _windows(values: np.ndarray, horizon: int) -> tuple[jnp.ndarray, jnp.ndarray]:
    both = np.lib.stride_tricks.sliding_window_view(values, LENGTH + horizon, axis=0)
    both = np.moveaxis(both, -1, 1)
    return jnp.asarray(both[:, :LENGTH]), jnp.asarray(both[:, LENGTH:])
