"""Windows of multivariate time series: synthetic ones, or from a CSV file.

The file has the layout of ETT: the first line names the columns, the first column is
the date, the others are hourly series. As in the literature, months have 30 days: the
first 12 are for training and standardisation, the next 4 for validation, the last 4 for
the test.
"""

from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from statistics import median_low

import jax.numpy as jnp
import numpy as np

from eigensam_jax.experiments.data import integrity, load
from eigensam_jax.experiments.data.load import Dataset
from eigensam_jax.experiments.errors import UserError

LENGTH = 512  # of a window, in hours
NOISE = 0.1  # standard deviation of that in `linear`
_MONTH = 30 * 24
_MONTHS = (12, 16, 20)  # where the parts end


def forecasting(folder: Path | None, horizon: int) -> Dataset:
    """All windows of `LENGTH` hours, and the `horizon` hours after each.

    Returns:
      Standardised float32 images (windows, `LENGTH`, series) and labels (windows,
      `horizon`, series); those for training in random order.

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
    found = Dataset(images, labels, test, test_labels, held, held_labels)
    return load.in_random_order(found)


def linear(folder: Path | None, horizon: int) -> Dataset:
    """Synthetic data, Y = WᵀX + noise, whose least mean squared error is `NOISE`².

    X, of `LENGTH` hours and 7 series, and the noise have normal entries, of deviations
    1 and `NOISE`. W has normal entries of deviation 1/√`LENGTH`; its columns are then
    moved to sums of 1: a constant series goes on, as in a network that normalises
    windows.

    Returns:
      10,000 windows for training, 2,500 for validation and 2,500 for the test, in the
      shapes of `forecasting`.

    Raises:
      UserError: if there is a folder.

    References:
      Ilbert et al., "SAMformer", ICML 2024: section 2.
    """
    if folder is not None:
        raise UserError(
            f"--data-dir {folder}: linear_series is drawn at random and reads no "
            "files; leave --data-dir out"
        )
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((LENGTH, horizon), np.float32) / LENGTH**0.5
    weights += (1 - weights.sum(0)) / LENGTH
    parts = []
    for examples in (10_000, 2_500, 2_500):
        windows = rng.standard_normal((examples, LENGTH, 7), np.float32)
        following = np.einsum("ntc,th->nhc", windows, weights, optimize=True)
        following += NOISE * rng.standard_normal(following.shape, np.float32)
        parts += [jnp.asarray(windows), jnp.asarray(following)]
    images, labels, held, held_labels, test, test_labels = parts
    return Dataset(images, labels, test, test_labels, held, held_labels)


def _read(folder: Path | None) -> np.ndarray:
    path = load.only_file(folder, ".csv")
    needed = _MONTHS[-1] * _MONTH
    try:
        first, *lines = integrity.read(path).decode("utf-8").splitlines() or [""]
        lines = [line for line in lines if line.strip()]
        if len(lines) < needed:
            raise UserError(
                f"{path} has {len(lines)} hours after its first line; at least "
                f"{needed} are needed"
            )
        lines = lines[:needed]
        _check_dates(path, first, lines)
        numbers = np.genfromtxt(lines, delimiter=",", ndmin=2)[:, 1:]
    except ValueError as error:  # of rows that differ in length, a line each
        what = " ".join(str(error).split("\n")[:2])
        raise UserError(f"{path} is not a table of text: {what}") from error
    if not numbers.shape[1]:
        raise UserError(f"{path} has no series after the date; put commas between them")
    wrong = np.argwhere(~np.isfinite(numbers))
    if len(wrong):
        hour, series = wrong[0] + 1
        raise UserError(
            f"{path}: series {series} has no finite number in hour {hour}; fill it in"
        )
    return numbers


def _check_dates(path: Path, first: str, lines: list[str]) -> None:
    """UserError for a first line with a date, or dates that are not hourly.

    Dates in another format than ISO 8601 are not checked.
    """
    if _date(first) is not None:
        raise UserError(
            f"{path}: its first line has a date; put a line of the columns' names above"
        )
    dates = [_date(line) for line in lines]
    steps = [after - before for before, after in pairwise(dates) if before and after]
    step = median_low(steps or [timedelta(hours=1)])
    if step != timedelta(hours=1):
        hours = step / timedelta(hours=1)
        raise UserError(
            f"{path}: from line to line its dates are {hours:g} hours later; give a "
            "line for each hour, the earliest first"
        )


def _date(line: str) -> datetime | None:
    try:
        return datetime.fromisoformat(line.split(",")[0].strip())
    except ValueError:
        return None


def _windows(values: np.ndarray, horizon: int) -> tuple[jnp.ndarray, jnp.ndarray]:
    both = np.lib.stride_tricks.sliding_window_view(values, LENGTH + horizon, axis=0)
    both = np.moveaxis(both, -1, 1)
    return jnp.asarray(both[:, :LENGTH]), jnp.asarray(both[:, LENGTH:])
