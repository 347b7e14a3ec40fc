"""The plot of what `eigensam after-training` found."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from eigensam_jax.experiments.after_training import tables
from eigensam_jax.experiments.after_training.changes import SIZES
from eigensam_jax.experiments.records import images
from eigensam_jax.experiments.registry import METHODS

Run = Mapping[str, Any]
_TITLES = {
    "quantized": "rounded to fewer bits",
    "pruned": "the smallest weights set to 0",
    "noise": "Gaussian noise added",
    "worst_case": "moved where the loss rises most",
}
_STYLES = {(1, False): "o-", (1, True): "s:", (2, False): "^--"}


def after_training(runs: Sequence[Run], title: str, path: Path) -> None:
    """Draws the test accuracy after each change, a panel a kind, a line a method.

    Lines are means over the seeds, bands their standard deviation.
    """
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    figure.suptitle(f"test accuracy of {title}: mean ± standard deviation over seeds")
    for axes, (kind, (what, _)) in zip(
        figure.subplots(2, 2, sharey=True).flat, SIZES.items(), strict=True
    ):
        places = range(len(SIZES[kind][1]))
        for name, of_method in tables.chosen(runs).items():
            first = of_method[0]
            values = 100 * np.array(
                [run["after"][f"{kind}_accuracy"] for run in of_method]
            )
            style = _STYLES[first["longer"], first["averaged"]]
            drawn = {"color": METHODS[first["optimizer"]].colour, "label": name}
            images.band(axes, places, values, style, **drawn)
        axes.set_xticks(places, [f"{x:g}" for x in SIZES[kind][1]])
        axes.set(title=_TITLES[kind], xlabel=what, ylabel="test accuracy, %")
        axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    images.save(figure, path)
