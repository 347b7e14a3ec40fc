"""The plots of `eigensam sde`, out of its results file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from eigensam_jax.experiments.records import images
from eigensam_jax.experiments.records.tables import half_interval
from eigensam_jax.experiments.registry import METHODS
from eigensam_jax.experiments.sde import tables as sde_tables
from eigensam_jax.experiments.sde.paths import middle

_STYLES = {
    "sam": (METHODS["sam"].colour, "-"),
    "order_1": (METHODS["sgd"].colour, ":"),
    "order_2": ("#2ca02c", "--"),
    "order_3": ("#ff7f0e", "--"),
}
_PANELS = {
    "train_loss": ("training loss", "log"),
    "test_loss": ("test loss", "log"),
    "test_accuracy": ("test accuracy", "linear"),
    "parameter_norm": ("‖w‖", "linear"),
    "gradient_norm": ("‖∇f(w)‖", "log"),
    "lambda_max": ("λ_max", "log"),
}
_PARTS = {
    "first": (METHODS["sgd"].colour, "-"),
    "second": ("#2ca02c", "-"),
    "third": ("#ff7f0e", "-"),
    "aligned": ("#ff7f0e", ":"),
    "ito": ("#9467bd", "-"),
}

Run = Mapping[str, Any]


def draw(document: Mapping[str, Any], out: Path) -> None:
    """Draws the plots of a complete results file."""
    runs, rho = document["runs"], middle(tuple(document["config"]["rhos"]))
    title = sde_tables.title(document)
    paths(runs, rho, f"{title}, ρ {rho:g}", out / "paths.png")
    off(runs, title, out / "off.png")
    rates(runs, f"{title}, ρ {rho:g}", out / "rates.png")


def paths(runs: Sequence[Run], rho: float, title: str, path: Path) -> None:
    """Draws what is looked at along the paths at a ρ: mean ± standard deviation."""
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    figure.suptitle(title)
    for axes, (key, (label, scale)) in zip(
        figure.subplots(2, 3).flat, _PANELS.items(), strict=True
    ):
        axes.set(xlabel="time t/η, in steps", title=label, yscale=scale)
        first = int(key == "test_accuracy")  # the untrained one would squeeze the rest
        for method, (colour, style) in _STYLES.items():
            at = 0.0 if method == "order_1" else rho
            chosen = sde_tables.paths(runs, method, at)
            values = np.array([run["curves"][key][first:] for run in chosen])
            steps = chosen[0]["curves"]["step"][first:]
            named = {"color": colour, "label": sde_tables.LABELS[method]}
            images.band(axes, steps, values, style, **named)
        axes.grid(alpha=0.3, which="both" if scale == "log" else "major")
    figure.axes[0].legend()
    images.save(figure, path)


def off(runs: Sequence[Run], title: str, path: Path) -> None:
    """Draws how far off SAM the equations are at each ρ, in % of SAM's.

    Bands are 95% intervals of the mean over the seeds; dotted lines are the means of
    the drifts without noise, against the mean of SAM's gradient without noise.
    """
    rhos = sde_tables.rhos(runs)
    figure = Figure(figsize=(2 + 2.6 * len(rhos), 5.5), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(2, len(rhos), squeeze=False, sharex=True)
    for rho, column in zip(rhos, grid.T, strict=True):
        for axes, (quantity, label) in zip(
            column, sde_tables.QUANTITIES.items(), strict=True
        ):
            for method in ("sam_again", "order_2", "order_3"):
                _off(axes, runs, method, rho, quantity)
            axes.axhline(0, color="black", linewidth=0.6)
            axes.grid(alpha=0.3)
            axes.set_ylabel(f"{label} − SAM's, % of SAM's")
            axes.label_outer()
            axes.tick_params(labelleft=True)
        column[0].set_title(f"ρ = {rho:g}")
        column[-1].set_xlabel("time t/η, in steps")
    grid[0, 0].legend(fontsize="small")
    images.save(figure, path)


def rates(runs: Sequence[Run], title: str, path: Path) -> None:
    """Draws the parts of the rate of λ_max along SAM's and Eigen-SAM's training.

    Lines are medians over the seeds, bands from quartile to quartile. And, of each
    look, how much of the aligned pull the third derivatives have, against the alignment
    of the perturbation.
    """
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    figure.suptitle(title)
    left, middle, right = figure.subplots(1, 3)
    for axes, method in ((left, "sam"), (middle, "eigen_sam")):
        chosen = sde_tables.measured(runs, method)
        steps = chosen[0]["curves"]["step"][1:]
        for part, (colour, style) in _PARTS.items():
            values = np.array([sde_tables.rate(run, part)[1:] for run in chosen])
            low, median, high = np.quantile(values, (0.25, 0.5, 0.75), axis=0)
            label = sde_tables.PARTS[part]
            axes.plot(steps, median, style, color=colour, label=label)
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set(
            xlabel="step",
            ylabel="parts of (dλ/dt)/λ",
            title=f"λ_max along {sde_tables.LABELS[method]}",
        )
        axes.set_yscale("symlog", linthresh=0.01)
        axes.grid(alpha=0.3)
        right.plot(
            *(
                np.ravel([sde_tables.rate(run, *x)[1:] for run in chosen])
                for x in (("perturbation_alignment", ""), ("third", "rate_aligned"))
            ),
            ".",
            color=METHODS[method].colour,
            label=sde_tables.LABELS[method],
        )
    middle.legend(fontsize="small", loc="center right")
    right.axhline(0, color="black", linewidth=0.6)
    right.set(
        xlabel="alignment |cos(ε, v)|",
        ylabel="third derivatives' part / aligned",
        title="share of the aligned pull on λ_max",
    )
    right.grid(alpha=0.3)
    right.legend()
    images.save(figure, path)


def _off(axes: Any, runs: Sequence[Run], method: str, rho: float, key: str) -> None:
    colour = _STYLES.get(method, (METHODS["sgd"].colour,))[0]
    steps = sde_tables.paths(runs, "sam", rho)[0]["curves"]["step"][1:]
    values = 100 * sde_tables.relative(runs, method, rho, key)
    mean, half = values.mean(0), half_interval(values)
    axes.plot(steps, mean, "-", color=colour, label=sde_tables.LABELS[method])
    axes.fill_between(
        steps, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0
    )
    if method != "sam_again":
        bare = 100 * sde_tables.relative(runs, f"mean_{method}", rho, key)
        axes.plot(steps, bare.mean(0), ":", color=colour)
