"""The plot of what `eigensam after-training` found."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eigensam_jax.experiments.after_training import tables
from eigensam_jax.experiments.after_training.changes import SIZES
from eigensam_jax.experiments.records import images
from eigensam_jax.experiments.records.tables import half_interval
from eigensam_jax.experiments.registry import look

Run = Mapping[str, Any]
_TITLES = {
    "quantized": "weights rounded to fewer bits",
    "pruned": "smallest weights set to 0",
    "noise": "Gaussian noise added",
    "worst_case": "moved to where the loss is highest",
}
_STYLES = {(1, False): "-", (1, True): ":", (2, False): "--"}


def after_training(runs: Sequence[Run], title: str, path: Path) -> None:
    """Draws the test accuracy after each change: a panel a kind, a line a method."""
    count = len({run["seed"] for run in runs})
    note = f"Test accuracy in %, means over {count} seeds; bars are 95% intervals."
    figure, grid = images.panels(2, 2, 8, title, note)
    for axes, (kind, (what, sizes)) in zip(grid.flat, SIZES.items(), strict=True):
        for i, (name, of_method) in enumerate(tables.chosen(runs).items()):
            first = of_method[0]
            values = [run["after"][f"{kind}_accuracy"] for run in of_method]
            accuracy = 100 * np.array(values)
            axes.errorbar(
                np.arange(len(sizes)) + 0.03 * i,
                accuracy.mean(0),
                half_interval(accuracy),
                linestyle=_STYLES[first["longer"], first["averaged"]],
                **look(first["optimizer"]) | {"label": name},
            )
        axes.set_xticks(range(len(sizes)), [f"{x:g}" for x in sizes])
        axes.set(title=_TITLES[kind], xlabel=what)
    images.legend(figure, 3)
    images.save(figure, path)
