"""Plots of what `eigensam bench` found."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import EngFormatter

from eigensam_jax.experiments.bench import tables
from eigensam_jax.experiments.records import images, results
from eigensam_jax.experiments.registry import MODELS, look

Record = Mapping[str, Any]

_LABELS = {
    "wide_mlp": "wide MLP",
    "optax_sam": "SAM of optax",
    "torch_sgd": "SGD, PyTorch",
    "torch_sam": "SAM, PyTorch",
    "torch_eigen_sam": "Eigen-SAM, PyTorch",
}
_GROWTH = (  # what is scaled, key, factor, label
    ("parameters", "operations", 1e-9, "10⁹ operations a step"),
    ("parameters", "temp_bytes", 2**-20, "temporary memory, MiB"),
    ("parameters", "passes_over_sam", 1, "passes over parameters − SAM's"),
    ("devices", "operations", 1e-9, "10⁹ operations, each device"),
    ("devices", "collectives", 1, "exchanges a step"),
    ("devices", "collective_bytes", 1e-6, "MB exchanged a step"),
)


def bench(runs: Sequence[Record], path: Path) -> None:
    """Draws a column a network: time and operations, and below them memory."""
    networks = tables.networks(runs)
    names = [row[0] for row in tables.across(runs)]
    note = "Filled: time over SGD's, quartiles.\nHollow: operations over a gradient's."
    size = 2, len(networks), 2 + 0.45 * len(names)
    figure, grid = images.panels(*size, note, sharey="row")
    for (above, below), (name, found) in zip(grid.T, networks.items(), strict=True):
        units, optimizers = tables.named(found)
        for place, optimizer in enumerate(names):
            run: Record = optimizers.get(optimizer, {})
            if run:
                low, middle, high = run["time_to_sgd"]
                quartiles = [[middle - low], [high - middle]]
                above.errorbar(middle, place, xerr=quartiles, fmt="ok", markersize=5)
            if "operations" in run:
                operations = run["operations"] / units["gradient"]["operations"]
                above.plot(operations, place, "Dk", fillstyle="none", markersize=8)
                below.barh(place, run["temp_bytes"] / 2**20, 0.6, color="0.5")
        title = _LABELS.get(name) or MODELS[name].label
        above.margins(x=0.15)
        above.set(title=f"{title}\nbatch {found[0]['batch_size']}", xlim=(0, None))
        above.set_xlabel("relative cost")
        below.set_xlabel("temporary memory, MiB")
    known = [x for x in names if "torch" not in x]  # of others the memory is not known
    for axes, rows in zip(grid[:, 0], (names, known), strict=True):
        labels = [_LABELS.get(x) or look(x)["label"] for x in rows]
        places = [names.index(x) for x in rows]
        axes.set_yticks(places, labels)
        axes.set_ylim(places[-1] + 0.5, -0.5)
    images.save(figure, path)


def growth(runs: Sequence[Record], path: Path) -> None:
    """Draws cost against parameters above, against devices below."""
    note = "Cost of a step. Marks that coincide lie in each other."
    figure, grid = images.panels(2, 3, 6, note)
    names = list(dict.fromkeys(run["optimizer"] for run in runs))
    for axes, (scaled, key, factor, label) in zip(grid.flat, _GROWTH, strict=True):
        for i, name in enumerate(names):
            if (key, name) == ("passes_over_sam", "sgd"):
                continue  # a gradient less, which is many passes
            chosen = results.select(runs, scaled=scaled, optimizer=name)
            x, y = zip(
                *((run[scaled], factor * run[key]) for run in chosen), strict=True
            )
            style = {"markersize": 12 - 2.5 * i, "fillstyle": "none", "linewidth": 1}
            axes.plot(x, y, **style, **look(name))
        axes.set(xlabel=scaled, title=label)
        images.by_decades(axes, "y")
        images.by_decades(axes, "x")
        if scaled == "devices":
            axes.set_xscale("log")
            ticks = sorted({run["devices"] for run in runs})
            axes.set_xticks(ticks, map(str, ticks))
            axes.minorticks_off()
        else:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    images.legend(figure)
    images.save(figure, path)
