"""The tables of `eigensam track`, from its results files."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from eigensam_jax.experiments.records import results, tables
from eigensam_jax.experiments.registry import TRACKERS

_DIFFERENCES = {  # title, factor, digits
    "lambda_max": ("λ_max", 1, 3),
    "train_loss": ("train loss", 1, 5),
    "test_accuracy": ("test acc. %", 100, 2),
}

Record = Mapping[str, Any]


def alphas(runs: Sequence[Record]) -> list[float]:
    """All α of the runs, ascending."""
    return sorted({run["alpha"] for run in runs if run["alpha"] is not None})


def table(runs: Sequence[Record], alpha: float, title: str) -> Table:
    """The rows of `summary` for a terminal."""
    headers = ("HVPs", "ratio", "worst", "|cos|", "λ_max", "train loss", "acc. %")
    title = f"{title}, α = {alpha:g}"
    return tables.table(title, ("tracker", *headers), summary(runs, alpha))


def difference_table(runs: Sequence[Record], title: str) -> Table:
    """The rows of `differences` for a terminal."""
    headers = ("α", "radius", *(header for header, _, _ in _DIFFERENCES.values()))
    return tables.table(title, ("tracker", *headers), differences(runs))


def summary(runs: Sequence[Record], alpha: float) -> list[list[str]]:
    """A row for SAM and for each tracker at α.

    Products per 100 steps, vᵀHv/λ_max and its minimum, |cos(v, v_top)|; at the end,
    λ_max, training loss and test accuracy.
    """
    rows = []
    for name in (None, *names(runs)):
        optimizer, at = ("sam", None) if name is None else ("eigen_sam", alpha)
        chosen = results.select(runs, optimizer=optimizer, tracker=name, alpha=at)
        if not chosen:
            continue
        column = {key: [run[key] for run in chosen] for key in chosen[0]}
        followed = ["–"] * 4
        if name is not None:
            followed = [
                f"{TRACKERS[name].products:g}",
                tables.mean_and_deviation(column["ratio"], 2),
                f"{min(column['worst_ratio']):.2f}",
                tables.mean_and_deviation(column["cosine"], 2).split()[0],
            ]
        rows.append(
            [
                name or "sam",
                *followed,
                tables.mean_and_deviation(
                    column["lambda_max"], 3 if max(column["lambda_max"]) < 1 else 2
                ),
                tables.mean_and_deviation(column["train_loss"], 4).split()[0],
                tables.mean_and_deviation(column["test_accuracy"], 1, 100),
            ]
        )
    return rows


def across(networks: Sequence[Sequence[Record]]) -> list[list[str]]:
    """A row per tracker: its products, and the ratio on each network at α 0.2 and 1."""
    summaries = [
        {row[0]: row for row in summary(runs, alpha)}
        for runs in networks
        for alpha in (0.2, 1.0)
    ]
    return [
        [
            name,
            f"{spec.products:g}",
            *(rows[name][2] if name in rows else "–" for rows in summaries),
        ]
        for name, spec in TRACKERS.items()
    ]


def differences(runs: Sequence[Record]) -> list[list[str]]:
    """A row per tracker and α: the radius, and Eigen-SAM less SAM at that radius."""
    rows = []
    for alpha in alphas(runs):
        for name in names(runs):
            pairs = matched(runs, name, alpha)
            if pairs:
                radius = np.mean([run["radius"] for run, _ in pairs])
                row = [name, f"{alpha:g}", f"{radius:.3f}"]
                for key, (_, factor, digits) in _DIFFERENCES.items():
                    less = [a[key] - b[key] for a, b in pairs]
                    row.append(tables.mean_and_interval(less, digits, factor))
                rows.append(row)
    return rows


def matched(
    runs: Sequence[Record], tracker: str, alpha: float
) -> list[tuple[Record, Record]]:
    """The runs of a tracker at α, each with SAM's run at its radius."""
    kind = {"tracker": tracker, "alpha": alpha}
    return [
        (run, sam)
        for run in results.select(runs, optimizer="eigen_sam", **kind)
        for sam in results.select(
            runs, optimizer="sam_matched", **kind, seed=run["seed"]
        )
    ]


def names(runs: Sequence[Record]) -> list[str]:
    """The trackers of the runs, in the order of `TRACKERS`."""
    present = {run["tracker"] for run in runs}
    return [name for name in TRACKERS if name in present]
