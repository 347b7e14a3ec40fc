"""The plot of what `eigensam track` found."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eigensam_jax.experiments.records import images, results
from eigensam_jax.experiments.registry import TRACKERS
from eigensam_jax.experiments.track import tables

Run = Mapping[str, Any]
_OUTCOMES = {"lambda_max": "λ_max", "train_loss": "training loss"}


def track(runs: Sequence[Run], title: str, path: Path) -> None:
    """Draws `runs`, a column an α: vᵀHv/λ_max over training, and how the runs end.

    Lines are means over the seeds ± their standard deviation; the points below are one
    each seed, Eigen-SAM less SAM at its radius.
    """
    alphas = tables.alphas(runs)
    figure = Figure(figsize=(2 + 4 * len(alphas), 10), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(3, len(alphas), squeeze=False, sharey="row")
    for alpha, column in zip(alphas, grid.T, strict=True):
        _ratios(column[0], results.select(runs, alpha=alpha))
        column[0].set(title=f"α = {alpha:g}", xlabel="step", ylabel="vᵀHv / λ_max")
        for axes, (key, label) in zip(column[1:], _OUTCOMES.items(), strict=True):
            _differences(axes, runs, alpha, key)
            axes.set(ylabel=f"{label} − matched SAM's")
    grid[0, 0].legend(fontsize="small")
    images.save(figure, path)


def colour(name: str) -> Any:
    """The colour of a tracker, the same in all plots."""
    return matplotlib.colormaps["tab10"](list(TRACKERS).index(name) % 10)


def _ratios(axes: Axes, runs: Sequence[Run]) -> None:
    for name in tables.names(runs):
        chosen = results.select(runs, optimizer="eigen_sam", tracker=name)
        values = np.array([run["curves"]["ratio"] for run in chosen])
        style = "--" if TRACKERS[name].is_ceiling else "-"
        drawn = {"color": colour(name), "label": name}
        images.band(axes, chosen[0]["curves"]["step"], values, style, **drawn)
    axes.grid(alpha=0.3)


def _differences(axes: Axes, runs: Sequence[Run], alpha: float, key: str) -> None:
    found = {name: tables.matched(runs, name, alpha) for name in tables.names(runs)}
    places = [name for name, pairs in found.items() if pairs]
    for place, name in enumerate(places):
        values = [run[key] - sam[key] for run, sam in found[name]]
        axes.plot([place] * len(values), values, ".", color=colour(name))
        axes.plot(place, np.mean(values), "_", color=colour(name), markersize=18)
    axes.axhline(0, color="#7f7f7f", linewidth=0.8)
    axes.set_xticks(range(len(places)), places, rotation=20, ha="right")
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.grid(axis="y", alpha=0.3)
