"""The options of `eigensam accuracy`, `eigensam ablate` and `eigensam report`."""

import argparse
from pathlib import Path
from typing import Any

from eigensam_jax.experiments import options

_ACCURACY_USUAL: dict[str, Any] = {
    "seeds": 5,
    "epochs": 20,
    "learning-rates": (0.05, 0.02, 0.1),
    "rhos": (0.1, 0.05, 0.2),
    "asam-rhos": (0.5, 0.2, 1.0),
    "paper-alphas": (0.2, 0.1, 0.05),
    "alphas": (1.0, 0.2, 0.5, 2.0, 3.0),
}
_GRIDS = {
    "learning-rates": "of SGD",
    "rhos": "ρ of SAM",
    "asam-rhos": "ρ of ASAM",
    "paper-alphas": "α with the paper's tracker",
    "alphas": "α with the secant",
}
_ABLATE_USUAL: dict[str, Any] = {"seeds": 5, "epochs": 10}


def add_accuracy(commands: Any) -> None:
    """Adds `eigensam accuracy`."""
    accuracy = commands.add_parser(
        "accuracy",
        help="tune each method on a validation split, then train it from several seeds",
        description="Choose the learning rate, ρ and α on a tenth of the training set, "
        "then train on all of it by SGD, SAM, ASAM, Eigen-SAM with the paper's tracker "
        "and with the secant, and SAM at the radius of each. Leaves main_DATASET.json "
        "and a plot in --out; the same command goes on where it ended.",
    )
    add, usual = accuracy.add_argument, _ACCURACY_USUAL
    options.add_problem(accuracy)
    options.add_runs(accuracy, usual)
    for name, of_what in _GRIDS.items():
        add(
            f"--{name}",
            metavar="X",
            nargs="+",
            type=options.number(float, above=0),
            help=f"{of_what} [{' '.join(f'{x:g}' for x in usual[name])}]",
        )
    options.add_out(accuracy, "1 seed, 1 epoch, one of each: does it run at all?")
    accuracy.set_defaults(run=_accuracy)


def add_ablate(commands: Any) -> None:
    """Adds `eigensam ablate`."""
    ablate = commands.add_parser(
        "ablate",
        help="what α, ρ, the tracker, the steps and the parameters perturbed matter",
        description="Train a network over and over, each time with one thing changed. "
        "Leaves results.json in --out; the same command goes on where it ended.",
    )
    add = ablate.add_argument
    options.add_problem(ablate)
    options.add_runs(ablate, _ABLATE_USUAL)
    add(
        "--tables",
        metavar="NAME",
        nargs="+",
        choices=options.ABLATIONS,
        default=("alpha", "rho", "tracker", "when"),
        help=f"some of {', '.join(options.ABLATIONS)} [all but the last two, of which "
        "parts wants no batch normalisation, and norms wants some]",
    )
    positive = {"metavar": "X", "type": options.number(float, above=0)}
    add("--learning-rate", **positive, default=0.05, help="[%(default)s]")
    add("--rho", **positive, default=0.1, help="ρ [%(default)s]")
    add("--alpha", **positive, default=1.0, help="α [%(default)s]")
    options.add_out(ablate, "1 seed, 1 epoch: does it run at all?")
    ablate.set_defaults(run=_ablate)


def add_report(commands: Any) -> None:
    """Adds `eigensam report`."""
    report = commands.add_parser(
        "report",
        help="bring the tables and plots of a clone up to date with its results",
        description="Write the rows of every table in the pages of a clone from its "
        "results files, and draw every plot anew.",
    )
    report.add_argument(
        "--root",
        metavar="DIR",
        type=Path,
        default=Path(),
        help="folder of the clone [this one]",
    )
    report.set_defaults(run=_report)


def _accuracy(chosen: argparse.Namespace, command: str) -> None:
    with options.extras():
        from eigensam_jax.experiments import plans
    usual = _ACCURACY_USUAL
    grids = {
        name.replace("-", "_"): getattr(chosen, name.replace("-", "_"))
        or list(usual[name][:1] if chosen.smoke else usual[name])
        for name in _GRIDS
    }
    seeds = chosen.seeds or (1 if chosen.smoke else usual["seeds"])
    plan = plans.accuracy(plans.Grids(**grids), seeds)
    _study(chosen, command, plan, grids, f"main_{chosen.dataset}")


def _ablate(chosen: argparse.Namespace, command: str) -> None:
    with options.extras():
        from eigensam_jax.experiments import plans
    seeds = chosen.seeds or (1 if chosen.smoke else _ABLATE_USUAL["seeds"])
    named = {key: getattr(chosen, key) for key in ("rho", "alpha", "learning_rate")}
    tables = list(dict.fromkeys(chosen.tables))
    plan = plans.ablations(tables, seeds=seeds, **named)
    _study(chosen, command, plan, {"tables": tables, **named})


def _study(
    chosen: argparse.Namespace,
    command: str,
    plan: Any,
    described: dict[str, Any],
    name: str = "results",
) -> None:
    with options.extras():
        from rich.console import Console

        from eigensam_jax.experiments import study
    usual = _ABLATE_USUAL if name == "results" else _ACCURACY_USUAL
    config = study.Config(
        dataset=chosen.dataset,
        data_dir=chosen.data_dir,
        model=chosen.model,
        epochs=chosen.epochs or (1 if chosen.smoke else usual["epochs"]),
        batch_size=chosen.batch_size,
        augment=options.is_augmented(chosen),
        label_noise=chosen.label_noise,
        looks=chosen.looks,
        plan=described,
        out=chosen.out,
        file=f"{name}.json",
    )
    study.run(config, plan, command, Console())


def _report(chosen: argparse.Namespace, command: str) -> None:
    del command
    with options.extras():
        from eigensam_jax.experiments import report
    for path in report.run(chosen.root):
        print(path)
