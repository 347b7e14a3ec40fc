"""`eigensam sde`: SAM against its stochastic differential equations, and dλ_max/dt."""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console

from eigensam_jax.experiments import registry
from eigensam_jax.experiments.data import load
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.records import progress, results, resumption, tables
from eigensam_jax.experiments.sde import checks as sde_checks
from eigensam_jax.experiments.sde import paths as sde_paths
from eigensam_jax.experiments.sde import plots as sde_plots
from eigensam_jax.experiments.sde import problem as sde_problem
from eigensam_jax.experiments.sde import tables as sde_tables
from eigensam_jax.experiments.sde.problem import Problem
from eigensam_jax.experiments.training import loop

Record = dict[str, Any]


def run(chosen: argparse.Namespace, command: str) -> None:
    """Runs paths and checks; leaves `results.json` and three plots in `--out`."""
    console = Console()
    dataset = registry.dataset(chosen.dataset, chosen.data_dir)
    needed = sde_problem.NUM_BATCHES * sde_problem.BATCH_SIZE
    if len(dataset.train_images) < needed:
        raise UserError(
            f"--dataset {chosen.dataset} has {len(dataset.train_images)} training "
            f"images, less than the {needed} that are used; name a larger one"
        )
    results.make_folder(chosen.out)
    problem = sde_problem.make_problem(dataset)
    path = chosen.out / results.FILE
    config = {  # everything that paths and checks depend on, beside the job
        "dataset": chosen.dataset,
        "data_dir": chosen.data_dir and str(chosen.data_dir),
        "data_crc32": load.checksum(dataset),
        "rhos": list(chosen.rhos),
        "alpha": chosen.alpha,
        "learning_rate": chosen.learning_rate,
        "steps": chosen.steps,
        "evaluations": list(loop.evaluation_steps(chosen.steps, chosen.evaluations)),
        "moment_paths": chosen.moment_paths,
        "model": f"tanh, two hidden layers of {sde_problem.WIDTH}",
        "num_batches": sde_problem.NUM_BATCHES,
        "batch_size": sde_problem.BATCH_SIZE,
        "substeps": 1,
        "eigenvalue_tolerance": sde_problem.TOLERANCE,
        "curvature_tolerance": sde_paths.CURVATURE_TOLERANCE,
        "eigen_sam_tracker": sde_paths.EIGENVECTOR,
    }
    document = resumption.of_runs(path, command, config, seeds=chosen.seeds)
    missing = _records(chosen, problem, document["runs"], console)
    in_order = partial(sorted, key=_place)
    resumption.add_runs(path, document, missing, console, in_order)
    runs = document["runs"]
    sde_plots.draw(document, chosen.out)
    for table in sde_tables.all_tables(runs, sde_tables.title(document)):
        console.print(table)
    console.print(f"{sde_tables.NOTES} {tables.of_seeds(runs)}")
    plots = "paths.png", "off.png", "rates.png"
    console.print(results.ending(path, document, *plots))


def _place(run: Record) -> tuple[float, ...]:
    """Sorts paths by seed and ρ; checks come last."""
    if "check" in run:
        return (np.inf,)
    order = list(sde_tables.LABELS).index(run["optimizer"])
    return run["seed"], run["rho"], run["alpha"], order


def _records(
    chosen: argparse.Namespace, problem: Problem, runs: list[Record], console: Console
) -> Iterator[list[Record]]:
    """Does the missing paths and checks; yields the records of each."""
    stops = loop.evaluation_steps(chosen.steps, chosen.evaluations)
    run = sde_paths.make_run(
        problem, stops, chosen.learning_rate, sde_paths.middle(chosen.rhos)
    )

    def follow(job: Record, name: str, advance: progress.Advance) -> list[Record]:
        looks = []
        try:
            for look in run(job):
                looks.append(look)
                advance(1)
        except FloatingPointError as error:
            raise UserError(
                f"{name}: {error}; lower --rho or --learning-rate (now "
                f"{chosen.learning_rate:g})"
            ) from error
        curves = {key: [look[key] for look in looks] for key in looks[0]}
        worst = max(curves.pop("lambda_max_residual"))
        return [job | {"lambda_max_residual": worst, "curves": curves}]

    rho, eta = chosen.rhos[0], chosen.learning_rate
    checks: dict[str, Callable[[], list[Record]]] = {
        "one_step": lambda: sde_checks.one_step(problem, chosen.alpha),
        "many_steps": lambda: sde_checks.many_steps(problem, eta),
        "moments": lambda: sde_checks.moments(problem, rho, eta, chosen.moment_paths),
        "costs": lambda: sde_checks.costs(problem, rho),
    }

    def measure(name: str, advance: progress.Advance) -> list[Record]:
        shared = {"check": name, "seed": 0}
        found = [shared | record for record in checks[name]()]
        advance(len(stops))
        return found

    jobs = sde_paths.jobs(chosen.rhos, chosen.alpha, chosen.seeds)
    work: list[progress.Piece] = []
    for job in resumption.missing(jobs, runs):
        name = f"{job['optimizer']}, ρ {job['rho']:g}, seed {job['seed']}"
        work.append((name, partial(follow, job, name)))
    for name in chosen.checks:
        if not results.select(runs, check=name):
            work.append((name, partial(measure, name)))
    return progress.done(work, len(stops) * len(work), console)
