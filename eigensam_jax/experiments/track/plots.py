"""The plot of what `eigensam track` found."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eigensam_jax.experiments.records import images
from eigensam_jax.experiments.registry import TRACKERS

Run = Mapping[str, Any]
_OUTCOMES = {"lambda_max": "λ_max", "train_loss": "training loss"}


def track(runs: Sequence[Run], title: str, path: Path) -> None:
    """Draws `runs`, a column an α: vᵀHv/λ_max over training, and how the runs end.

    Lines are means over the seeds ± their standard deviation; the points below are one
    each seed, Eigen-SAM less SAM at its radius.
    """
    alphas = sorted({run["alpha"] for run in runs if run["alpha"] is not None})
    figure = Figure(figsize=(2 + 4 * len(alphas), 10), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(3, len(alphas), squeeze=False, sharey="row")
    for alpha, column in zip(alphas, grid.T, strict=True):
        here = [run for run in runs if run["alpha"] == alpha]
        _ratios(column[0], here)
        column[0].set(title=f"α = {alpha:g}", xlabel="step", ylabel="vᵀHv / λ_max")
        for axes, (key, label) in zip(column[1:], _OUTCOMES.items(), strict=True):
            _differences(axes, here, key)
            axes.set(ylabel=f"{label} − matched SAM's")
    grid[0, 0].legend(fontsize="small")
    images.save(figure, path)


def colour(name: str) -> Any:
    """The colour of a tracker, the same in all plots."""
    return matplotlib.colormaps["tab10"](list(TRACKERS).index(name) % 10)


def _ratios(axes: Axes, runs: Sequence[Run]) -> None:
    for name, chosen in _by_tracker(runs, "eigen_sam").items():
        values = np.array([run["curves"]["ratio"] for run in chosen])
        steps, mean = chosen[0]["curves"]["step"], values.mean(0)
        spread = values.std(0, ddof=1) if len(values) > 1 else 0 * mean
        style = "--" if TRACKERS[name].is_ceiling else "-"
        axes.plot(steps, mean, style, color=colour(name), label=name)
        axes.fill_between(
            steps, mean - spread, mean + spread, color=colour(name), alpha=0.15
        )
    axes.grid(alpha=0.3)


def _differences(axes: Axes, runs: Sequence[Run], key: str) -> None:
    matched = {
        (run["tracker"], run["seed"]): run[key]
        for run in runs
        if run["optimizer"] == "sam_matched"
    }
    places: list[str] = []
    for name, chosen in _by_tracker(runs, "eigen_sam").items():
        values = [
            run[key] - matched[name, run["seed"]]
            for run in chosen
            if (name, run["seed"]) in matched
        ]
        if values:
            place = len(places)
            places.append(name)
            axes.plot([place] * len(values), values, ".", color=colour(name))
            axes.plot(place, np.mean(values), "_", color=colour(name), markersize=18)
    axes.axhline(0, color="#7f7f7f", linewidth=0.8)
    axes.set_xticks(range(len(places)), places, rotation=20, ha="right")
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.grid(axis="y", alpha=0.3)


def _by_tracker(runs: Sequence[Run], optimizer: str) -> dict[str, list[Run]]:
    chosen = [run for run in runs if run["optimizer"] == optimizer]
    return {
        name: of_name
        for name in TRACKERS
        if (of_name := [run for run in chosen if run["tracker"] == name])
    }
