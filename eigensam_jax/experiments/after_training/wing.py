"""`eigensam after-training`: its options, and what it answers."""

import argparse
from pathlib import Path
from typing import Any

from eigensam_jax.experiments import options, registry
from eigensam_jax.experiments.registry import DATASETS, METHODS

Document = dict[str, Any]

MODELS = ("mlp", "cnn", "strided_cnn", "cnn6", "vit")  # without batch normalisation
_PERTURBING = tuple(x for x in METHODS if METHODS[x].link)
_USUAL: dict[str, Any] = {
    "seeds": 5,
    "epochs": 20,
    "longer": [1, 2],  # times the epochs, of the base optimizer alone
    "curvature_examples": 2_000,
    "learning_rates": [0.02, 0.05, 0.1],
    "rhos": [0.05, 0.1, 0.2],
    "optimizers": [
        *("sam", "asam", "eigen_sam_paper", "eigen_sam", "sam_matched"),
        "sam_periodic",
    ],
}
_SMOKE: dict[str, Any] = {
    "seeds": 1,
    "epochs": 1,
    "longer": [1],
    "curvature_examples": 100,
    "learning_rates": [0.05],
    "rhos": [0.1],
    "optimizers": ["eigen_sam", "sam_matched"],
}


def add_command(subparsers: Any) -> None:
    """Adds `eigensam after-training`."""
    parser = subparsers.add_parser(
        "after-training",
        usage="%(prog)s [options]",
        help="what do quantisation, pruning, noise and new data do to flat networks?",
        description="Train networks by each method, measure how sharp they are, then "
        "quantise, prune and perturb their weights and train them on other data. "
        "Prints tables and leaves results.json and after_training.png in --out; goes "
        "on from there.",
    )
    options.add_problem(parser, MODELS)
    parser.add_argument(
        "--next-dataset",
        metavar="NAME",
        choices=[name for name, source in DATASETS.items() if not source.is_series],
        help="another of these, which they learn next [none]",
    )
    parser.add_argument("--next-dir", metavar="DIR", type=Path, help="its files")
    options.add_choices(
        parser, "optimizers", _PERTURBING, f" [{' '.join(_USUAL['optimizers'])}]"
    )
    counts = {"seeds": f"how many [{_USUAL['seeds']}]"}
    counts["epochs"] = f"how many [{_USUAL['epochs']}]"
    options.add_counts(parser, counts)
    what = "of the base optimizer alone; of the others the first,"
    options.add_grid(parser, "learning-rates", what, _USUAL["learning_rates"])
    options.add_grid(parser, "rhos", "ρ", _USUAL["rhos"])
    options.add_number(parser, "alpha", 1.0, "α")
    what = "share of training labels drawn anew"
    options.add_number(parser, "label-noise", 0.0, what)
    options.add_base(parser)
    options.add_out(parser, "1 seed, 1 epoch, four networks: does it run at all?")


def run(chosen: argparse.Namespace, command: str) -> None:
    """Trains, measures and changes; leaves `results.json` and a plot in `--out`."""
    from eigensam_jax.experiments.after_training import run as after_training

    after_training.run(options.filled(chosen, _USUAL, _SMOKE), command)


def tables(results: list[Document]) -> dict[str, Any]:
    """The tables of results files, by name: from what a page asks for to rows."""
    from eigensam_jax.experiments.after_training import tables as made

    runs = results[0]["runs"]
    return {
        "methods": lambda _: made.methods(runs),
        "after": lambda kind: made.after(runs, kind),
        "after_differences": lambda kind: made.differences(runs, kind),
        "ranks": lambda outcomes: made.ranks(runs, outcomes.split()),
    }


def plots(results: Document, folder: Path) -> None:
    """Draws the plot of a results file."""
    from eigensam_jax.experiments.after_training import plots as drawn

    config = results["config"]
    title = registry.title(config)
    drawn.after_training(results["runs"], title, folder / "after_training.png")
