"""Plots of the results files of `eigensam compare`, `accuracy` and `ablate`."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eigensam_jax.experiments.records import images
from eigensam_jax.experiments.records.tables import half_interval
from eigensam_jax.experiments.registry import look
from eigensam_jax.experiments.study.tables import FRONTIER, by_row, quality, spent

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
    if any(len(of_row[0]["curves"]["step"]) < _FEW for of_row in found.values()):
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
    tables = {x: by_row(runs, x) for x in dict.fromkeys(run["table"] for run in runs)}
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
            axes.set(title=f"{_ABLATED.get(table, table)}: {_LABELS[key]}")
            images.by_decades(axes, "x")
    images.save(figure, path)


def frontier(runs: Sequence[Record], title: str, path: Path) -> None:
    """Draws accuracy and λ_max of each method against the gradients that it spent.

    Those that spent the same are side by side.
    """
    full, hollow = (by_row(runs, table) for table in FRONTIER)
    drawn: list[tuple[str, list[Record], dict[str, Any]]]
    drawn = [(name, of_row, {}) for name, of_row in full.items()]
    drawn += [  # others are the same runs
        (name, of_row, {"markerfacecolor": "white"})
        for name, of_row in hollow.items()
        if "longer" in of_row[0]
    ]
    at = [round(spent(of_row[0]), 1) for _, of_row, _ in drawn]
    note = (
        "Filled: after the same number of steps; hollow: of gradients. Points side by "
        f"side spent the same.\n{_note(runs)}"
    )
    figure, grid = images.panels(1, 2, 4.6, title, note)
    for axes, key in zip(grid.flat, (quality(runs)[0], "lambda_max"), strict=True):
        for i, (name, of_row, style) in enumerate(drawn):
            beside = at.count(at[i])
            to_next = min((abs(x - at[i]) for x in at if x != at[i]), default=1.0)
            apart = min(0.035, 0.8 * to_next / beside)
            aside = apart * (at[:i].count(at[i]) - (beside - 1) / 2)
            values, own = _values(of_row, key), look(name)
            axes.errorbar(
                *(at[i] + aside, values.mean(), half_interval(values)),
                fmt=own.pop("marker"),
                capsize=3,
                markersize=7,
                **own,
                **style,
            )
        plain = look(runs[0]["optimizer"])["label"]
        axes.set(xlabel=f"gradients for each step of {plain}", title=_LABELS[key])
        axes.set_xticks(sorted(set(at)))
        images.by_decades(axes, "y")
    images.legend(figure, 3)
    images.save(figure, path)


DRAW: dict[str, Callable[[Sequence[Record], str, Path], None]] = {
    "compare": compare,
    "accuracy": ends,
    "ablate": ablate,
    "frontier": frontier,
}


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
