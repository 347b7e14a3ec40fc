"""`eigensam sde`: its options, tables and plots."""

import argparse
from pathlib import Path
from typing import Any

from eigensam_jax.experiments import options

Document = dict[str, Any]

_SMOKE: dict[str, Any] = {
    "rho": [0.05],
    "seeds": 1,
    "steps": 4,
    "evaluations": 2,
    "moment_paths": 2,
    "checks": ("one_step",),
}
_USUAL: dict[str, Any] = {
    "rho": [0.025, 0.05, 0.1, 0.2],
    "seeds": 8,
    "steps": 400,
    "evaluations": 8,
    "moment_paths": 1_000,
    "checks": ("one_step", "many_steps", "moments", "costs"),
}


def add_command(subparsers: Any) -> None:
    """Adds `eigensam sde`."""
    sde = subparsers.add_parser(
        "sde",
        help="compare SAM with its stochastic differential equations",
        description="Train a small tanh network by SAM, simulate SAM's equations of "
        "first, second and third order from the same starts, and measure what "
        "changes λ_max. Uses the first 1,024 training images in 16 fixed batches. "
        "Prints tables and leaves results.json, paths.png, off.png and rates.png in "
        "--out. Run it again to resume.",
    )
    options.add_data(sde)
    sde.add_argument(
        "--rho",
        metavar="X",
        nargs="+",
        type=options.number(float, above=0),
        help="ρ, one or several; the plots show the middle one [0.025 0.05 0.1 0.2]",
    )
    options.add_number(sde, "alpha", 1.0, "α of Eigen-SAM", above=0)
    options.add_number(sde, "learning-rate", 0.1, "η of SGD without momentum", above=0)
    seeds, steps = _USUAL["seeds"], _USUAL["steps"]
    counts = {"seeds": f"paths of each kind [{seeds}]", "steps": f"of a path [{steps}]"}
    options.add_counts(sde, counts)
    options.add_out(sde, "quick check: 1 seed, 4 steps")


def run(chosen: argparse.Namespace, command: str) -> None:
    """Runs paths and checks; leaves `results.json` and three plots in `--out`."""
    from eigensam_jax.experiments.records import results
    from eigensam_jax.experiments.sde import run as sde

    chosen = options.filled(chosen, _USUAL, _SMOKE)
    chosen.rhos = tuple(sorted({*results.rounded(chosen.rho)}))
    sde.run(chosen, command)


def tables(results: list[Document]) -> dict[str, Any]:
    """Functions from a page's argument to rows, by the table's name."""
    from eigensam_jax.experiments.sde import tables as made

    rows = {
        "distances": made.distances,
        "sde_differences": made.differences,
        "slopes": made.slopes,
        "moments": made.moments,
        "rates": made.rates,
        "costs": made.costs,
    }
    runs = results[0]["runs"]
    return {name: lambda _, of=of: of(runs) for name, of in rows.items()}


def plots(results: Document, folder: Path) -> None:
    """Draws the plots of a results file."""
    from eigensam_jax.experiments.sde import plots as drawn

    drawn.draw(results, folder)
