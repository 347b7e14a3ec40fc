"""The tables of `eigensam sde`, from its results file."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from eigensam_jax.experiments.records import results, tables
from eigensam_jax.experiments.registry import DATASETS

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
QUANTITIES = {"train_loss": "training loss", "lambda_max": "λ_max"}
PARTS = {
    "first": "gradient",
    "second": "second derivatives",
    "third": "third derivatives",
    "ito": "Itô's term",
    "aligned": "third, if ε were along v",
}

Record = Mapping[str, Any]


def title(document: Record) -> str:
    """Data set, network and learning rate."""
    config = document["config"]
    name = config["dataset"]
    trained = f"{DATASETS[name].label or name}, tanh network"
    return f"{trained}, η {config['learning_rate']:g}"


def all_tables(runs: Sequence[Record], title: str) -> list[Table]:
    """The tables that the command prints."""
    of_paths = ("off: loss %", "λ_max %", "distance: loss %", "λ_max %")
    orders = ("order 1", "order 2", "order 3")
    found: tuple[tuple[str, tuple[str, ...], list[list[str]]], ...] = (
        (title, ("path", "ρ", *of_paths), distances(runs)),
        (
            "distance to SAM, order 3 less order 2",
            ("ρ", "loss %", "λ_max %", "no noise: loss %", "λ_max %"),
            differences(runs),
        ),
        ("parts of (dλ_max/dt)/λ_max", ("", "SAM", "Eigen-SAM"), rates(runs)),
        ("slopes of errors in ρ", ("check", *orders), slopes(runs)),
        (
            "moments over paths: off SAM's, in standard errors",
            ("moment", "SAM", *orders),
            moments(runs),
        ),
        ("a drift, in gradients", ("order", "operations", "time", "ms"), costs(runs)),
    )
    return [tables.table(*each) for each in found if each[-1]]


def distances(runs: Sequence[Record]) -> list[list[str]]:
    """A row per ρ and kind of path: its distance to SAM, in % of SAM's figures."""
    methods = ("sam_again", "order_2", "order_3", "mean_order_2", "mean_order_3")
    interval = tables.mean_and_interval
    rows = []
    for rho in rhos(runs):
        for method in methods:
            found = [relative(runs, method, rho, x) for x in QUANTITIES]
            off = [interval(x.mean(1), 1, 100) for x in found]
            far = [interval(abs(x).mean(1), 1, 100, sign=False) for x in found]
            rows.append([LABELS[method], f"{rho:g}", *off, *far])
    return rows


def differences(runs: Sequence[Record]) -> list[list[str]]:
    """A row per ρ: order 3's distance to SAM less order 2's, in % of SAM's figures.

    Paired by seed; negative where order 3 is nearer. First with noise, then without.
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
                row.append(tables.mean_and_interval(third - second, 1, 100))
        rows.append(row)
    return rows


def rates(runs: Sequence[Record]) -> list[list[str]]:
    """A row per figure: alignment, parts of (dλ/dt)/λ, share; means after the start."""
    columns = [measured(runs, method) for method in ("sam", "eigen_sam")]
    rows = [("alignment of ε with v", "perturbation_alignment", "", 2)]
    rows += [(label, part, "lambda_max", 3) for part, label in PARTS.items()]
    rows += [("third / if along v", "third", "rate_aligned", 2)]
    return [
        [
            name,
            *(
                tables.mean_and_deviation(
                    [float(rate(run, part, over)[1:].mean()) for run in column], digits
                )
                for column in columns
            ),
        ]
        for name, part, over, digits in rows
    ]


def measured(runs: Sequence[Record], method: str) -> list[Record]:
    """The paths of a method with measured rates of λ_max."""
    return [run for run in paths(runs, method) if "rate_first" in run["curves"]]


def rate(run: Record, part: str, over: str = "lambda_max") -> np.ndarray:
    """A part of dλ/dt at each look, divided by the curve `over` (or by 1)."""
    curves = run["curves"]
    found: np.ndarray = np.divide(curves[f"rate_{part}"], curves[over] if over else 1)
    return found


def slopes(runs: Sequence[Record]) -> list[list[str]]:
    """A row per check: the slopes of log error over log ρ, by order."""
    of_row: dict[tuple[str, int], list[Record]] = {}
    for run in runs:
        if "error" in run and "order" in run:
            of_row.setdefault((run["optimizer"], run["steps"]), []).append(run)
    rows = []
    for (optimizer, steps), found in of_row.items():
        row = [f"{LABELS[optimizer]}, {'one step' if steps == 1 else f'{steps} steps'}"]
        for order in (1, 2, 3):
            errors = results.select(found, order=order)
            x, y = np.log([(run["rho"], run["error"]) for run in errors]).T
            row.append(f"{np.polyfit(x, y, 1)[0]:.2f}")
        rows.append(row)
    return rows


def moments(runs: Sequence[Record]) -> list[list[str]]:
    """A row per moment: SAM's, then the others' differences in standard errors."""
    rows = []
    for sam in results.select(runs, check="moments", optimizer="sam"):
        moment = {key: sam[key] for key in ("observable", "power")}
        name = sam["observable"] if sam["power"] == 1 else f"({sam['observable']})²"
        row = [f"E({name})", f"{sam['mean']:.4g} ± {sam['error']:.1g}"]
        for run in results.select(runs, check="moments", **moment):
            if run is not sam:
                error = np.hypot(run["error"], sam["error"])
                row.append(f"{(run['mean'] - sam['mean']) / error:+.1f}")
        rows.append(row)
    return rows


def costs(runs: Sequence[Record]) -> list[list[str]]:
    """A row per order: a drift's operations and time in gradients, and milliseconds."""
    return [
        [
            run["optimizer"].removeprefix("order_"),
            f"{run['operations']:.2f}",
            f"{run['time']:.2f}",
            f"{run['time_ms']:.1f}",
        ]
        for run in results.select(runs, check="costs")
        if run["optimizer"] != "gradient"
    ]


def paths(
    runs: Sequence[Record], method: str, rho: float | None = None
) -> list[Record]:
    """The paths of a method by seed, at `rho` or at every ρ."""
    found = results.select(runs, optimizer=method)
    return [x for x in found if "check" not in x and rho in (None, x["rho"])]


def rhos(runs: Sequence[Record]) -> list[float]:
    """All ρ of SAM's paths, ascending."""
    return sorted({run["rho"] for run in paths(runs, "sam")})


def relative(
    runs: Sequence[Record], method: str, rho: float, quantity: str
) -> np.ndarray:
    """(path − SAM's)/SAM's, one row per seed, one column per look after the start."""
    reference = "mean_sam" if method.startswith("mean_") else "sam"
    ours, sams = (
        {run["seed"]: np.array(run["curves"][quantity][1:]) for run in found}
        for found in (paths(runs, method, rho), paths(runs, reference, rho))
    )
    return np.array([(ours[seed] - sams[seed]) / sams[seed] for seed in ours])
