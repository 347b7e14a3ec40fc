"""The options of `eigensam compare`, `accuracy` and `ablate`."""

import argparse
from typing import Any

from eigensam_jax.experiments import options
from eigensam_jax.experiments.errors import UserError

_COMPARE_USUAL: dict[str, Any] = {"seeds": 3, "epochs": 100, "looks": 20}
_ACCURACY_USUAL: dict[str, Any] = {
    "seeds": 5,
    "epochs": 20,
    "looks": 5,
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
_ABLATE_USUAL: dict[str, Any] = {"seeds": 5, "epochs": 10, "looks": 5}


def add_compare(commands: Any) -> None:
    """Adds `eigensam compare`."""
    compare = commands.add_parser(
        "compare",
        usage="%(prog)s [options]",
        help="train a network with SGD, SAM and Eigen-SAM, and show the difference",
        description="Train the same network from the same seeds with each optimizer, "
        "at the same ρ and α. Leaves results.json and compare.png in --out; the same "
        "command goes on where it ended.",
    )
    compare.add_argument(
        "--optimizers",
        metavar="NAME",
        nargs="+",
        choices=options.OPTIMIZERS,
        default=options.OPTIMIZERS,
        help=f"some of {', '.join(options.OPTIMIZERS)}, where sam_matched is SAM at "
        "the radius that eigen_sam had [all]",
    )
    options.add_runs(compare, _COMPARE_USUAL)
    options.add_method(compare)
    options.add_out(compare, "1 seed, 1 epoch: does it run at all?")
    compare.set_defaults(run=_compare)


def add_accuracy(commands: Any) -> None:
    """Adds `eigensam accuracy`."""
    accuracy = commands.add_parser(
        "accuracy",
        usage="%(prog)s [options]",
        help="tune each method on a validation split, then train it from several seeds",
        description="Choose the learning rate, ρ and α on a tenth of the training set, "
        "then train on all of it by SGD, SAM, ASAM, both Eigen-SAMs and SAM at their "
        "radius. Leaves main_DATASET.json and accuracy.png in --out; the same command "
        "goes on where it ended.",
    )
    add, usual = accuracy.add_argument, _ACCURACY_USUAL
    options.add_runs(accuracy, usual)
    for name, of_what in _GRIDS.items():
        add(
            f"--{name}",
            metavar="X",
            nargs="+",
            type=options.number(float, above=0),
            help=f"{of_what} [{' '.join(f'{x:g}' for x in usual[name])}]",
        )
    options.add_out(accuracy, "1 seed, 1 epoch, two of each: does it run at all?")
    accuracy.set_defaults(run=_accuracy)


def add_ablate(commands: Any) -> None:
    """Adds `eigensam ablate`."""
    ablate = commands.add_parser(
        "ablate",
        usage="%(prog)s [options]",
        help="what α, ρ, the tracker, the steps and the parameters perturbed matter",
        description="Train a network over and over, each time with one thing changed. "
        "Leaves results.json in --out; the same command goes on where it ended.",
    )
    add = ablate.add_argument
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
    options.add_method(ablate, alpha=1.0, above=0)
    options.add_out(ablate, "1 seed, 1 epoch: does it run at all?")
    ablate.set_defaults(run=_ablate)


def _compare(chosen: argparse.Namespace, command: str) -> None:
    with options.extras():
        from eigensam_jax.experiments.study import plans
    names = list(dict.fromkeys(chosen.optimizers))
    if "sam_matched" in names and "eigen_sam" not in names:
        raise UserError(
            "--optimizers: sam_matched takes its radius from the run of eigen_sam; "
            "name eigen_sam too, or leave sam_matched out"
        )
    named = _named(chosen)
    seeds = _number(chosen, "seeds", _COMPARE_USUAL)
    plan = plans.comparison(names, seeds=seeds, **named)
    _study(chosen, command, plan, {"optimizers": names, **named}, _COMPARE_USUAL)


def _accuracy(chosen: argparse.Namespace, command: str) -> None:
    with options.extras():
        from eigensam_jax.experiments.study import plans
    usual = _ACCURACY_USUAL
    grids = {
        name.replace("-", "_"): getattr(chosen, name.replace("-", "_"))
        or list(usual[name][:2] if chosen.smoke else usual[name])
        for name in _GRIDS
    }
    plan = plans.accuracy(plans.Grids(**grids), _number(chosen, "seeds", usual))
    _study(chosen, command, plan, grids, usual, f"main_{chosen.dataset}")


def _ablate(chosen: argparse.Namespace, command: str) -> None:
    with options.extras():
        from eigensam_jax.experiments.study import plans
    named, tables = _named(chosen), list(dict.fromkeys(chosen.tables))
    seeds = _number(chosen, "seeds", _ABLATE_USUAL)
    plan = plans.ablations(tables, seeds=seeds, **named)
    _study(chosen, command, plan, {"tables": tables, **named}, _ABLATE_USUAL)


def _named(chosen: argparse.Namespace) -> dict[str, float]:
    return {key: getattr(chosen, key) for key in ("rho", "alpha", "learning_rate")}


def _number(chosen: argparse.Namespace, key: str, usual: dict[str, Any]) -> int:
    """What was chosen; else 1 to see whether it runs at all, else what is usual."""
    number: int = getattr(chosen, key) or (1 if chosen.smoke else usual[key])
    return number


def _study(
    chosen: argparse.Namespace,
    command: str,
    plan: Any,
    described: dict[str, Any],
    usual: dict[str, Any],
    name: str = "results",
) -> None:
    with options.extras():
        from rich.console import Console

        from eigensam_jax.experiments.study import run as study
        from eigensam_jax.experiments.study import runner
    config = runner.Config(
        dataset=chosen.dataset,
        data_dir=chosen.data_dir,
        model=chosen.model,
        epochs=_number(chosen, "epochs", usual),
        batch_size=chosen.batch_size,
        augment=options.is_augmented(chosen),
        label_noise=chosen.label_noise,
        looks=_number(chosen, "looks", usual),
        plan=described,
        out=chosen.out,
        file=f"{name}.json",
        curvature_examples=chosen.curvature_examples,
        train_examples=chosen.train_examples,
        pretrained=chosen.pretrained,
        resolution=chosen.resolution,
    )
    study.run(config, plan, chosen.command, command, Console())
