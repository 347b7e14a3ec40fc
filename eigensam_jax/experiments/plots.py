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
    """Draws the curves of `runs`: a colour an optimizer, mean and spread over seeds."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    figure.suptitle(title)
    for axes, (key, (label, scale)) in zip(
        figure.subplots(2, 2).flat, _PANELS.items(), strict=True
    ):
        for name in dict.fromkeys(run["optimizer"] for run in runs):
            curves = [run["curves"] for run in runs if run["optimizer"] == name]
            values = np.array([curve[key] for curve in curves])
            steps, mean, spread = curves[0]["step"], values.mean(0), values.std(0)
            axes.plot(steps, mean, color=COLOURS[name], label=name)
            low, high = np.maximum(mean - spread, values.min(0)), mean + spread
            axes.fill_between(steps, low, high, color=COLOURS[name], alpha=0.2)
        axes.set(xlabel="step", title=label, yscale=scale)
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path, dpi=110)
