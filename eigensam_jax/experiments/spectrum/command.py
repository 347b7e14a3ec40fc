"""The options of `eigensam spectrum` and `eigensam sde`."""

import argparse
from typing import Any

from eigensam_jax.experiments import options

_SPECTRUM_SMOKE = {"epochs": 2, "k": 3, "num_matvecs": 8, "num_samples": 2}
_SPECTRUM_USUAL = {"epochs": 100, "k": 10, "num_matvecs": 64, "num_samples": 8}
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
_EXAMPLES = 2_000


def add_spectrum(commands: Any) -> None:
    """Adds `eigensam spectrum`."""
    spectrum = commands.add_parser(
        "spectrum",
        help="the eigenvalues of the Hessian of a trained network",
        description="Train a network, and find the largest eigenvalues of the Hessian "
        "of its training loss, with residuals, and how all of them are spread. Prints "
        "a table and leaves results.json and spectrum.png in --out, in place of those "
        "of an earlier run; a training that was interrupted goes on by the same "
        "command.",
    )
    add, usual = spectrum.add_argument, _SPECTRUM_USUAL
    trained = tuple(name for name in options.OPTIMIZERS if name != "sam_matched")
    options.add_problem(spectrum)
    add(
        "--optimizer",
        metavar="NAME",
        choices=trained,
        default="eigen_sam",
        help=options.any_of(trained),
    )
    add(
        "--seed", metavar="N", type=options.number(int), default=0, help="[%(default)s]"
    )
    options.add_training(spectrum, usual["epochs"])
    add("--k", **options.count(), help=f"how many top eigenvalues [{usual['k']}]")
    add(
        "--num-matvecs",
        **options.count(),
        help=f"products per random vector, for the density [{usual['num_matvecs']}]",
    )
    add(
        "--num-samples",
        **options.count(),
        help=f"random vectors, for the density [{usual['num_samples']}]",
    )
    add(
        "--examples",
        **options.count(),
        help="training images that the Hessian is taken on, the first ones "
        f"[{_EXAMPLES}, or all if less]",
    )
    options.add_out(spectrum, "2 epochs, few products: does it run at all?")
    spectrum.set_defaults(run=_spectrum)


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


def _spectrum(chosen: argparse.Namespace, command: str) -> None:
    with options.extras():
        from rich.console import Console

        from eigensam_jax.experiments.spectrum import run as spectrum
    preset = _SPECTRUM_SMOKE if chosen.smoke else _SPECTRUM_USUAL
    config = spectrum.Config(
        dataset=chosen.dataset,
        data_dir=chosen.data_dir,
        model=chosen.model,
        optimizer=chosen.optimizer,
        seed=chosen.seed,
        epochs=chosen.epochs or preset["epochs"],
        batch_size=chosen.batch_size,
        learning_rate=chosen.learning_rate,
        rho=chosen.rho,
        alpha=chosen.alpha,
        augment=options.is_augmented(chosen),
        k=chosen.k or preset["k"],
        num_matvecs=chosen.num_matvecs or preset["num_matvecs"],
        num_samples=chosen.num_samples or preset["num_samples"],
        examples=chosen.examples,
        out=chosen.out,
    )
    spectrum.run(config, command, Console())
