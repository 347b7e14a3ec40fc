"""Plots of the results files of `eigensam compare`, `accuracy` and `ablate`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from eigensam_jax.experiments.records import images
from eigensam_jax.experiments.records.tables import half_interval
from eigensam_jax.experiments.registry import METHODS
from eigensam_jax.experiments.study.tables import FRONTIER, by_row, quality, spent

Record = dict[str, Any]

_LABELS = {
    "train_loss": "training loss",
    "test_accuracy": "test accuracy %",
    "test_loss": "test error",
    "lambda_max": "λ_max of the training loss",
    "alignment": "alignment |cos(ε, v_top)|",
}


def compare(runs: Sequence[Record], title: str, path: Path) -> None:
    """Draws all that was measured over training.

    Bands are standard deviations over seeds.
    """
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    figure.suptitle(title)
    keys = "train_loss", quality(runs)[0], "lambda_max", "alignment"
    for axes, key in zip(figure.subplots(2, 2).flat, keys, strict=True):
        _over_training(axes, by_row(runs, "main"), key)
        if key in ("train_loss", "lambda_max"):
            axes.set_yscale("log")
    figure.axes[0].legend()
    images.save(figure, path)


def accuracy(runs: Sequence[Record], title: str, path: Path) -> None:
    """Draws λ_max and alignment over training, and what each method came to.

    Bands are standard deviations over seeds, bars 95% intervals.
    """
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, 3)
    found, good = by_row(runs, "main"), quality(runs)[0]
    plain = {name for name in METHODS if METHODS[name].link is None}
    few = plain | {name for name in METHODS if METHODS[name].usual}
    drawn = {
        name: of_row
        for name, of_row in found.items()
        if name in few and not METHODS[name].radius_of
    }
    for axes, key in zip(panels, ("lambda_max", "alignment"), strict=False):
        _over_training(axes, drawn, key)
    panels[0].legend()
    for name, of_row in found.items():
        _point(
            *(panels[2], of_row, "lambda_max"),
            *(METHODS[name].colour, METHODS[name].label, good),
        )
    panels[2].set(xlabel=_LABELS["lambda_max"], title=_LABELS[good])
    panels[2].set_xscale("log")
    panels[2].grid(alpha=0.3)
    panels[2].legend(fontsize="small")
    images.save(figure, path)


def ablate(runs: Sequence[Record], title: str, path: Path) -> None:
    """Draws accuracy and λ_max of each row against radius, or against gradients spent.

    A row of panels a table. Bars are 95% intervals over seeds.
    """
    names = list(dict.fromkeys(run["table"] for run in runs))
    figure = Figure(figsize=(10, 4 * len(names)), layout="constrained")
    figure.suptitle(title)
    for name, panels in zip(
        names, figure.subplots(len(names), 2, squeeze=False), strict=True
    ):
        by_radius = name not in ("tracker", "when")
        x = "radius" if by_radius else "gradients"
        label = "mean ‖ε‖" if by_radius else "gradient evaluations a step"
        for axes, key in zip(panels, (quality(runs)[0], "lambda_max"), strict=True):
            colours: dict[str, str] = {}
            for row, of_row in by_row(runs, name).items():
                first = row.partition(",")[0]
                label_once = None if first in colours else first
                own = METHODS[first].colour if first in METHODS else f"C{len(colours)}"
                colour = colours.setdefault(first, own)
                _point(axes, of_row, x, colour, label_once, key)
            axes.set(xlabel=label, title=f"{name}: {_LABELS[key]}")
            axes.grid(alpha=0.3)
        panels[0].legend(fontsize="small")
        panels[1].set_yscale("log")
    images.save(figure, path)


def frontier(runs: Sequence[Record], title: str, path: Path) -> None:
    """Draws accuracy and λ_max of each method against the gradients that it spent.

    Full at the same steps, hollow at SAM's number of gradients. Bars are 95% intervals.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    text = f"{title}: full after the same steps, hollow after the same gradients"
    figure.suptitle(f"{text}; bars are 95% intervals", x=0.01, ha="left")
    panels = figure.subplots(1, 2)
    for axes, key in zip(panels, (quality(runs)[0], "lambda_max"), strict=True):
        for table in FRONTIER:
            found = by_row(runs, table)
            for i, (name, of_row) in enumerate(found.items()):
                if table == "gradients" and "longer" not in of_row[0]:
                    continue  # the same runs
                method, aside = METHODS[name], 0.03 * (i - len(found) / 2)
                drawn = [run | {"spent": spent(run) + aside} for run in of_row]
                label = method.label if table == "steps" else None
                hollow = {"markerfacecolor": "white"} if table == "gradients" else {}
                _point(axes, drawn, "spent", method.colour, label, key, **hollow)
        plain = METHODS[runs[0]["optimizer"]].label
        axes.set(xlabel=f"gradients for each step of {plain}", title=_LABELS[key])
        axes.grid(alpha=0.3)
    panels[1].set_yscale("log")
    panels[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[1].yaxis.set_major_formatter("{x:g}")
    panels[1].yaxis.set_minor_formatter("")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    images.save(figure, path)


DRAW: dict[str, Callable[[Sequence[Record], str, Path], None]] = {
    "compare": compare,
    "accuracy": accuracy,
    "ablate": ablate,
    "frontier": frontier,
}


def _over_training(axes: Axes, found: dict[str, list[Record]], key: str) -> None:
    """A figure at each look: a colour a method, mean ± standard deviation."""
    factor = 100 if key == "test_accuracy" else 1
    for name, of_row in found.items():
        values = factor * np.array([run["curves"][key] for run in of_row])
        steps, mean = of_row[0]["curves"]["step"], values.mean(0)
        spread = values.std(0, ddof=1) if len(values) > 1 else 0 * mean
        # On a logarithmic scale there is no place for what is below zero.
        low = np.maximum(mean - spread, values.min(0))
        colour = METHODS[name].colour
        style = ".--" if METHODS[name].radius_of else ".-"
        axes.plot(steps, mean, style, color=colour, label=METHODS[name].label)
        axes.fill_between(steps, low, mean + spread, color=colour, alpha=0.2)
    axes.set(xlabel="step", title=_LABELS[key])
    axes.grid(alpha=0.3)


def _point(
    axes: Axes,
    runs: Sequence[Record],
    x: str,
    colour: str,
    label: str | None,
    y: str,
    **style: Any,
) -> None:
    """The mean over seeds with 95% intervals."""
    factor = 100 if y == "test_accuracy" else 1
    across = np.array([run[x] for run in runs])
    up = factor * np.array([run[y] for run in runs])
    several = len(runs) > 1  # of one there is no interval
    axes.errorbar(
        across.mean(),
        up.mean(),
        xerr=half_interval(across) if several else None,
        yerr=half_interval(up) if several else None,
        fmt="o",
        color=colour,
        label=label,
        capsize=2,
        **style,
    )
