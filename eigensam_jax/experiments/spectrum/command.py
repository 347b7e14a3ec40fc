"""The options of `eigensam spectrum`."""

import argparse
from typing import Any

from eigensam_jax.experiments import options

_SPECTRUM_SMOKE = {"epochs": 2, "k": 3, "num_matvecs": 8, "num_samples": 2}
_SPECTRUM_USUAL = {"epochs": 100, "k": 10, "num_matvecs": 64, "num_samples": 8}
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


def _spectrum(chosen: argparse.Namespace, command: str) -> None:
    with options.extras():
        from rich.console import Console

        from eigensam_jax.experiments.spectrum import network
        from eigensam_jax.experiments.spectrum import run as spectrum
    preset = _SPECTRUM_SMOKE if chosen.smoke else _SPECTRUM_USUAL
    config = network.Config(
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
