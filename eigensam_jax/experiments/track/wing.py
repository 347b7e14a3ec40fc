"""`eigensam track`: its options, tables and plots."""

import argparse
from pathlib import Path
from typing import Any

from eigensam_jax.experiments import options, registry
from eigensam_jax.experiments.records import results as records
from eigensam_jax.experiments.registry import MODELS, TRACKERS, learning_rate

Document = dict[str, Any]

_USUAL: dict[str, Any] = {
    "seeds": 5,
    "steps": 1200,
    "evaluations": 10,
    "alpha": [0.2, 1.0],
    "trackers": list(TRACKERS),
}
_SMOKE: dict[str, Any] = {
    "seeds": 1,
    "steps": 20,
    "evaluations": 2,
    "alpha": [1.0],
    "trackers": ["power_iteration", "secant"],
}


def add_command(subparsers: Any) -> None:
    """Adds `eigensam track`."""
    track = subparsers.add_parser(
        "track",
        help="measure how well each tracker follows the top eigenvector",
        description="Train a network with Eigen-SAM by each tracker, and SAM at the "
        "radius of each run; the last two trackers are bounds and have no such SAM. "
        "Prints tables and leaves results.json and track.png in --out. Run it again "
        "to resume, or to add a tracker, an α or a seed.",
    )
    small = {name: x.track_rate for name, x in MODELS.items() if x.track_rate}
    options.add_problem(track, tuple(small))
    options.add_choices(track, "trackers", tuple(TRACKERS))
    track.add_argument(
        "--alpha",
        metavar="X",
        nargs="+",
        type=options.number(float, above=0),
        help="α, one or several [0.2 1]",
    )
    seeds, steps = _USUAL["seeds"], _USUAL["steps"]
    counts = {
        "seeds": f"number of seeds [{seeds}]",
        "steps": f"steps of a run [{steps}]",
    }
    options.add_counts(track, counts)
    rates = ", ".join(f"{rate:g} for {name}" for name, rate in small.items())
    options.add_learning_rate(track, f"by sgd {rates}")
    options.add_base(track)
    options.add_out(track, "quick check: 1 seed, 20 steps, two trackers")


def run(chosen: argparse.Namespace, command: str) -> None:
    """Trains by each tracker; leaves `results.json` and `track.png` in `--out`."""
    from eigensam_jax.experiments.track import run as track

    chosen = options.filled(chosen, _USUAL, _SMOKE)
    rate = chosen.learning_rate
    if chosen.base_optimizer == "sgd":
        rate = rate or MODELS[chosen.model].track_rate
    chosen.learning_rate = learning_rate("eigen_sam", chosen.base_optimizer, rate)
    for name in ("alpha", "trackers"):  # each once, as they are recorded
        once = dict.fromkeys(records.rounded(getattr(chosen, name)))
        setattr(chosen, name, tuple(once))
    track.run(chosen, command)


def tables(results: list[Document]) -> dict[str, Any]:
    """Functions from a page's argument to rows, by the table's name."""
    from eigensam_jax.experiments.track import tables as made

    runs = results[0]["runs"]
    return {
        "track": lambda alpha: made.summary(runs, float(alpha)),
        "track_differences": lambda _: made.differences(runs),
        "track_across": lambda _: made.across([x["runs"] for x in results]),
    }


def plots(results: Document, folder: Path) -> None:
    """Draws the plot of a results file."""
    from eigensam_jax.experiments.track import plots as drawn

    config = results["config"]
    title = registry.title(config)
    drawn.track(results["runs"], title, folder / "track.png")
