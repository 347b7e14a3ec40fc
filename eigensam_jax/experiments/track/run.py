"""`eigensam track`: how well each tracker follows the top eigenvector in training."""

import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from eigensam_jax.experiments import registry
from eigensam_jax.experiments.data.load import Dataset
from eigensam_jax.experiments.records import progress, results, resumption, tables
from eigensam_jax.experiments.registry import TRACKERS
from eigensam_jax.experiments.track import looks, plots
from eigensam_jax.experiments.track import tables as track_tables
from eigensam_jax.experiments.track.jobs import Job, jobs
from eigensam_jax.experiments.track.looks import Look
from eigensam_jax.experiments.training import loop, measures
from eigensam_jax.experiments.training.methods import named

RHO = 0.1
BATCH_SIZE = 128
TRAIN_EXAMPLES = 10_000

Record = dict[str, Any]


class Config(NamedTuple):
    """The options of the command; see `eigensam track --help`."""

    dataset: str
    data_dir: Path | None
    model: str
    trackers: tuple[str, ...]
    alpha: tuple[float, ...]
    seeds: int
    steps: int
    evaluations: int
    learning_rate: float
    base_optimizer: str
    weight_decay: float
    out: Path


def run(config: Config, command: str) -> None:
    """Runs the benchmark; leaves `results.json` and `track.png` in `config.out`.

    The results are brought up to date after every run. Runs of the same configuration
    that are there already are kept, and not run again.

    Args:
      config: what to run.
      command: the command line, for the results file.

    Raises:
      UserError: for what can't be run, before any training; or when a run diverges.
      KeyboardInterrupt: passed on, with the finished runs on disk.
    """
    console, dataset = Console(), _load(config)
    results.make_folder(config.out)
    path, plot = config.out / results.FILE, config.out / "track.png"
    calls = {name: TRACKERS[name].call for name in config.trackers}
    document = resumption.of_runs(path, command, _protocol(config, dataset), calls)
    missing = _records(config, dataset, document["runs"], console)
    resumption.add_runs(path, document, missing, console, in_order)
    runs, title = document["runs"], f"{config.dataset}, {config.model}"
    plots.track(runs, title, plot)
    for alpha in track_tables.alphas(runs):
        console.print(track_tables.table(runs, alpha, title))
    examples = document["config"]["curvature_examples"]
    console.print(
        "Mean ± standard deviation over seeds; worst: the least of all looks. HVPs: "
        "Hessian-vector products per 100 steps. ratio: vᵀHv/λ_max of the v that a step "
        f"uses, and |cos| with the true one, on {examples} training images."
    )
    console.print(track_tables.difference_table(runs, title))
    console.print(
        f"eigen_sam − SAM at its radius. {tables.of_seeds(runs)}\n"
        f"Results: {path}   Plot: {plot}   Wall time: {document['wall_time_s']:.0f} s"
    )


def in_order(runs: list[Record]) -> list[Record]:
    """By seed and α, whenever they were run."""
    return sorted(runs, key=lambda run: (run["seed"], run["alpha"] or 0.0))


def _load(config: Config) -> Dataset:
    """The data, of whose training images the first `TRAIN_EXAMPLES` are used."""
    dataset = registry.dataset(config.dataset, config.data_dir)
    images, labels = dataset.train_images, dataset.train_labels
    loop.check_batch_size(BATCH_SIZE, config.dataset, len(labels))
    return dataset._replace(
        train_images=images[:TRAIN_EXAMPLES], train_labels=labels[:TRAIN_EXAMPLES]
    )


def _protocol(config: Config, dataset: Dataset) -> dict[str, Any]:
    """All that the figures of one run depend on, apart from its `Job` and tracker."""
    examples = len(dataset.train_images)
    return {
        "dataset": config.dataset,
        "data_dir": config.data_dir and str(config.data_dir),
        "model": config.model,
        "rho": RHO,
        "steps": config.steps,
        "batch_size": BATCH_SIZE,
        "learning_rate": config.learning_rate,
        "evaluations": list(looks.look_steps(config.steps, config.evaluations)),
        **loop.protocol(dataset, config.base_optimizer, config.weight_decay),
        "curvature_examples": min(examples, measures.CURVATURE_EXAMPLES),
        "curvature_tolerance": measures.CURVATURE_TOLERANCE,
    }


def _records(
    config: Config, dataset: Dataset, runs: list[Record], console: Console
) -> Iterator[Record]:
    """Does the jobs that `runs` lacks; yields the record of each."""
    done = {Job(*(run[key] for key in Job._fields)): run for run in runs}
    wanted = jobs(config.trackers, config.alpha, config.seeds)
    missing = [job for job in wanted if job not in done]
    model, steps = registry.model(config.model, dataset.num_classes), config.steps
    measure = looks.make_measure(model, dataset, BATCH_SIZE, steps)

    @cache
    def runner(at: tuple[int, ...]) -> loop.Run[Look]:
        settings = loop.Settings(
            *(steps, BATCH_SIZE, config.learning_rate, (*at, steps)),
            base=config.base_optimizer,
            weight_decay=config.weight_decay,
        )
        return loop.make_run(model, dataset, measure, settings)

    with progress.shown(console) as bar:
        task = bar.add_task("", total=len(missing) * steps)
        for count, job in enumerate(missing):
            where = "" if job.tracker is None else f" {job.tracker} α {job.alpha:g}"
            description = f"{job.optimizer}{where}, seed {job.seed}"
            bar.update(task, description=description, completed=count * steps)
            start, rho = time.perf_counter(), RHO
            at: tuple[int, ...] = ()
            setup = named("sam", rho, 0.0)
            if job.optimizer == "eigen_sam" and job.tracker is not None:
                at = looks.look_steps(steps, config.evaluations)
                setup = named("eigen_sam", rho, job.alpha or 0.0, job.tracker)
            elif job.optimizer == "sam_matched":
                rho = done[job._replace(optimizer="eigen_sam")]["radius"]
                setup = setup._replace(rho=rho)
            points = []
            for point in runner(at)(setup, job.seed):
                bar.update(task, completed=count * steps + point.step)
                points.append(point)
            done[job] = {
                **job._asdict(),
                "rho": rho,
                **results.rounded(looks.summarise(points)),
                "wall_time_s": time.perf_counter() - start,
            }
            yield done[job]
