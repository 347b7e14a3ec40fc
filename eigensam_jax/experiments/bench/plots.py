"""Plots of what `eigensam bench` found."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eigensam_jax.experiments.bench import tables
from eigensam_jax.experiments.records import images, results

Record = Mapping[str, Any]

_GROWTH = (  # what is scaled, key, factor, label, scale
    ("parameters", "operations", 1e-9, "operations of a step (10⁹)", "log"),
    ("parameters", "temp_bytes", 2**-20, "temporary memory (MiB)", "log"),
    ("parameters", "passes_over_sam", 1, "passes over parameters, beyond SAM's", ""),
    ("devices", "operations", 1e-9, "operations, each device (10⁹)", "log"),
    ("devices", "collectives", 1, "exchanges of a step", ""),
    ("devices", "collective_bytes", 1e-6, "MB exchanged in a step", ""),
)


def bench(runs: Sequence[Record], path: Path) -> None:
    """Draws a column a network: time and operations, and temporary memory below them.

    Times are medians with their quartiles, in steps of SGD; operations are in
    gradients.
    """
    networks = tables.networks(runs)
    figure = Figure(figsize=(1 + 4 * len(networks), 7), layout="constrained")
    grid = figure.subplots(2, len(networks), squeeze=False)
    for (above, below), (name, found) in zip(grid.T, networks.items(), strict=True):
        units, optimizers = tables.named(found)
        places = np.arange(len(optimizers))
        low, middle, high = np.array([x["time_to_sgd"] for x in optimizers.values()]).T
        above.errorbar(
            middle, places, xerr=(middle - low, high - middle), fmt="o", label="time"
        )
        operations = [x.get("operations", np.nan) for x in optimizers.values()]
        above.plot(
            np.array(operations) / units["gradient"]["operations"],
            places,
            "D",
            fillstyle="none",
            label="operations",
        )
        known = {k: x["temp_bytes"] for k, x in optimizers.items() if "temp_bytes" in x}
        below.barh(range(len(known)), np.array(list(known.values())) / 2**20, 0.6)
        title = f"{name}, batch {found[0]['batch_size']}"
        above.set(title=title, xlim=(0, None))
        above.set_xlabel("steps of SGD, or gradients")
        below.set_xlabel("temporary memory (MiB)")
        _name_rows(above, list(optimizers))
        _name_rows(below, list(known))
    grid[0, 0].legend(fontsize="small")
    images.save(figure, path)


def growth(runs: Sequence[Record], path: Path) -> None:
    """Draws cost against parameters above, against devices below."""
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    names = list(dict.fromkeys(run["optimizer"] for run in runs))
    colours = matplotlib.colormaps["tab10"]
    panels = zip(figure.subplots(2, 3).flat, _GROWTH, strict=True)
    for axes, (scaled, key, factor, label, scale) in panels:
        for i, name in enumerate(names):
            if (key, name) == ("passes_over_sam", "sgd"):
                continue  # a gradient less, which is many passes
            chosen = results.select(runs, scaled=scaled, optimizer=name)
            x = [run[scaled] for run in chosen]
            y = [factor * run[key] for run in chosen]
            axes.plot(x, y, ".-", color=colours(i), label=name)
        axes.set(xlabel=scaled, ylabel=label, xscale="log", yscale=scale or "linear")
        if scaled == "devices":
            ticks = sorted({run["devices"] for run in runs})
            axes.set_xticks(ticks, [str(n) for n in ticks])
            axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    images.save(figure, path)


def _name_rows(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
