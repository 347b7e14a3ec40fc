"""`eigensam compare`, `accuracy`, `frontier`, `ablate`: options, tables and plots."""

import argparse
from pathlib import Path
from typing import Any

from eigensam_jax.experiments import options, registry
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.registry import (
    BASE_OPTIMIZERS,
    METHODS,
    learning_rate,
)
from eigensam_jax.experiments.study import ablations, plans

Document = dict[str, Any]

_USUAL: dict[str, dict[str, Any]] = {
    # Chosen to show what Eigen-SAM does, on seeds that are not among those shown.
    "compare": {"seeds": 5, "epochs": 40, "looks": 10, "base_optimizer": "adamw"},
    "accuracy": {
        "seeds": 5,
        "epochs": 20,
        "looks": 5,
        "rhos": [0.1, 0.05, 0.2],
        "asam_rhos": [0.5, 0.2, 1.0],
        "paper_alphas": [0.2, 0.1, 0.05],
        "alphas": [1.0, 0.2, 0.5, 2.0, 3.0],
    },
    "frontier": {
        **{"seeds": 5, "epochs": 15, "looks": 3, "rhos": [0.05, 0.1, 0.2, 0.4]},
        "learning_rates": [0.02, 0.05, 0.1, 0.2],
    },
    "ablate": {
        "seeds": 5,
        "epochs": 10,
        "looks": 5,
        "tables": ["alpha", "rho", "tracker", "when"],
    },
}
_SMOKE: dict[str, dict[str, Any]] = {
    "compare": {"seeds": 1, "epochs": 1, "looks": 1},
    "accuracy": {
        **{"seeds": 1, "epochs": 1, "looks": 1, "rhos": [0.1, 0.05]},
        **{"asam_rhos": [0.5], "paper_alphas": [0.2], "alphas": [1.0]},
    },
    "frontier": {
        **{"seeds": 1, "epochs": 1, "looks": 1, "rhos": [0.1]},
        **{"learning_rates": [0.05], "optimizers": ["sam_periodic"]},
    },
    "ablate": {"seeds": 1, "epochs": 1, "looks": 1, "tables": ["when"]},
}
_ON_THE_FRONTIER = (
    *("sam", "sam_every", "sam_periodic"),
    *("eigen_sam", "eigen_sam_periodic"),
)
_GRIDS = {
    "rhos": "ρ of SAM",
    "asam_rhos": "ρ of ASAM",
    "paper_alphas": "α with the paper's tracker",
    "alphas": "α with the secant",
}


def add_command(subparsers: Any) -> None:
    """Adds the four commands."""
    _add_compare(subparsers)
    _add_accuracy(subparsers)
    _add_frontier(subparsers)
    _add_ablate(subparsers)


def run(chosen: argparse.Namespace, command: str) -> None:
    """Does what was chosen; leaves a results file and a plot in `--out`."""
    kind = chosen.command
    if kind == "compare" and chosen.base_optimizer is None:
        bases = (METHODS[name].base for name in chosen.optimizers or ())
        chosen.base_optimizer = next(filter(None, bases), None)
    if kind == "frontier" and chosen.base_optimizer != "sgd":
        _check_rates(chosen)
    chosen = options.filled(chosen, _USUAL[kind], _SMOKE[kind])
    plan_of = {"compare": _comparison, "accuracy": _tuned}
    plan_of |= {"frontier": _frontier, "ablate": _ablations}
    plan, described = plan_of[kind](chosen)

    from eigensam_jax.experiments.study import run as study
    from eigensam_jax.experiments.study.jobs import Config

    augment = options.is_augmented(chosen)
    config = options.config(Config, chosen, plan=described, augment=augment)
    study.run(config, plan, chosen.seeds, kind, command)


def tables(results: list[Document]) -> dict[str, Any]:
    """Functions from a page's argument to rows, by the table's name."""
    from eigensam_jax.experiments.study import tables as made

    runs = results[0]["runs"]
    return {
        "tuning": lambda _: made.tuning(runs),
        "summary": lambda table: made.summary(runs, table),
        "paired": lambda table: made.paired(runs, table),
        "against": lambda what: made.against(runs, what),
        "frontier": lambda table: made.frontier(runs, table),
        "gains": lambda what: made.gains(results, what),
        "chosen": lambda what: made.chosen(results, what),
        "over_training": lambda figure: made.over_training(runs, figure),
    }


def plots(results: Document, folder: Path) -> None:
    """Draws the plot of a results file."""
    from eigensam_jax.experiments.study import plots as drawn

    kind = results["commands"][0].split()[1]
    config = results["config"]
    title = registry.title(config)
    drawn.DRAW[kind](results["runs"], title, folder / f"{kind}.png")


def _add_compare(subparsers: Any) -> None:
    compare = subparsers.add_parser(
        "compare",
        help="train with AdamW, SAM and Eigen-SAM and show the difference",
        description="Train the same network from the same seeds with each optimizer, "
        "at the same ρ and α. Leaves results.json and compare.png in --out; run it "
        "again to resume.",
    )
    usual = _USUAL["compare"]
    names = " ".join(options.usual_methods(usual["base_optimizer"]))
    options.add_choices(compare, "optimizers", tuple(METHODS), f" [{names}]")
    options.add_runs(compare, usual)
    options.add_method(compare, rho=0.2, alpha=1.0)
    options.add_out(compare, "quick check: 1 seed, 1 epoch")


def _add_accuracy(subparsers: Any) -> None:
    accuracy = subparsers.add_parser(
        "accuracy",
        help="tune each method on a validation split, then train with several seeds",
        description="Choose the learning rate, ρ and α on a tenth of the training set, "
        "then train on all of it. Leaves results.json and accuracy.png in --out; run "
        "it again to resume.",
    )
    options.add_runs(accuracy, _USUAL["accuracy"])
    rates = BASE_OPTIMIZERS["sgd"].learning_rates
    grids = {"learning_rates": ("of the base optimizer", rates)}
    grids |= {name: (what, _USUAL["accuracy"][name]) for name, what in _GRIDS.items()}
    for name, (what, usual) in grids.items():
        options.add_grid(accuracy, name, what, usual)
    options.add_out(accuracy, "quick check: 1 seed, 1 epoch, one or two of each")


def _add_frontier(subparsers: Any) -> None:
    frontier = subparsers.add_parser(
        "frontier",
        help="accuracy and λ_max of each method against its cost",
        description="Tune all methods alike, then train each for equal steps and equal "
        "gradients. Leaves results.json and frontier.png in --out; run it again to "
        "resume.",
    )
    names = [x for x in METHODS if METHODS[x].link is not None]
    few = " ".join(_ON_THE_FRONTIER)
    options.add_choices(frontier, "optimizers", names, f" [{few}]")
    options.add_runs(frontier, _USUAL["frontier"])
    usual = _USUAL["frontier"]
    options.add_grid(frontier, "rhos", "ρ", usual["rhos"])
    options.add_grid(frontier, "asam_rhos", "ρ of ASAM", "10 times --rhos")
    rates = usual["learning_rates"]
    options.add_grid(frontier, "learning_rates", "of the base optimizer", rates)
    options.add_grid(frontier, "alphas", "α, each tried with each ρ", (1,))
    options.add_out(frontier, "quick check: 1 seed, 1 epoch, one trial")


def _add_ablate(subparsers: Any) -> None:
    ablate = subparsers.add_parser(
        "ablate",
        help="vary α, ρ, the tracker, when to perturb, and which parameters",
        description="Train a network over and over, each time with one thing changed. "
        "Leaves results.json and ablate.png in --out; run it again to resume.",
    )
    options.add_runs(ablate, _USUAL["ablate"])
    tables = tuple(ablations.ABLATIONS)
    few = " [all but the last two; parts needs no batch "
    options.add_choices(
        ablate, "tables", tables, f"{few}normalisation, norms one with it]"
    )
    options.add_method(ablate, alpha=1.0, above=0)
    options.add_out(ablate, "quick check: 1 seed, 1 epoch, one table")


def _comparison(chosen: argparse.Namespace) -> tuple[plans.Plan, dict[str, Any]]:
    base = chosen.base_optimizer
    names = list(dict.fromkeys(chosen.optimizers or options.usual_methods(base)))
    options.check_radii(names)
    rates = {name: learning_rate(name, base, chosen.learning_rate) for name in names}
    named = {"rho": chosen.rho, "alpha": chosen.alpha}
    described = {"learning_rate": learning_rate(base, base, chosen.learning_rate)}
    plan = plans.comparison(names, **named, learning_rates=rates, seeds=chosen.seeds)
    return plan, {"optimizers": names, **named, **described}


def _tuned(chosen: argparse.Namespace) -> tuple[plans.Plan, dict[str, Any]]:
    rates = list(BASE_OPTIMIZERS[chosen.base_optimizer].learning_rates)
    chosen.learning_rates = (
        chosen.learning_rates or rates[: 1 if chosen.smoke else None]
    )
    grids = {name: getattr(chosen, name) for name in plans.Grids._fields}
    plan = plans.accuracy(plans.Grids(**grids), chosen.seeds, chosen.base_optimizer)
    return plan, grids


def _frontier(chosen: argparse.Namespace) -> tuple[plans.Plan, dict[str, Any]]:
    names = list(dict.fromkeys(chosen.optimizers or _ON_THE_FRONTIER))
    trials = {"learning_rates": chosen.learning_rates, "rhos": chosen.rhos}
    users = {
        "asam_rhos": ["asam"],
        "alphas": [x for x in METHODS if METHODS[x].tracker],
    }
    for name, able in users.items():
        if getattr(chosen, name) and not {*names} & {*able}:
            raise UserError(
                f"--{name.replace('_', '-')}: name {' or '.join(able)} among "
                "--optimizers, or leave it out"
            )
    if chosen.asam_rhos:
        trials["asam_rhos"] = chosen.asam_rhos
    rates = len(chosen.learning_rates)
    for name, grid in trials.items():
        if len(grid) != rates:
            raise UserError(
                f"--{name.replace('_', '-')}: {len(grid)} trials and {rates} of "
                "--learning-rates; give as many of each"
            )
    options.check_radii(names)
    named = {"alphas": chosen.alphas or [1.0], **trials}
    plan = plans.frontier(
        names, **named, seeds=chosen.seeds, plain=chosen.base_optimizer
    )
    return plan, {"optimizers": names, **named}


def _check_rates(chosen: argparse.Namespace) -> None:
    """Refuses the usual rates, which are SGD's, for another base optimizer."""
    if chosen.learning_rates is None:
        usual = BASE_OPTIMIZERS[chosen.base_optimizer].learning_rates
        raise UserError(
            f"--base-optimizer {chosen.base_optimizer}: give its --learning-rates, as "
            f"many as --rhos, around {usual[0]:g}"
        )


def _ablations(chosen: argparse.Namespace) -> tuple[plans.Plan, dict[str, Any]]:
    base = chosen.base_optimizer
    named = {"rho": chosen.rho, "alpha": chosen.alpha}
    named["learning_rate"] = learning_rate(base, base, chosen.learning_rate)
    names = list(dict.fromkeys(chosen.tables))
    plan = ablations.ablations(names, **named, seeds=chosen.seeds, plain=base)
    return plan, {"tables": names, **named}
