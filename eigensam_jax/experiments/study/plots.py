"""Plots of the results files of `compare`, `accuracy`, `frontier` and `ablate`."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eigensam_jax.experiments.records import images
from eigensam_jax.experiments.registry import look
from eigensam_jax.experiments.study.tables import FRONTIER, by_row, quality

Record = dict[str, Any]

_LABELS = {
    "train_loss": "training loss",
    "test_accuracy": "test accuracy %",
    "test_loss": "test loss",
    "lambda_max": "sharpness λ_max",
    "alignment": "alignment |cos(ε, v)|",
}
_ABLATED = {"rho": "ρ", "alpha": "α", "when": "steps", "norms": "norm layers"}
_FEW = 5  # looks, of which no curve is drawn


def compare(runs: Sequence[Record], title: str, path: Path) -> None:
    """Draws all that was measured over training, or at its end if looks are few."""
    found = by_row(runs, "main")
    known = [of_row[0]["curves"] for of_row in found.values()]
    if any(len(x["step"]) < _FEW or {*_keys(runs)} - x.keys() for x in known):
        ends(runs, title, path)
        return
    count = max(map(len, found.values()))
    note = f"Lines are means over {count} seeds, bands ± their standard deviation."
    figure, grid = images.panels(2, 2, 7, title, note)
    for axes, key in zip(grid.flat, _keys(runs), strict=True):
        for i, (name, of_row) in enumerate(found.items()):
            curves = [run["curves"] for run in of_row]
            values, steps = _values(curves, key), curves[0]["step"]
            spread = values.std(0, ddof=1) if len(values) > 1 else 0
            style = look(name) | {"markevery": (i % 2, 2)}
            images.band(axes, steps, values.mean(0), spread, **style)
        axes.set(xlabel="step", title=_LABELS[key])
        images.by_decades(axes, "y")
    images.legend(figure)
    images.save(figure, path)


def ends(runs: Sequence[Record], title: str, path: Path) -> None:
    """Draws what each method came to."""
    found = by_row(runs, "main")
    note = f"{_note(runs)} Alignment is the mean over training."
    height = 1.6 + 0.3 * len(found)
    figure, grid = images.panels(1, 4, height, title, note, sharey=True)
    for axes, key in zip(grid.flat, _keys(runs), strict=True):
        images.rows(axes, [(_values(x, key), look(name)) for name, x in found.items()])
        axes.set(title=_LABELS[key])
        if key != "alignment":
            images.by_decades(axes, "x")
    images.save(figure, path)


def ablate(runs: Sequence[Record], title: str, path: Path) -> None:
    """Draws accuracy and λ_max of each row; a row of panels a table."""
    names = dict.fromkeys(run["table"] for run in runs)
    _by_table(runs, {x: _ABLATED.get(x, x) for x in names}, title, path)


def frontier(runs: Sequence[Record], title: str, path: Path) -> None:
    """Draws accuracy and λ_max of each method at equal steps, then equal gradients."""
    _by_table(runs, {x: f"the same {x}" for x in FRONTIER}, title, path)


DRAW: dict[str, Callable[[Sequence[Record], str, Path], None]] = {
    "compare": compare,
    "accuracy": ends,
    "ablate": ablate,
    "frontier": frontier,
}


def _by_table(
    runs: Sequence[Record], headings: Mapping[str, str], title: str, path: Path
) -> None:
    """Draws accuracy and λ_max of each row; a row of panels for each heading."""
    tables = {x: by_row(runs, x) for x in headings}
    counts = [len(found) for found in tables.values()]
    note = f"{_note(runs)} The dotted line is at the first row."
    size = len(tables), 2, 1 + 0.7 * len(tables) + 0.2 * sum(counts)
    shared: dict[str, Any] = {"sharey": "row", "height_ratios": counts}
    figure, grid = images.panels(*size, title, note, **shared)
    for (table, found), panels in zip(tables.items(), grid, strict=True):
        variants = list(dict.fromkeys(row.partition(",")[2] for row in found))
        ordered = sorted(found, key=lambda row: variants.index(row.partition(",")[2]))
        for axes, key in zip(panels, (quality(runs)[0], "lambda_max"), strict=True):
            drawn = [(_values(found[row], key), _of_row(row)) for row in ordered]
            images.rows(axes, drawn)
            first, style = drawn[0]
            axes.axvline(first.mean(), color=style["color"], linestyle=":")
            axes.set(title=f"{headings[table]}: {_LABELS[key]}")
            images.by_decades(axes, "x")
    images.save(figure, path)


def _keys(runs: Sequence[Record]) -> tuple[str, ...]:
    return quality(runs)[0], "train_loss", "lambda_max", "alignment"


def _note(runs: Sequence[Record]) -> str:
    """What the bars mean, if there are any."""
    count = len({run["seed"] for run in runs if run["table"] != "tuning"})
    return f"Bars are 95% intervals over {count} seeds." if count > 1 else "One seed."


def _values(runs: Sequence[Record], key: str) -> np.ndarray:
    return (100 if key == "test_accuracy" else 1) * np.array([x[key] for x in runs])


def _of_row(row: str) -> dict[str, Any]:
    """How a row is drawn, with what its name says after the method's."""
    name, comma, rest = row.partition(",")
    drawn = look(name)
    singular = re.sub(r"\b1 (\w+)s\b", r"1 \1", rest)
    return drawn | {"label": f"{drawn['label']}{comma}{singular}"}
