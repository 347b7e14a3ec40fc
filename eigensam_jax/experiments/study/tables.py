"""The tables of `compare`, `accuracy`, `frontier` and `ablate`, from results files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from eigensam_jax.experiments import registry
from eigensam_jax.experiments.entries import GRADIENTS, PLAIN
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.records import tables
from eigensam_jax.experiments.registry import METHODS
from eigensam_jax.experiments.study.plans import score

Record = dict[str, Any]

FRONTIER = ("steps", "gradients")  # tables, by what is equal for all methods
PAIRED_HEADERS = ("test acc. %", "train loss", "λ_max", "alignment")
TUNING_HEADERS = ("learning rate", "ρ", "α", "validation acc. %")
_FIGURES: dict[str, tuple[float, int]] = {  # factor, digits
    "test_accuracy": (100, 2),
    "train_loss": (1, 4),
    "lambda_max": (1, 3),
    "alignment": (1, 3),
}
_OF_FORECASTS = {"test_loss": (1, 4)} | {
    key: x for key, x in _FIGURES.items() if key != "test_accuracy"
}


def all_tables(runs: Sequence[Record], title: str) -> list[Table]:
    """All tables, for a terminal."""
    result = []
    for name in dict.fromkeys(run["table"] for run in runs):
        heading = f"{name}: {title}"
        if name == "tuning":
            tuned = f"validation {quality(runs)[1].removeprefix('test ')}"
            above: tuple[str, ...] = ("", *TUNING_HEADERS[:-1], tuned)
            result.append(tables.table(heading, above, tuning(runs)))
            continue
        headers: tuple[str, ...] = ("", quality(runs)[1], *PAIRED_HEADERS[1:])
        make, above = summary, ("", "grad.", "‖ε‖", *headers[1:])
        if name in FRONTIER:
            make, above = frontier, ("", "grad.", "time", "ρ", *headers[1:-1])
        rows = [[x.replace(" ± ", "±") for x in row] for row in make(runs, name)]
        result.append(tables.table(heading, above, rows))
        pairs = paired(runs, name)
        if name in FRONTIER or not pairs:
            first = against(runs, name)
            pairs = first + [row for row in pairs if row not in first]
        if pairs:
            result.append(tables.table("differences", headers, pairs))
    return result


def quality(runs: Sequence[Record]) -> tuple[str, str]:
    """The figure to judge methods by: a record's field, and its name in words."""
    ended = [run for run in runs if "diverged" not in run]
    if all(run.get("test_accuracy") is None for run in ended):
        return "test_loss", "test loss"
    return "test_accuracy", "test acc. %"


def summary(runs: Sequence[Record], table: str) -> list[list[str]]:
    """A row per method: gradients a step, ‖ε‖, and the means of the figures."""
    rows = []
    for row, of_row in _by_row(runs, table).items():
        radii = [run["radius"] for run in of_row]
        figures = [
            tables.mean_and_interval(values, digits, factor, sign=False)
            for values, factor, digits in _values(of_row)
        ]
        gradients = f"{of_row[0]['gradients']:.2f}"
        rows.append([row, gradients, f"{sum(radii) / len(radii):.3f}", *figures])
    return rows


def paired(runs: Sequence[Record], table: str) -> list[list[str]]:
    """A row per pair of methods by `PAIRED_HEADERS`: differences paired by seed."""
    rows, found = [], _by_row(runs, table)
    names = dict.fromkeys(row.partition(",")[0] for row in found)
    plain = [x for x in names if x in METHODS and METHODS[x].link is None]
    for row in found:
        name, comma, rest = row.partition(",")
        baseline = METHODS[name].baseline if name in METHODS else ""
        others = plain if baseline == PLAIN else [baseline]
        there = [x for x in (f"{y}{comma}{rest}" for y in others) if x in found]
        for other in there[:1]:
            rows.append([f"{row} − {other}", *difference(found[row], found[other])])
    return rows


def frontier(runs: Sequence[Record], table: str) -> list[list[str]]:
    """A row per method: gradients per step of the usual length, time, ρ, the figures.

    The time is that of the fastest seed, over the first method's at equal steps.
    """
    first = next(iter(_by_row(runs, FRONTIER[0]).values()))
    plain = min(run["training_time_s"] for run in first)
    rows = []
    for row, of_row in _by_row(runs, table).items():
        time = min(run["training_time_s"] for run in of_row) / plain
        cost = f"{spent(of_row[0]):.2f}", f"{time:.2f}"
        rho = sum(run["rho"] for run in of_row) / len(of_row)
        cells = [
            tables.mean_and_interval(values, digits, factor, sign=False)
            for values, factor, digits in _values(of_row)[:3]
        ]
        rows.append([METHODS[row].label, *cost, f"{rho:.3g}", *cells])
    return rows


def spent(run: Record) -> float:
    """The gradients of a run, per step of a run of the usual length."""
    return float(run["gradients"] * run.get("longer", 1))


def against(runs: Sequence[Record], what: str) -> list[list[str]]:
    """As `paired`, for every method of a table against the first, or a named one.

    `what` is the table, or the table and, after a comma, the row. UserError is raised
    where there are none.
    """
    table, _, name = what.partition(", ")
    found = _by_row(runs, table)
    if name not in ("", *found):
        raise UserError(f"against {what}: name a row of {', '.join(found)}")
    base = name or next(iter(found))
    return [
        [f"{row} − {base}", *difference(of_row, found[base])]
        for row, of_row in found.items()
        if row != base
    ]


def gains(studies: Sequence[Record], what: str) -> list[list[str]]:
    """A row per study: a figure of its differences, bold where they are significant.

    `what` names the figure, test or one of `PAIRED_HEADERS`, then, after commas, the
    columns: methods, held against the first of a study, and pairs as in `paired`.
    Where a study lacks them stands –.
    """
    figure, *columns = what.split(", ")
    figures = ("test", *PAIRED_HEADERS[1:])
    unknown = {x for column in columns for x in column.split(" − ")} - {*METHODS}
    if figure not in figures or unknown:
        raise UserError(
            f"gains {what}: name one of {', '.join(figures)}, then methods of "
            f"{', '.join(METHODS)}"
        )
    rows = []
    for study in studies:
        runs = study["runs"]
        table = "main" if by_row(runs, "main") else FRONTIER[0]
        at = 1 + figures.index(figure)
        found = {x[0].split(" − ")[0]: x[at] for x in against(runs, table)}
        found |= {x[0]: x[at] for x in paired(runs, table)}
        row = [_heading(study)]
        for cell in (found.get(column, "–") for column in columns):
            mean, _, half = cell.partition(" ± ")  # as shown, for a reader to check
            row.append(
                f"**{cell}**" if half and abs(float(mean)) > float(half) else cell
            )
        rows.append(row)
    return rows


def chosen(studies: Sequence[Record], what: str) -> list[list[str]]:
    """A row per study: what validation chose for each method of `what`, or –.

    ρ, and α if there is one; ≤ and ≥ mark the smallest and the largest that was tried.
    """
    names = what.split(", ")
    if unknown := {*names} - {*METHODS}:
        raise UserError(f"chosen {what}: {unknown} are none of {', '.join(METHODS)}")
    rows = []
    for study in studies:
        trials = by_row(study["runs"], "tuning")
        cells = [_choice(trials[name]) if name in trials else "–" for name in names]
        rows.append([_heading(study), *cells])
    return rows


def _choice(trials: Sequence[Record]) -> str:
    best, cells = max(trials, key=score), []
    for key, name in {"rho": "", "alpha": "α "}.items():
        values = {run.get(key, 0.0) for run in trials}
        ends = {min(values): "≤ ", max(values): "≥ "} if len(values) > 1 else {}
        value = best.get(key, 0.0)
        if value:
            cells.append(f"{name}{ends.get(value, '')}{value:g}")
    return ", ".join(cells)


def _heading(study: Record) -> str:
    """A link to the study's page, from a page beside its folder."""
    config = study["config"]
    heading = f"{registry.title(config)}, {config['epochs']} epochs"
    return f"[{heading}]({Path(config['out']).name}/README.md)"


def difference(one: Sequence[Record], other: Sequence[Record]) -> list[str]:
    """The cells of `paired`: `one` less `other`, paired by seed."""
    by_seed = {run["seed"]: run for run in other}
    pairs = [(run, by_seed[run["seed"]]) for run in one if run["seed"] in by_seed]
    cells = []
    for key, (factor, digits) in _figures(one).items():
        both = [(a[key], b[key]) for a, b in pairs]
        values = [None if None in x else x[0] - x[1] for x in both]
        cells.append(tables.mean_and_interval(values, digits, factor))
    return cells


def tuning(runs: Sequence[Record]) -> list[list[str]]:
    """A row per candidate by `TUNING_HEADERS`; the best of each method is marked."""
    rows = []
    for row, of_row in _by_row(runs, "tuning").items():
        best = max(of_row, key=score)
        key, _ = quality(of_row)
        factor, digits = _figures(of_row)[key]
        for run in of_row:
            mark = " ←" if run is best else ""
            rows.append(
                [
                    row,
                    f"{run['learning_rate']:g}",
                    f"{run['rho']:g}" if METHODS[row].link else "–",
                    f"{run.get('alpha', 0):g}" if METHODS[row].tracker else "–",
                    "diverged"
                    if "diverged" in run
                    else f"{factor * run[key]:.{digits}f}{mark}",
                ]
            )
    return rows


def over_training(runs: Sequence[Record], key: str) -> list[list[str]]:
    """A row per method of `main`: a figure at each look, mean ± standard deviation."""
    factor, digits = _figures(runs)[key]
    return [
        [
            row,
            *(
                tables.mean_and_deviation(values, digits, factor)
                for values in zip(*(run["curves"][key] for run in of_row), strict=True)
            ),
        ]
        for row, of_row in _by_row(runs, "main").items()
    ]


def _by_row(runs: Sequence[Record], table: str) -> dict[str, list[Record]]:
    """As `by_row`; UserError if the table has no runs."""
    if found := by_row(runs, table):
        return found
    there = dict.fromkeys(run["table"] for run in runs)
    raise UserError(f"there is no table {table}; name a table of {', '.join(there)}")


def by_row(runs: Sequence[Record], table: str) -> dict[str, list[Record]]:
    """The runs of a table, row by row.

    In that of the same gradients are also the runs of the same steps that spent SAM's.
    """
    result: dict[str, list[Record]] = {}
    for run in runs:
        if run["table"] == table:
            result.setdefault(run["row"], []).append(run)
    if table != FRONTIER[1]:
        return result
    steps, sams = by_row(runs, FRONTIER[0]), GRADIENTS
    result |= {
        row: of_row
        for row, of_row in steps.items()
        if row not in result and round(sams / of_row[0]["gradients"], 2) == 1
    }
    return {row: result[row] for row in steps if row in result}


def _values(runs: Sequence[Record]) -> list[tuple[list[float | None], float, int]]:
    return [
        ([run[key] for run in runs], factor, digits)
        for key, (factor, digits) in _figures(runs).items()
    ]


def _figures(runs: Sequence[Record]) -> dict[str, tuple[float, int]]:
    return _FIGURES if quality(runs)[0] in _FIGURES else _OF_FORECASTS
