"""`eigensam sde`: SAM against its stochastic differential equations, and dλ_max/dt."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from eigensam_jax.experiments import registry
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.records import progress, results, resumption, tables
from eigensam_jax.experiments.sde import checks as sde_checks
from eigensam_jax.experiments.sde import paths as sde_paths
from eigensam_jax.experiments.sde import plots as sde_plots
from eigensam_jax.experiments.sde import problem as sde_problem
from eigensam_jax.experiments.sde import steps as sde_steps
from eigensam_jax.experiments.sde import tables as sde_tables
from eigensam_jax.experiments.sde.paths import Job
from eigensam_jax.experiments.sde.problem import Problem
from eigensam_jax.experiments.training import loop

Record = dict[str, Any]


class Config(NamedTuple):
    """The options of the command; see `eigensam sde --help`."""

    dataset: str
    data_dir: Path | None
    rhos: tuple[float, ...]
    alpha: float
    learning_rate: float
    seeds: int
    steps: int
    evaluations: int
    moment_paths: int
    checks: tuple[str, ...]
    out: Path


def run(config: Config, command: str) -> None:
    """Runs paths and checks; leaves `results.json` and three plots in `config.out`.

    The results are brought up to date after every path. Those of the same configuration
    that are there already are kept, and not run again.

    Args:
      config: what to run.
      command: the command line, for the results file.

    Raises:
      UserError: for what can't be run, before any path; or when a path diverges.
      KeyboardInterrupt: passed on, with the finished paths on disk.
    """
    console = Console()
    dataset = registry.dataset(config.dataset, config.data_dir)
    needed = sde_problem.NUM_BATCHES * sde_problem.BATCH_SIZE
    if len(dataset.train_images) < needed:
        raise UserError(
            f"--dataset {config.dataset} has {len(dataset.train_images)} training "
            f"images, less than the {needed} that are used; name a larger one"
        )
    results.make_folder(config.out)
    problem = sde_problem.make_problem(dataset)
    path = config.out / results.FILE
    document = resumption.of_runs(path, command, _protocol(config, problem))
    missing = _records(config, problem, document["runs"], console)
    resumption.add_runs(path, document, missing, console, in_order)
    show(document, config.out, console)


def show(document: Record, out: Path, console: Console) -> None:
    """Draws the plots of a complete results file, and prints its tables."""
    runs = document["runs"]
    sde_plots.draw(document, out)
    for table in sde_tables.all_tables(runs, sde_tables.title(document)):
        console.print(table)
    console.print(f"{sde_tables.NOTES} {tables.of_seeds(runs)}")
    console.print(
        f"Results: {out / 'results.json'}   Plots: paths.png, off.png, rates.png\n"
        f"Wall time: {document['wall_time_s']:.0f} s"
    )


def in_order(runs: list[Record]) -> list[Record]:
    """Paths by seed and ρ, whenever they were run, and checks after them."""
    order = list(sde_tables.LABELS)

    def place(run: Record) -> tuple[float, ...]:
        if "check" in run:
            return (np.inf,)
        return (run["seed"], run["rho"], run["alpha"], order.index(run["optimizer"]))

    return sorted(runs, key=place)


def checks(config: Config) -> dict[str, Callable[[Problem], Record]]:
    """What is measured beside the paths, by name."""
    rho, eta = min(config.rhos), config.learning_rate
    found: dict[str, Callable[[Problem], Record]] = {
        "one_step": lambda problem: sde_checks.one_step(problem, config.alpha),
        "many_steps": lambda problem: sde_checks.many_steps(problem, eta),
        "moments": lambda problem: sde_checks.moments(
            problem, rho, eta, config.moment_paths
        ),
        "costs": lambda problem: sde_checks.costs(problem, rho),
    }
    return {name: found[name] for name in config.checks}


def _protocol(config: Config, problem: Problem) -> Record:
    """All that the figures of one path or check depend on, apart from its `Job`."""
    return {
        "dataset": config.dataset,
        "data_dir": config.data_dir and str(config.data_dir),
        "rhos": list(config.rhos),
        "alpha": config.alpha,
        "learning_rate": config.learning_rate,
        "steps": config.steps,
        "evaluations": list(loop.evaluation_steps(config.steps, config.evaluations)),
        "moment_paths": config.moment_paths,
        "model": f"tanh, two hidden layers of {sde_problem.WIDTH}",
        "num_batches": sde_problem.NUM_BATCHES,
        "batch_size": sde_problem.BATCH_SIZE,
        "substeps": 1,
        "test_examples": len(problem.dataset.test_images),
        "eigenvalue_tolerance": sde_problem.TOLERANCE,
        "curvature_tolerance": sde_paths.CURVATURE_TOLERANCE,
        "eigen_sam_tracker": sde_steps.EIGENVECTOR,
    }


def _records(
    config: Config, problem: Problem, runs: list[Record], console: Console
) -> Iterator[Record]:
    """Does the checks and paths that `runs` lacks; yields the record of each."""
    done = {run["check"] for run in runs if "check" in run}
    missing_checks = {k: v for k, v in checks(config).items() if k not in done}
    paths = {
        Job(*(run[key] for key in Job._fields)) for run in runs if "check" not in run
    }
    wanted = sde_paths.jobs(config.rhos, config.alpha, config.seeds)
    missing = [job for job in wanted if job not in paths]
    plan = sde_paths.Plan(config.steps, config.evaluations, config.learning_rate)
    run = sde_paths.make_run(problem, plan, sde_paths.middle(config.rhos))
    looks = len(loop.evaluation_steps(config.steps, config.evaluations))
    with progress.shown(console) as bar:
        total = looks * (len(missing) + len(missing_checks))
        task = bar.add_task("", total=total)
        for job in missing:
            description = f"{job.optimizer}, ρ {job.rho:g}, seed {job.seed}"
            bar.update(task, description=description)
            start, points = time.perf_counter(), []
            try:
                for point in run(job):
                    points.append(point)
                    bar.advance(task)
            except FloatingPointError as error:
                raise UserError(
                    f"{description}: {error}; lower --rho or --learning-rate (now "
                    f"{config.learning_rate:g})"
                ) from error
            yield {
                **job._asdict(),
                **results.rounded(_summary(points)),
                "wall_time_s": time.perf_counter() - start,
            }
        for name, check in missing_checks.items():
            bar.update(task, description=name)
            start = time.perf_counter()
            record = {"check": name, "optimizer": "sam", "seed": 0}
            record |= results.rounded(check(problem))
            bar.advance(task, looks)
            yield {**record, "wall_time_s": time.perf_counter() - start}


def _summary(points: list[Any]) -> Record:
    """What is seen along a path, and the parts of dλ_max/dt where they are measured."""
    curves = {"curves": _curves([look._asdict() for look, _ in points])}
    rates = _curves([parts for _, parts in points if parts])
    return curves | ({"rates": rates} if rates else {})


def _curves(points: list[Record]) -> Record:
    """A list for each key, over the points."""
    return {key: [point[key] for point in points] for key in (points or [{}])[0]}
