"""The tables of `eigensam sde`, out of its results file."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from eigensam_jax.experiments import tables

NOTES = (
    "Off: (path − SAM's)/SAM's from the same start, mean over the looks after the "
    "start, mean over seeds with 95% intervals; distance: the same of |path − SAM's|. "
    "sam_again is SAM on other batches. Rates: parts of (dλ/dt)/λ, mean over the looks "
    "after the start, ± standard deviation over seeds; share: 3rd over aligned."
)
LABELS = {
    "sam": "SAM",
    "sam_again": "SAM, other batches",
    "order_1": "order 1 (SGD)",
    "order_2": "order 2",
    "order_3": "order 3",
    "eigen_sam": "Eigen-SAM",
}
QUANTITIES = {"train_loss": "train loss", "lambda_max": "λ_max"}
PARTS = {
    "first": "gradient",
    "second": "2nd deriv.",
    "third": "3rd deriv.",
    "ito": "Itô",
    "aligned": "3rd if aligned",
}

Record = Mapping[str, Any]


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
    found = {run["method"] for run in runs}
    return [
        tables.table(title, ("path", "ρ", *of_paths), distances(runs)),
        tables.table(
            "order 3 − order 2: distance to SAM",
            ("ρ", "loss %", "λ_max %"),
            differences(runs),
        ),
        tables.table(
            "parts of (dλ_max/dt)/λ_max, and |cos(ε, v)|",
            ("method", "|cos|", *PARTS.values(), "share"),
            rates(runs),
        ),
        *(
            tables.table(title, headers, rows(runs))
            for name, (title, headers, rows) in of_checks.items()
            if name in found
        ),
    ]


def distances(runs: Sequence[Record]) -> list[list[str]]:
    """A row a ρ and kind of path: how far off SAM it is, in % of SAM's."""
    rows = []
    for rho in rhos(runs):
        for method in ("sam_again", "order_2", "order_3"):
            off, distance = [], []
            for quantity in QUANTITIES:
                relative = _relative(runs, method, rho, quantity)
                off.append(tables.mean_and_interval(relative.mean(1).tolist(), 1, 100))
                mean = abs(relative).mean(1).tolist()
                distance.append(tables.mean_and_interval(mean, 1, 100).lstrip("+"))
            rows.append([LABELS[method], f"{rho:g}", *off, *distance])
    return rows


def differences(runs: Sequence[Record]) -> list[list[str]]:
    """A row a ρ: the distance to SAM of order 3 less that of order 2, paired by seed.

    In % of SAM's, with 95% intervals: negative where order 3 is nearer.
    """
    rows = []
    for rho in rhos(runs):
        row = [f"{rho:g}"]
        for quantity in QUANTITIES:
            third, second = (
                abs(_relative(runs, method, rho, quantity)).mean(1)
                for method in ("order_3", "order_2")
            )
            row.append(tables.mean_and_interval((third - second).tolist(), 1, 100))
        rows.append(row)
    return rows


def rates(runs: Sequence[Record]) -> list[list[str]]:
    """A row a method: |cos(ε, v)|, the parts of (dλ/dt)/λ, and the share.

    Means over training after its start.
    """
    rows = []
    for method in ("sam", "eigen_sam"):
        chosen = [run for run in paths(runs, method) if run["rates"]]
        cosine = [np.mean(run["rates"]["perturbation_alignment"][1:]) for run in chosen]
        row = [LABELS[method], tables.mean_and_deviation(cosine, 2)]
        for part in PARTS:
            means = [np.mean(relative_rate(run, part)[1:]) for run in chosen]
            row.append(tables.mean_and_deviation(means, 3))
        shares = [np.mean(share(run)[1:]) for run in chosen]
        rows.append([*row, tables.mean_and_deviation(shares, 2)])
    return rows


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
        if run["method"] == "one_step":
            found["SAM, one step"] = run["sam"]
            found["Eigen-SAM, one step"] = run["eigen_sam"]
        if run["method"] == "many_steps":
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
    (found,) = (run for run in runs if run["method"] == name)
    return found


def paths(
    runs: Sequence[Record], method: str, rho: float | None = None
) -> list[Record]:
    """The paths of a method, at a ρ if one is named, by seed."""
    return [
        run for run in runs if run["method"] == method and rho in (None, run["rho"])
    ]


def rhos(runs: Sequence[Record]) -> list[float]:
    """All ρ of SAM's paths, ascending."""
    return sorted({run["rho"] for run in paths(runs, "sam")})


def _relative(
    runs: Sequence[Record], method: str, rho: float, quantity: str
) -> np.ndarray:
    """(path − SAM's)/SAM's, a row a seed, a column a look after the start."""
    by_seed = {run["seed"]: run for run in paths(runs, "sam", rho)}
    rows = []
    for run in paths(runs, method, rho):
        ours, sam = (
            np.asarray(x["curves"][quantity][1:]) for x in (run, by_seed[run["seed"]])
        )
        rows.append((ours - sam) / sam)
    return np.array(rows)
