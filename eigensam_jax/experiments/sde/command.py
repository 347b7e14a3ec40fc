"""The options of `eigensam sde`."""

import argparse
from typing import Any

from eigensam_jax.experiments import options

_SDE_SMOKE: dict[str, Any] = {
    "rho": [0.05],
    "seeds": 1,
    "steps": 4,
    "evaluations": 2,
    "moment_paths": 2,
    "checks": ("one_step",),
}
_SDE_USUAL: dict[str, Any] = {
    "rho": [0.025, 0.05, 0.1, 0.2],
    "seeds": 8,
    "steps": 400,
    "evaluations": 8,
    "moment_paths": 1_000,
    "checks": ("one_step", "many_steps", "moments", "costs"),
}


def add_sde(commands: Any) -> None:
    """Adds `eigensam sde`."""
    sde = commands.add_parser(
        "sde",
        help="SAM against its stochastic differential equations",
        description="Train a small tanh network by SAM, and follow the equations of "
        "SAM up to first, second and third derivatives from the same starts; measure "
        "what changes λ_max on the way. All on the first 1,024 training images, in 16 "
        "fixed batches. Prints tables and leaves results.json, paths.png, off.png and "
        "rates.png in --out. Paths that are there already are kept: the same command "
        "goes on where it was interrupted.",
    )
    add, usual = sde.add_argument, _SDE_USUAL
    options.add_data(sde)
    add(
        "--rho",
        metavar="X",
        nargs="+",
        type=options.number(float, above=0),
        help="ρ, one or several; the plots are of the middle one [0.025 0.05 0.1 0.2]",
    )
    add(
        "--alpha",
        metavar="X",
        type=options.number(float, above=0),
        default=1.0,
        help="α of Eigen-SAM [%(default)s]",
    )
    add(
        "--learning-rate",
        metavar="X",
        type=options.number(float, above=0),
        default=0.1,
        help="η, of SGD without momentum [%(default)s]",
    )
    add("--seeds", **options.count(), help=f"paths of each kind [{usual['seeds']}]")
    add("--steps", **options.count(), help=f"a path [{usual['steps']}]")
    options.add_out(sde, "1 seed, 4 steps: does it run at all?")
    sde.set_defaults(run=_sde)


def _sde(chosen: argparse.Namespace, command: str) -> None:
    with options.extras():
        from rich.console import Console

        from eigensam_jax.experiments.sde import run as sde
    preset = _SDE_SMOKE if chosen.smoke else _SDE_USUAL
    config = sde.Config(
        dataset=chosen.dataset,
        data_dir=chosen.data_dir,
        rhos=tuple(sorted({*(chosen.rho or preset["rho"])})),
        alpha=chosen.alpha,
        learning_rate=chosen.learning_rate,
        seeds=chosen.seeds or preset["seeds"],
        steps=chosen.steps or preset["steps"],
        evaluations=preset["evaluations"],
        moment_paths=preset["moment_paths"],
        checks=preset["checks"],
        out=chosen.out,
    )
    sde.run(config, command, Console())
