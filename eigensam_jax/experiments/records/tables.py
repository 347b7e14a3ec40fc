"""Tables in a terminal, and their statistics."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Column, Table
from scipy import stats


def table(title: str, headers: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Rows of a name and figures, narrow enough for 80 columns."""
    result = Table(
        headers[0],
        *(Column(header, justify="right") for header in headers[1:]),
        title=title,
        box=box.SIMPLE,
        show_edge=False,
        padding=0,
        collapse_padding=True,
    )
    for row in rows:
        result.add_row(*row)
    return result


def mean_and_deviation(values: Sequence[float], digits: int, factor: float = 1) -> str:
    """`mean ± standard deviation` of `factor` times the values; no ± for one value."""
    scaled = factor * np.asarray(values)
    mean = f"{scaled.mean():.{digits}f}"
    return mean + (f" ± {scaled.std(ddof=1):.{digits}f}" if len(scaled) > 1 else "")


def mean_and_interval(
    values: Sequence[float | None] | np.ndarray,
    digits: int,
    factor: float = 1,
    *,
    sign: bool = True,
) -> str:
    """`mean ± half the 95% interval` by Student's t; `sign` shows a plus sign too.

    – if a value is missing.
    """
    if None in list(values):
        return "–"
    scaled = factor * np.asarray(values, float)
    mean = f"{scaled.mean():{'+' if sign else ''}.{digits}f}"
    return mean + (f" ± {half_interval(scaled):.{digits}f}" if len(scaled) > 1 else "")


def half_interval(values: np.ndarray) -> Any:
    """Half the 95% interval of the mean over axis 0 (Student's t); 0 for one value."""
    if len(values) < 2:
        return 0 * values[0]
    quantile = stats.t.ppf(0.975, len(values) - 1)
    return quantile * values.std(0, ddof=1) / np.sqrt(len(values))


def of_seeds(runs: Iterable[Mapping[str, Any]]) -> str:
    """The sentence on seeds and intervals for the figures of these runs."""
    seeds = {run["seed"] for run in runs if "seed" in run and not run.get("tuning")}
    if len(seeds) == 1:
        return "Of one seed, so that there are no intervals."
    return "Means over seeds with 95% intervals; differences are paired by seed."
