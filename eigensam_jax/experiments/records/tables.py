"""What the commands show in a terminal, and the statistics in their tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Column, Table
from scipy import stats


def table(title: str, headers: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Rows of a name and figures, close enough together for 80 columns."""
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
    """`mean ± standard deviation`, of `factor` times the values; of one, itself."""
    scaled = factor * np.asarray(values)
    mean = f"{scaled.mean():.{digits}f}"
    return mean + (f" ± {scaled.std(ddof=1):.{digits}f}" if len(scaled) > 1 else "")


def mean_and_interval(
    values: Sequence[float] | np.ndarray,
    digits: int,
    factor: float = 1,
    *,
    sign: bool = True,
) -> str:
    """`mean ± half the 95% interval` by Student's t; of one value, itself.

    Differences are shown with their `sign`, be it a plus.
    """
    scaled = factor * np.asarray(values)
    mean = f"{scaled.mean():{'+' if sign else ''}.{digits}f}"
    return mean + (f" ± {half_interval(scaled):.{digits}f}" if len(scaled) > 1 else "")


def half_interval(values: np.ndarray) -> Any:
    """Half the 95% interval of the mean over the first axis, by Student's t.

    Of one value, 0: there is none.
    """
    if len(values) < 2:
        return 0 * values[0]
    quantile = stats.t.ppf(0.975, len(values) - 1)
    return quantile * values.std(0, ddof=1) / np.sqrt(len(values))


def of_seeds(runs: Iterable[Mapping[str, Any]]) -> str:
    """What the figures of runs are over their seeds, in words."""
    seeds = {run["seed"] for run in runs if "seed" in run and not run.get("tuning")}
    if len(seeds) == 1:
        return "Of one seed, so that there are no intervals."
    return "Means over seeds with 95% intervals; differences are paired by seed."
