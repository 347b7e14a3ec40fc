"""The plot of what `eigensam track` found."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from eigensam_jax.experiments.records import images, results
from eigensam_jax.experiments.registry import TRACKERS, look
from eigensam_jax.experiments.track import tables

Run = Mapping[str, Any]
_OUTCOMES = {"lambda_max": "λ_max", "train_loss": "training loss"}


def track(runs: Sequence[Run], title: str, path: Path) -> None:
    """Draws, in a column an α, vᵀHv/λ_max over training and how the runs end."""
    alphas, count = tables.alphas(runs), len({run["seed"] for run in runs})
    note = (
        f"Means over {count} seeds. vᵀHv/λ_max is 1 if the tracked v is the top "
        "eigenvector.\nBelow: Eigen-SAM less SAM at the same radius; 95% intervals."
    )
    shown = [
        name
        for name in tables.names(runs)
        if any(tables.matched(runs, name, alpha) for alpha in alphas)
    ]
    figure, grid = images.panels(3, len(alphas), 9, title, note, sharey="row")
    for alpha, column in zip(alphas, grid.T, strict=True):
        _ratios(column[0], results.select(runs, alpha=alpha))
        column[0].set(title=f"α = {alpha:g}", xlabel="step")
        found = {name: tables.matched(runs, name, alpha) for name in shown}
        for axes, (key, label) in zip(column[1:], _OUTCOMES.items(), strict=True):
            rows = [
                (
                    np.array([run[key] - sam[key] for run, sam in pairs] or [np.nan]),
                    look(name),
                )
                for name, pairs in found.items()
            ]
            images.rows(axes, rows)
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_xlabel(f"{label} − SAM's")
            axes.locator_params(axis="x", nbins=4)
    grid[0, 0].set(ylabel="vᵀHv / λ_max", ylim=(None, 1.03))
    images.legend(figure)
    images.save(figure, path)


def _ratios(axes: Axes, runs: Sequence[Run]) -> None:
    for name in tables.names(runs):
        chosen = results.select(runs, optimizer="eigen_sam", tracker=name)
        values = np.array([run["curves"]["ratio"] for run in chosen])
        style = "--" if TRACKERS[name].is_ceiling else "-"
        axes.plot(chosen[0]["curves"]["step"], values.mean(0), style, **look(name))
