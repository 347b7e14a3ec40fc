"""The plots of `eigensam sde`, out of its results file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from eigensam_jax.experiments.records import images
from eigensam_jax.experiments.records.tables import half_interval
from eigensam_jax.experiments.registry import look
from eigensam_jax.experiments.sde import tables as sde_tables
from eigensam_jax.experiments.sde.paths import middle

_SECOND, _THIRD = "#006d5b", "#7b4173"
_LOOKS: dict[str, dict[str, Any]] = {
    "sam": look("sam") | {"linestyle": "-"},
    "sam_again": look("sam") | {"linestyle": "-", "marker": "o"},
    "order_1": look("sgd") | {"linestyle": ":"},
    "order_2": {"color": _SECOND, "linestyle": "--", "marker": "^"},
    "order_3": {"color": _THIRD, "linestyle": "-.", "marker": "v"},
    "eigen_sam": look("eigen_sam"),
}
_PANELS = {
    "train_loss": "training loss",
    "parameter_norm": "‖w‖",
    "gradient_norm": "‖∇f(w)‖",
    "lambda_max": "λ_max",
}
_PARTS: dict[str, dict[str, Any]] = {
    "ito": {"color": "black", "marker": "D"},
    "first": {"color": look("sgd")["color"], "marker": "o"},
    "second": {"color": _SECOND, "marker": "^"},
    "third": {"color": _THIRD, "marker": "v"},
    "aligned": {"color": _THIRD, "marker": "s", "linestyle": ":"},
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
    """Draws what is looked at along the paths at a ρ: means over the seeds."""
    seeds = len(sde_tables.paths(runs, "sam", rho))
    note = f"Means over {seeds} seeds. Band: SAM's deviation. Order: of the equation."
    figure, grid = images.panels(2, 2, 6, title, note)
    for axes, (key, label) in zip(grid.flat, _PANELS.items(), strict=True):
        axes.set(xlabel="steps, t/η", title=label)
        for method in ("sam", "order_1", "order_2", "order_3"):
            at = 0.0 if method == "order_1" else rho
            chosen = sde_tables.paths(runs, method, at)
            values = np.array([run["curves"][key] for run in chosen])
            steps = chosen[0]["curves"]["step"]
            spread = values.std(0, ddof=1) if method == "sam" and len(values) > 1 else 0
            images.band(axes, steps, values.mean(0), spread, **_look(method))
        images.by_decades(axes, "y")
    images.legend(figure)
    images.save(figure, path)


def off(runs: Sequence[Run], title: str, path: Path) -> None:
    """Draws how far off SAM the equations are at each ρ, in % of SAM's.

    Those without noise are off the mean of SAM's gradient without noise.
    """
    rhos = sde_tables.rhos(runs)
    note = "Mean and 95% interval. SAM, other batches: what chance alone makes."
    figure, grid = images.panels(2, len(rhos), 5.5, title, note, sharex=True)
    for rho, column in zip(rhos, grid.T, strict=True):
        column[0].set_title(f"ρ = {rho:g}")
        column[-1].set_xlabel("steps, t/η")
        for axes, quantity in zip(column, sde_tables.QUANTITIES, strict=True):
            for method in ("sam_again", "order_2", "order_3"):
                _off(axes, runs, method, rho, quantity)
            axes.axhline(0, color="black", linewidth=0.6)
    for axes, label in zip(grid[:, 0], sde_tables.QUANTITIES.values(), strict=True):
        axes.set_ylabel(f"{label}, % off SAM's")
    images.legend(figure, 5)
    images.save(figure, path)


def rates(runs: Sequence[Run], title: str, path: Path) -> None:
    """Draws the parts of the rate of λ_max, and the third one against alignment."""
    note = (
        "Left, middle: medians and quartiles over the seeds. Right: all measurements,\n"
        "the third derivatives' part over what it would be with ε along v."
    )
    figure, grid = images.panels(1, 3, 4.6, title, note)
    left, middle, right = grid.flat
    for axes, method in ((left, "sam"), (middle, "eigen_sam")):
        chosen, label = sde_tables.measured(runs, method), sde_tables.LABELS[method]
        steps = chosen[0]["curves"]["step"][1:]
        for part, style in _PARTS.items():
            values = np.array([sde_tables.rate(run, part)[1:] for run in chosen])
            low, median, high = np.quantile(values, (0.25, 0.5, 0.75), axis=0)
            style = style | {"label": sde_tables.PARTS[part]}
            images.band(axes, steps, median, (median - low, high - median), **style)
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set(xlabel="step", title=f"parts of (dλ/dt)/λ, {label}")
        axes.set_yscale("symlog", linthresh=0.01)
        axes.yaxis.set_major_formatter("{x:g}")
        x, y = (
            np.ravel([sde_tables.rate(run, *which)[1:] for run in chosen])
            for which in (("perturbation_alignment", ""), ("third", "rate_aligned"))
        )
        right.plot(x, y, **_look(method) | {"linestyle": "", "markersize": 4})
    right.axhline(0, color="black", linewidth=0.6)
    right.set(xlabel="alignment |cos(ε, v)|", title="third derivatives' part, relative")
    images.legend(figure)
    images.save(figure, path)


def _look(method: str) -> dict[str, Any]:
    return _LOOKS[method] | {"label": sde_tables.LABELS[method]}


def _off(axes: Axes, runs: Sequence[Run], method: str, rho: float, key: str) -> None:
    steps = sde_tables.paths(runs, "sam", rho)[0]["curves"]["step"][1:]
    values = 100 * sde_tables.relative(runs, method, rho, key)
    style = _look(method) | {"linestyle": "-"}
    images.band(axes, steps, values.mean(0), half_interval(values), **style)
    if method != "sam_again":
        bare = 100 * sde_tables.relative(runs, f"mean_{method}", rho, key)
        label = sde_tables.LABELS[f"mean_{method}"]
        style |= {"linestyle": ":", "label": label, "markerfacecolor": "white"}
        axes.plot(steps, bare.mean(0), markersize=5, **style)
