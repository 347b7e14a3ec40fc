"""Plots of results files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

COLOURS = {
    "sgd": "#7f7f7f",
    "sam": "#1f77b4",
    "sam_matched": "#17becf",
    "eigen_sam": "#d62728",
}
_PANELS = {
    "train_loss": ("training loss", "log"),
    "test_accuracy": ("test accuracy", "linear"),
    "lambda_max": ("λ_max of the training loss", "log"),
    "alignment": ("alignment |cos(ε, v_top)|", "linear"),
}


def compare(runs: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draws the curves of `runs`: a colour an optimizer, mean ± standard deviation."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    figure.suptitle(title)
    for axes, (key, (label, scale)) in zip(
        figure.subplots(2, 2).flat, _PANELS.items(), strict=True
    ):
        for name in dict.fromkeys(run["optimizer"] for run in runs):
            curves = [run["curves"] for run in runs if run["optimizer"] == name]
            first = key == "alignment"  # before the first step there is no estimate
            values = np.array([curve[key][first:] for curve in curves])
            steps, mean = curves[0]["step"][first:], values.mean(0)
            spread = values.std(0, ddof=1) if len(values) > 1 else 0 * mean
            style = "--" if name == "sam_matched" else "-"
            axes.plot(steps, mean, style, color=COLOURS[name], label=name)
            low = mean - spread
            if scale == "log":  # which has no place for what is below zero
                low = np.maximum(low, values.min(0))
            axes.fill_between(steps, low, mean + spread, color=COLOURS[name], alpha=0.2)
        axes.set(xlabel="step", title=label, yscale=scale)
        axes.grid(alpha=0.3)
        if key == "test_accuracy":  # the untrained network would squeeze the rest
            trained = [value for run in runs for value in run["curves"][key][1:]]
            axes.set_ylim(min(trained) - 0.01, min(max(trained) + 0.01, 1))
    figure.axes[0].legend()
    figure.savefig(path, dpi=110)
