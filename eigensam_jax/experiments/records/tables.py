"""What the commands show in a terminal, and the statistics in their tables."""

from collections.abc import Iterable, Sequence

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from scipy import stats

# In seconds; by rich's own 30, parts that take longer would show no time left.
_SPEED_PERIOD = 86_400.0


def progress_bar(console: Console) -> Progress:
    """A bar with what is running, how much is done, and the time it took and takes."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(
        *columns, console=console, transient=True, speed_estimate_period=_SPEED_PERIOD
    )


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
    text = f"{scaled.mean():.{digits}f}"
    if len(scaled) > 1:
        text += f" ± {scaled.std(ddof=1):.{digits}f}"
    return text


def mean_and_interval(
    values: Sequence[float], digits: int, factor: float = 1, *, sign: bool = True
) -> str:
    """`mean ± half the 95% interval` by Student's t; of one value, itself.

    Differences are shown with their `sign`, be it a plus.
    """
    scaled = factor * np.asarray(values)
    text = f"{scaled.mean():{'+' if sign else ''}.{digits}f}"
    if len(scaled) > 1:
        text += f" ± {half_interval(scaled):.{digits}f}"
    return text


def half_interval(values: np.ndarray) -> float:
    """Half the 95% interval of the mean, by Student's t; of one value, 0."""
    if len(values) < 2:
        return 0.0
    quantile = stats.t.ppf(0.975, len(values) - 1)
    return float(quantile * values.std(ddof=1) / np.sqrt(len(values)))
