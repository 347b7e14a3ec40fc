"""The tables of `eigensam after-training`, out of its results files."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table
from scipy import stats

from eigensam_jax.experiments.after_training.changes import SIZES
from eigensam_jax.experiments.after_training.sharpness import MEASURES
from eigensam_jax.experiments.records import results, tables
from eigensam_jax.experiments.registry import METHODS, matched

Record = Mapping[str, Any]
Chosen = dict[str, list[Record]]

METHOD_HEADERS = ("gradients", "tuned", "‖ε‖", "test acc. %", "train loss", "λ_max")
OUTCOMES: dict[
    str, tuple[str, Callable[[Record], float]]
] = {  # of what may happen to a network, the worse the larger
    "gap": ("test − train loss", lambda run: run["test_loss"] - run["train_loss"]),
    "error": ("test error", lambda run: 1 - run["test_accuracy"]),
    "next": (
        "accuracy forgotten",
        lambda run: run["test_accuracy"] - run["after"]["next_accuracy"][0],
    ),
}
_GROUP = ("optimizer", "longer", "averaged")


def label(run: Record) -> str:
    """What a table and a plot call the method of a run."""
    longer = f", {run['longer']} times the steps" if run["longer"] > 1 else ""
    averaged = ", averaged" if run["averaged"] else ""
    return f"{METHODS[run['optimizer']].label}{longer}{averaged}"


def kinds(runs: Sequence[Record]) -> list[str]:
    """What was done to the weights in these runs."""
    return [*SIZES, *(["next"] if "next_accuracy" in runs[0]["after"] else [])]


def sizes(kind: str) -> list[str]:
    """The header of each size of a change."""
    if kind == "next":
        return ["the old data", "the new data"]
    what, values = SIZES[kind]
    return [f"{what.split()[0]} {x:g}" for x in values]


def chosen(runs: Sequence[Record]) -> Chosen:
    """The runs of each method at the setting that was best on the held-out tenth.

    SAM at the radius of a method is that of the chosen setting of the method.
    """
    groups: dict[tuple[Any, ...], dict[float, list[Record]]] = {}
    for run in runs:
        group = tuple(run[key] for key in _GROUP)
        groups.setdefault(group, {}).setdefault(run["tuned"], []).append(run)
    best: dict[str, float] = {}
    found: Chosen = {}
    for (name, *_), settings in groups.items():
        score = lambda of, settings=settings: np.mean(
            [run["held_accuracy"] for run in settings[of]]
        )
        tuned = best.get(METHODS[name].radius_of) or max(settings, key=score)
        best[name] = tuned
        found[label(settings[tuned][0])] = settings[tuned]
    return found


def methods(runs: Sequence[Record]) -> list[list[str]]:
    """A row a method by `METHOD_HEADERS`, at its chosen setting."""
    rows = []
    for name, of_method in chosen(runs).items():
        mean = {k: np.mean([x[k] for x in of_method]) for k in ("gradients", "radius")}
        cells = [
            _cell(of_method, key, digits, factor)
            for key, digits, factor in (
                ("test_accuracy", 2, 100),
                ("train_loss", 4, 1),
                ("lambda_max", 2, 1),
            )
        ]
        tuned = f"{of_method[0]['tuned']:g}"
        before = f"{mean['gradients']:.2f}", tuned, f"{mean['radius']:.3f}"
        rows.append([name, *before, *cells])
    return rows


def settings(runs: Sequence[Record], outcomes: Sequence[str]) -> list[list[str]]:
    """A row a method and setting: accuracies in percent, held out, of the test, after.

    An outcome is "next", or a kind of change and its size, as in "quantized:3".
    """
    groups: dict[tuple[str, float], list[Record]] = {}
    for run in runs:
        groups.setdefault((label(run), run["tuned"]), []).append(run)
    rows = []
    for (name, tuned), of_group in groups.items():
        values = [[run["held_accuracy"] for run in of_group]]
        values.append([run["test_accuracy"] for run in of_group])
        for outcome in outcomes:
            kind, place = _place(outcome)
            key = f"{kind}_accuracy"
            values.append([run["after"][key][place] for run in of_group])
        cells = [tables.mean_and_interval(x, 1, 100, sign=False) for x in values]
        rows.append([name, f"{tuned:g}", _cell(of_group, "lambda_max", 1, 1), *cells])
    return rows


def after(runs: Sequence[Record], kind: str) -> list[list[str]]:
    """A row a method: the test accuracy in percent after each size of a change."""
    key = f"{kind}_accuracy"
    return [
        [
            name,
            *(
                tables.mean_and_interval(values, 1, 100, sign=False)
                for values in zip(
                    *(run["after"][key] for run in of_method), strict=True
                )
            ),
        ]
        for name, of_method in chosen(runs).items()
    ]


def differences(runs: Sequence[Record], kind: str) -> list[list[str]]:
    """A row a pair of methods: the differences of `after`, paired by seed.

    Every method is held against the first, and those that have SAM at their radius
    against that.
    """
    key, found = f"{kind}_accuracy", chosen(runs)
    first, *others = found
    pairs = [(name, first) for name in others]
    for name in others:
        sam = matched(found[name][0]["optimizer"])
        if sam and METHODS[sam].label in found:
            pairs.append((name, METHODS[sam].label))
    rows = []
    for one, other in pairs:
        of_seed = {run["seed"]: np.array(run["after"][key]) for run in found[other]}
        less = [
            np.array(run["after"][key]) - of_seed[run["seed"]] for run in found[one]
        ]
        cells = [tables.mean_and_interval(x, 2, 100) for x in zip(*less, strict=True)]
        rows.append([f"{one} − {other}", *cells])
    return rows


def ranks(runs: Sequence[Record], outcomes: Sequence[str]) -> list[list[str]]:
    """A row a measure: Kendall's τ with each outcome, over the networks of a seed.

    An outcome is a key of `OUTCOMES`, or a kind of change and its size, as in
    "quantized:3": the rise of the test loss. The mean over seeds, with its interval.
    """
    seeds = sorted({run["seed"] for run in runs})
    rows = []
    for measure, name in MEASURES.items():
        row = [name]
        for outcome in outcomes:
            found = []
            for seed in seeds:
                of_seed = results.select(runs, seed=seed)
                values = [run[measure] for run in of_seed]
                fates = [_outcome(run, outcome) for run in of_seed]
                found.append(stats.kendalltau(values, fates).statistic)
            row.append(tables.mean_and_interval(found, 2))
        rows.append(row)
    return rows


def all_tables(runs: Sequence[Record], title: str) -> list[Table]:
    """Everything, for a terminal."""
    found = [tables.table(title, ("", *METHOD_HEADERS), methods(runs))]
    for kind in kinds(runs):
        heading = f"test accuracy in %, {kind}: {title}"
        headers = ("", *sizes(kind))
        found.append(tables.table(heading, headers, after(runs, kind)))
    names = [name for name in OUTCOMES if name != "next" or "next" in kinds(runs)]
    headers = ("", *(OUTCOMES[name][0] for name in names))
    heading = f"Kendall's τ with each measure: {title}"
    return [*found, tables.table(heading, headers, ranks(runs, names))]


def _outcome(run: Record, name: str) -> float:
    if name in OUTCOMES:
        return float(OUTCOMES[name][1](run))
    kind, place = _place(name)
    return float(run["after"][f"{kind}_loss"][place] - run["test_loss"])


def _place(outcome: str) -> tuple[str, int]:
    """The kind of a change, and where its size is in lists: of "next" the old data."""
    kind, _, size = outcome.partition(":")
    return kind, list(SIZES[kind][1]).index(float(size)) if size else 0


def _cell(runs: Sequence[Record], key: str, digits: int, factor: float) -> str:
    values = [run[key] for run in runs]
    return tables.mean_and_interval(values, digits, factor, sign=False)
