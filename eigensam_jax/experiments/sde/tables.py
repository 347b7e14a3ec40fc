"""The tables of `eigensam sde`, out of its results file."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from rich.table import Table

from eigensam_jax.experiments.records import tables

NOTES = (
    "Off: (path − SAM's)/SAM's from the same start, mean over the looks after the "
    "start, mean over seeds; distance: the same of |path − SAM's|. "
    "SAM, other batches: what chance alone makes. No noise: the drift alone, against "
    "the mean of SAM's gradient over all batches. Rates: mean over the looks after the "
    "start, ± standard deviation over seeds."
)
LABELS = {
    "order_1": "order 1 (SGD)",
    "sam": "SAM",
    "sam_again": "SAM, other batches",
    "order_2": "order 2",
    "order_3": "order 3",
    "mean_sam": "SAM, no noise",
    "mean_order_2": "order 2, no noise",
    "mean_order_3": "order 3, no noise",
    "eigen_sam": "Eigen-SAM",
}
QUANTITIES = {"train_loss": "train loss", "lambda_max": "λ_max"}
PARTS = {
    "first": "gradient",
    "second": "second derivatives",
    "third": "third derivatives",
    "ito": "Itô's term",
    "aligned": "third, if ε were along v",
}

Record = Mapping[str, Any]


def title(document: Record) -> str:
    """What was trained, in words."""
    config = document["config"]
    return f"{config['dataset']}, tanh network, η {config['learning_rate']:g}"


def all_tables(runs: Sequence[Record], title: str) -> list[Table]:
    """What the command prints."""
    of_paths = ("off: loss %", "λ_max %", "distance: loss %", "λ_max %")
    orders = ("order 1", "order 2", "order 3")
    of_checks = {
        "one_step": ("slopes of errors in ρ", ("check", *orders), slopes),
        "moments": (
            "moments over paths: off SAM's, in standard errors",
            ("moment", "SAM", *orders),
            moments,
        ),
        "costs": (
            "a drift, in gradients",
            ("order", "operations", "time", "ms"),
            costs,
        ),
    }
    found = {run.get("check") for run in runs}
    return [
        tables.table(title, ("path", "ρ", *of_paths), distances(runs)),
        tables.table(
            "distance to SAM, order 3 less order 2",
            ("ρ", "loss %", "λ_max %", "no noise: loss %", "λ_max %"),
            differences(runs),
        ),
        tables.table(
            "parts of (dλ_max/dt)/λ_max", ("", "SAM", "Eigen-SAM"), rates(runs)
        ),
        *(
            tables.table(title, headers, rows(runs))
            for name, (title, headers, rows) in of_checks.items()
            if name in found
        ),
    ]


def distances(runs: Sequence[Record]) -> list[list[str]]:
    """A row a ρ and kind of path: how far off SAM it is, in % of SAM's."""
    methods = ("sam_again", "order_2", "order_3", "mean_order_2", "mean_order_3")
    rows = []
    for rho in rhos(runs):
        for method in methods:
            off, distance = [], []
            for quantity in QUANTITIES:
                found = relative(runs, method, rho, quantity)
                off.append(tables.mean_and_interval(found.mean(1).tolist(), 1, 100))
                mean = abs(found).mean(1).tolist()
                distance.append(tables.mean_and_interval(mean, 1, 100).lstrip("+"))
            rows.append([LABELS[method], f"{rho:g}", *off, *distance])
    return rows


def differences(runs: Sequence[Record]) -> list[list[str]]:
    """A row a ρ: the distance to SAM of order 3 less that of order 2, paired by seed.

    In % of SAM's, with 95% intervals: negative where order 3 is nearer. First with the
    noise, then without.
    """
    rows = []
    for rho in rhos(runs):
        row = [f"{rho:g}"]
        for kind in ("", "mean_"):
            for quantity in QUANTITIES:
                third, second = (
                    abs(relative(runs, kind + method, rho, quantity)).mean(1)
                    for method in ("order_3", "order_2")
                )
                row.append(tables.mean_and_interval((third - second).tolist(), 1, 100))
        rows.append(row)
    return rows


def rates(runs: Sequence[Record]) -> list[list[str]]:
    """A row a figure, of SAM and of Eigen-SAM: means over training after its start.

    The alignment |cos(ε, v)|, the parts of (dλ/dt)/λ, and the share.
    """
    columns = [
        [run for run in paths(runs, method) if "rates" in run]
        for method in ("sam", "eigen_sam")
    ]
    found: dict[str, tuple[Callable[[Record], Any], int]] = {
        "alignment of ε with v": (
            lambda run: run["rates"]["perturbation_alignment"],
            2,
        ),
        **{
            label: (partial(relative_rate, part=part), 3)
            for part, label in PARTS.items()
        },
        "third / if along v": (share, 2),
    }
    return [
        [
            name,
            *(
                tables.mean_and_deviation(
                    [float(np.mean(values(run)[1:])) for run in column], digits
                )
                for column in columns
            ),
        ]
        for name, (values, digits) in found.items()
    ]


def share(run: Record) -> np.ndarray:
    """At each look, what part of the aligned pull the third derivatives have."""
    ratio: np.ndarray = np.divide(run["rates"]["third"], run["rates"]["aligned"])
    return ratio


def relative_rate(run: Record, part: str) -> np.ndarray:
    """A part of (dλ/dt)/λ at each look."""
    found = run["rates"]
    rate: np.ndarray = np.divide(found[part], found["eigenvalue"])
    return rate


def slopes(runs: Sequence[Record]) -> list[list[str]]:
    """A row a check: the slopes of log error over log ρ, by order."""
    found = {}
    for run in runs:
        if run.get("check") == "one_step":
            found["SAM, one step"] = run["sam"]
            found["Eigen-SAM, one step"] = run["eigen_sam"]
        if run.get("check") == "many_steps":
            found[f"SAM, {run['steps']} steps"] = run["sam"]
    return [
        [name, *(f"{slope:.2f}" for slope in x["slopes"])] for name, x in found.items()
    ]


def moments(runs: Sequence[Record]) -> list[list[str]]:
    """A row a moment: SAM's with its Monte Carlo error, and how far the others are."""
    found = check(runs, "moments")
    names = [f"E({x})" for x in found["observables"]]
    names += [f"E(({x})²)" for x in found["observables"]]
    rows = []
    for i, name in enumerate(names):
        sam = f"{found['sam']['mean'][i]:.4g} ± {found['sam']['error'][i]:.1g}"
        off = [f"{found[f'order_{k}']['off'][i]:+.1f}" for k in (1, 2, 3)]
        rows.append([name, sam, *off])
    return rows


def costs(runs: Sequence[Record]) -> list[list[str]]:
    """A row an order: a drift's operations and time in gradients, and milliseconds."""
    found = check(runs, "costs")
    return [
        [
            str(k),
            f"{cost['operations']:.2f}",
            f"{cost['time']:.2f}",
            f"{cost['time_ms']:.1f}",
        ]
        for k in (1, 2, 3)
        for cost in [found[f"order_{k}"]]
    ]


def check(runs: Sequence[Record], name: str) -> Record:
    """The record of a check."""
    (found,) = (run for run in runs if run.get("check") == name)
    return found


def paths(
    runs: Sequence[Record], method: str, rho: float | None = None
) -> list[Record]:
    """The paths of a method, at a ρ if one is named, by seed."""
    return [
        run
        for run in runs
        if "check" not in run
        and run["optimizer"] == method
        and rho in (None, run["rho"])
    ]


def rhos(runs: Sequence[Record]) -> list[float]:
    """All ρ of SAM's paths, ascending."""
    return sorted({run["rho"] for run in paths(runs, "sam")})


def relative(
    runs: Sequence[Record], method: str, rho: float, quantity: str
) -> np.ndarray:
    """(path − SAM's)/SAM's, a row a seed, a column a look after the start."""
    reference = "mean_sam" if method.startswith("mean_") else "sam"
    by_seed = {run["seed"]: run for run in paths(runs, reference, rho)}
    rows = []
    for run in paths(runs, method, rho):
        ours, sam = (
            np.asarray(x["curves"][quantity][1:]) for x in (run, by_seed[run["seed"]])
        )
        rows.append((ours - sam) / sam)
    return np.array(rows)
