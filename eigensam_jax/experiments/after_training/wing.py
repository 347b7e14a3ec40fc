"""`eigensam after-training`: its options, tables and plots."""

import argparse
from pathlib import Path
from typing import Any

from eigensam_jax.experiments import options, registry
from eigensam_jax.experiments.registry import (
    BASE_OPTIMIZERS,
    DATASETS,
    METHODS,
    MODELS,
)

Document = dict[str, Any]

_MODELS = [x for x in options.names_of(MODELS) if not MODELS[x].batch_norm]
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
        help="quantize, prune and perturb trained networks, and train them on new data",
        description="Train networks by each method, measure how sharp they are, then "
        "quantize, prune and perturb their weights and train them on new data. Prints "
        "tables and leaves results.json and after_training.png in --out; run it again "
        "to resume.",
    )
    options.add_problem(parser, _MODELS)
    parser.add_argument(
        "--next-dataset",
        metavar="NAME",
        choices=options.names_of(DATASETS),
        help="new data, from the same list [none]",
    )
    parser.add_argument(
        "--next-dir", metavar="DIR", type=options.folder, help="files of the new data"
    )
    options.add_choices(
        parser, "optimizers", _PERTURBING, f" [{' '.join(_USUAL['optimizers'])}]"
    )
    counts = {"seeds": f"number of seeds [{_USUAL['seeds']}]"}
    counts["epochs"] = f"number of epochs [{_USUAL['epochs']}]"
    options.add_counts(parser, counts)
    what = "tried for the base optimizer; the others use the first"
    options.add_grid(parser, "learning_rates", what, _USUAL["learning_rates"])
    options.add_grid(parser, "rhos", "ρ", _USUAL["rhos"])
    options.add_number(parser, "alpha", 1.0, "α")
    options.add_label_noise(parser)
    options.add_base(parser)
    options.add_out(parser, "quick check: 1 seed, 1 epoch, four networks")


def run(chosen: argparse.Namespace, command: str) -> None:
    """Trains, measures and changes; leaves `results.json` and a plot in `--out`."""
    from eigensam_jax.experiments.after_training import run as after_training

    rates = BASE_OPTIMIZERS[chosen.base_optimizer].learning_rates
    if chosen.base_optimizer != "sgd" and chosen.learning_rates is None:
        chosen.learning_rates = list(rates[: 1 if chosen.smoke else None])
    after_training.run(options.filled(chosen, _USUAL, _SMOKE), command)


def tables(results: list[Document]) -> dict[str, Any]:
    """Functions from a page's argument to rows, by the table's name."""
    from eigensam_jax.experiments.after_training import tables as made

    runs = results[0]["runs"]
    return {
        "methods": lambda _: made.methods(runs),
        "after": lambda kind: made.after(runs, kind),
        "after_differences": lambda kind: made.differences(runs, kind),
        "settings": lambda outcomes: made.settings(runs, outcomes.split()),
        "ranks": lambda outcomes: made.ranks(runs, outcomes.split()),
    }


def plots(results: Document, folder: Path) -> None:
    """Draws the plot of a results file."""
    from eigensam_jax.experiments.after_training import plots as drawn

    config = results["config"]
    title = registry.title(config)
    drawn.after_training(results["runs"], title, folder / "after_training.png")
