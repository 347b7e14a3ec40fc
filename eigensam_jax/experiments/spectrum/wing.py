"""`eigensam spectrum`: its options, tables and plots."""

import argparse
from pathlib import Path
from typing import Any

from eigensam_jax.experiments import options, registry
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.registry import METHODS, learning_rate

Document = dict[str, Any]

EXAMPLES = 2_000  # training images, where not said
_USUAL = {"epochs": 100, "k": 10, "num_matvecs": 64, "num_samples": 8}
_SMOKE = {"epochs": 2, "k": 3, "num_matvecs": 8, "num_samples": 2}


def add_command(subparsers: Any) -> None:
    """Adds `eigensam spectrum`."""
    spectrum = subparsers.add_parser(
        "spectrum",
        help="eigenvalues of the Hessian of a trained network",
        description="Train a network, then compute the largest eigenvalues of the "
        "Hessian of its training loss, with residuals, and the spectral density. "
        "Prints a table and leaves results.json and spectrum.png in --out, replacing "
        "earlier ones. Run it again to resume an interrupted training.",
    )
    usual = _USUAL
    trained = tuple(name for name in METHODS if not METHODS[name].radius_of)
    options.add_problem(spectrum)
    options.add_choice(spectrum, "optimizer", trained, "eigen_sam")
    spectrum.add_argument(
        "--seed", metavar="N", type=options.number(int), default=0, help="[%(default)s]"
    )
    counts = {
        "epochs": f"number of epochs [{usual['epochs']}]",
        "batch-size": "[%(default)s]",
    }
    options.add_counts(spectrum, counts, {"batch-size": 128})
    options.add_method(spectrum)
    options.add_base(spectrum, "that of --optimizer, or sgd")
    options.add_no_augment(spectrum)
    products, vectors = usual["num_matvecs"], usual["num_samples"]
    counts = {
        "k": f"number of top eigenvalues [{usual['k']}]",
        "num-matvecs": f"products per random vector, for the density [{products}]",
        "num-samples": f"random vectors, for the density [{vectors}]",
        "examples": f"first training images, for the Hessian [{EXAMPLES}, or all]",
    }
    options.add_counts(spectrum, counts)
    options.add_out(spectrum, "quick check: 2 epochs, few products")


def run(chosen: argparse.Namespace, command: str) -> None:
    """Trains a network; leaves `results.json` and `spectrum.png` in `--out`."""
    from eigensam_jax.experiments.spectrum import run as spectrum

    chosen = options.filled(chosen, _USUAL, _SMOKE)
    fixed, asked = METHODS[chosen.optimizer].base, chosen.base_optimizer
    if fixed and asked not in (None, fixed):
        raise UserError(
            f"--base-optimizer {asked}: --optimizer {chosen.optimizer} is trained by "
            f"{fixed}; leave it out"
        )
    if chosen.seed >= 2**32:
        raise UserError(f"--seed {chosen.seed} has more than 32 bits; use fewer")
    chosen.base_optimizer = base = fixed or asked or "sgd"
    rate = learning_rate(chosen.optimizer, base, chosen.learning_rate)
    chosen.learning_rate, chosen.augment = rate, options.is_augmented(chosen)
    spectrum.run(chosen, command)


def tables(results: list[Document]) -> dict[str, Any]:
    """Functions from a page's argument to rows, by the table's name."""
    from eigensam_jax.experiments.spectrum import tables as made

    return {"spectrum": lambda count: made.summary(results[0])[: int(count)]}


def plots(results: Document, folder: Path) -> None:
    """Draws the plot of a results file."""
    from eigensam_jax.experiments.spectrum import plots as drawn

    drawn.spectrum(results, title(results), folder / "spectrum.png")


def title(results: Document) -> str:
    """What was trained, by what."""
    config = results["config"]
    return f"{registry.title(config)}, {METHODS[config['optimizer']].label}"
