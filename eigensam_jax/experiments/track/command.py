"""The options of `eigensam track`."""

import argparse
from typing import Any

from eigensam_jax.experiments import options
from eigensam_jax.experiments.training.trackers import TRACKERS

_TRACK_SMOKE: dict[str, Any] = {
    "seeds": 1,
    "steps": 20,
    "evaluations": 2,
    "alpha": [1.0],
    "trackers": [name for name, spec in TRACKERS.items() if not spec.is_ceiling],
}
_TRACK_USUAL: dict[str, Any] = {
    "seeds": 5,
    "steps": 1200,
    "evaluations": 10,
    "alpha": [0.2, 1.0],
    "trackers": list(TRACKERS),
}


def add_track(commands: Any) -> None:
    """Adds `eigensam track`."""
    track = commands.add_parser(
        "track",
        help="how well does each tracker follow the top eigenvector?",
        description="Train a network with Eigen-SAM by each tracker, and SAM at the "
        "radius of each run. Prints tables and leaves results.json and track.png in "
        "--out. Runs that are there already are kept: the same command goes on where "
        "it was interrupted, and a tracker, an α or a seed can be added.",
    )
    add = track.add_argument
    options.add_problem(track, options.SMALL_MODELS)
    add(
        "--trackers",
        metavar="NAME",
        nargs="+",
        choices=tuple(TRACKERS),
        help=f"some of {', '.join(TRACKERS)} [all]",
    )
    add(
        "--alpha",
        metavar="X",
        nargs="+",
        type=options.number(float, above=0),
        help="α, one or several [0.2 1]",
    )
    add("--seeds", **options.count(), help=f"how many [{_TRACK_USUAL['seeds']}]")
    add("--steps", **options.count(), help=f"a run [{_TRACK_USUAL['steps']}]")
    options.add_out(track, "1 seed, 20 steps: does it run at all?")
    track.set_defaults(run=_track)


def _track(chosen: argparse.Namespace, command: str) -> None:
    with options.extras():
        from rich.console import Console

        from eigensam_jax.experiments.track import run as track
    preset = _TRACK_SMOKE if chosen.smoke else _TRACK_USUAL
    config = track.Config(
        dataset=chosen.dataset,
        data_dir=chosen.data_dir,
        model=chosen.model,
        trackers=tuple(dict.fromkeys(chosen.trackers or preset["trackers"])),
        alphas=tuple(dict.fromkeys(chosen.alpha or preset["alpha"])),
        seeds=chosen.seeds or preset["seeds"],
        steps=chosen.steps or preset["steps"],
        evaluations=preset["evaluations"],
        out=chosen.out,
    )
    track.run(config, command, Console())
