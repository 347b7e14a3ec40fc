"""The options of `eigensam compare` and `eigensam spectrum`."""

import argparse
from typing import Any

from eigensam_jax.experiments import options

_SMOKE = {"seeds": 1, "epochs": 2, "evaluations": 2}
_USUAL = {"seeds": 3, "epochs": 100, "evaluations": 20}
_SPECTRUM_SMOKE = {"epochs": 2, "k": 3, "num_matvecs": 8, "num_samples": 2}
_SPECTRUM_USUAL = {"epochs": 100, "k": 10, "num_matvecs": 64, "num_samples": 8}
_EXAMPLES = 2_000


def add_compare(commands: Any) -> None:
    """Adds `eigensam compare`."""
    compare = commands.add_parser(
        "compare",
        help="train a network with SGD, SAM and Eigen-SAM, and show the difference",
        description="Train the same network from the same seeds with each optimizer. "
        "Prints a table and leaves results.json and compare.png in --out, in place of "
        "those of an earlier run; until it is done also checkpoint.msgpack, for "
        "--resume.",
    )
    add = compare.add_argument
    options.add_problem(compare)
    add(
        "--optimizers",
        metavar="NAME",
        nargs="+",
        choices=options.OPTIMIZERS,
        default=options.OPTIMIZERS,
        help=f"some of {', '.join(options.OPTIMIZERS)}, where sam_matched is SAM at "
        "the radius that eigen_sam had [all]",
    )
    add("--seeds", **options.count(), help=f"how many [{_USUAL['seeds']}]")
    options.add_training(compare, _USUAL["epochs"])
    options.add_out(compare, "1 seed, 2 epochs: does it run at all?")
    add(
        "--resume",
        action="store_true",
        help="go on with what is unfinished in --out, if anything is: however it "
        "ended, the results are those of a run without a break",
    )
    compare.set_defaults(run=_compare)


def add_spectrum(commands: Any) -> None:
    """Adds `eigensam spectrum`."""
    spectrum = commands.add_parser(
        "spectrum",
        help="the eigenvalues of the Hessian of a trained network",
        description="Train a network, and find the largest eigenvalues of the Hessian "
        "of its training loss, with residuals, and how all of them are spread. Prints "
        "a table and leaves results.json and spectrum.png in --out, in place of those "
        "of an earlier run.",
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


def _compare(chosen: argparse.Namespace, command: str) -> None:
    with options.extras():
        from rich.console import Console

        from eigensam_jax.experiments import compare
    preset = _SMOKE if chosen.smoke else _USUAL
    config = compare.Config(
        dataset=chosen.dataset,
        data_dir=chosen.data_dir,
        model=chosen.model,
        optimizers=tuple(dict.fromkeys(chosen.optimizers)),
        seeds=chosen.seeds or preset["seeds"],
        epochs=chosen.epochs or preset["epochs"],
        batch_size=chosen.batch_size,
        learning_rate=chosen.learning_rate,
        rho=chosen.rho,
        alpha=chosen.alpha,
        evaluations=preset["evaluations"],
        out=chosen.out,
    )
    compare.run(config, command, Console(), resume=chosen.resume)


def _spectrum(chosen: argparse.Namespace, command: str) -> None:
    with options.extras():
        from rich.console import Console

        from eigensam_jax.experiments import spectrum
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
        k=chosen.k or preset["k"],
        num_matvecs=chosen.num_matvecs or preset["num_matvecs"],
        num_samples=chosen.num_samples or preset["num_samples"],
        examples=chosen.examples,
        out=chosen.out,
    )
    spectrum.run(config, command, Console())
