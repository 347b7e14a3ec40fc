"""`eigensam track`: how well each tracker follows the top eigenvector in training."""

import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from eigensam_jax.experiments.data import load as data
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.models.small import MODELS
from eigensam_jax.experiments.records import results, resumption, tables
from eigensam_jax.experiments.track import looks as following
from eigensam_jax.experiments.track import plots
from eigensam_jax.experiments.track import tables as track_tables
from eigensam_jax.experiments.track.jobs import Job, jobs
from eigensam_jax.experiments.training import measures, methods
from eigensam_jax.experiments.training.trackers import TRACKERS

RHO = 0.1
BATCH_SIZE = 128
LEARNING_RATES = {"mlp": 0.05, "cnn": 0.1, "strided_cnn": 0.1}
TRAIN_EXAMPLES = 10_000

Record = dict[str, Any]


class Config(NamedTuple):
    """The options of the command; see `eigensam track --help`."""

    dataset: str
    data_dir: Path | None
    model: str
    trackers: tuple[str, ...]
    alphas: tuple[float, ...]
    seeds: int
    steps: int
    evaluations: int
    out: Path


def run(config: Config, command: str, console: Console) -> None:
    """Runs the benchmark; leaves `results.json` and `track.png` in `config.out`.

    The results are brought up to date after every run. Runs of the same configuration
    that are there already are kept, and not run again.

    Args:
      config: what to run.
      command: the command line, for the results file.
      console: where progress and the tables go.

    Raises:
      UserError: for what can't be run, before any training; or when a run diverges.
      KeyboardInterrupt: passed on, with the finished runs on disk.
    """
    dataset = _load(config)
    results.make_folder(config.out)
    path = config.out / "results.json"
    calls = {name: TRACKERS[name].call for name in config.trackers}
    document = resumption.of_runs(path, command, _protocol(config, dataset), calls)
    missing = _records(config, dataset, document["runs"], console)
    resumption.add_runs(path, document, missing, in_order, console)
    runs, title = document["runs"], f"{config.dataset}, {config.model}"
    plots.track(runs, title, config.out / "track.png")
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
        "eigen_sam − SAM at its radius, paired by seed, with 95% intervals.\n"
        f"Results: {path}   Plot: {config.out / 'track.png'}   "
        f"Wall time: {document['wall_time_s']:.0f} s"
    )


def in_order(runs: list[Record]) -> list[Record]:
    """By seed and α, whenever they were run."""
    return sorted(runs, key=lambda run: (run["seed"], run["alpha"] or 0.0))


def _load(config: Config) -> data.Dataset:
    """The data, of whose training images the first `TRAIN_EXAMPLES` are used."""
    dataset = data.load(config.dataset, config.data_dir)
    if len(dataset.train_images) < BATCH_SIZE:
        raise UserError(
            f"--dataset {config.dataset} has {len(dataset.train_images)} training "
            f"images, less than a batch of {BATCH_SIZE}"
        )
    return dataset._replace(
        train_images=dataset.train_images[:TRAIN_EXAMPLES],
        train_labels=dataset.train_labels[:TRAIN_EXAMPLES],
    )


def _settings(config: Config) -> following.Settings:
    return following.Settings(
        config.steps, BATCH_SIZE, LEARNING_RATES[config.model], config.evaluations
    )


def _protocol(config: Config, dataset: data.Dataset) -> dict[str, Any]:
    """All that the figures of one run depend on, apart from its `Job` and tracker."""
    examples = len(dataset.train_images)
    settings = _settings(config)
    return {
        "dataset": config.dataset,
        "data_dir": config.data_dir and str(config.data_dir),
        "model": config.model,
        "rho": RHO,
        "momentum": methods.MOMENTUM,
        "schedule": "cosine to 0",
        **settings._asdict(),
        "evaluations": following.evaluation_steps(settings),
        "train_examples": examples,
        "test_examples": len(dataset.test_images),
        "curvature_examples": min(examples, measures.CURVATURE_EXAMPLES),
        "curvature_tolerance": measures.CURVATURE_TOLERANCE,
    }


def _records(
    config: Config, dataset: data.Dataset, runs: list[Record], console: Console
) -> Iterator[Record]:
    """Does the jobs that `runs` lacks; yields the record of each."""
    done = {Job(*(run[key] for key in Job._fields)): run for run in runs}
    wanted = jobs(config.trackers, config.alphas, config.seeds)
    missing = [job for job in wanted if job not in done]
    model = MODELS[config.model](dataset.num_classes)
    measure = following.make_measure(model, dataset)

    @cache
    def runner(tracker: str | None) -> following.Run:
        spec = None if tracker is None else TRACKERS[tracker]
        return following.make_run(model, dataset, measure, spec, _settings(config))

    with tables.progress_bar(console) as progress:
        task = progress.add_task("", total=len(missing) * config.steps)
        for job in missing:
            where = "" if job.tracker is None else f" {job.tracker} α {job.alpha:g}"
            description = f"{job.optimizer}{where}, seed {job.seed}"
            progress.update(task, description=description)
            start, rho = time.perf_counter(), RHO
            points: list[following.Point] = []
            if job.optimizer == "sam_matched":
                rho = done[job._replace(optimizer="eigen_sam")]["radius"]
            train = runner(job.tracker if job.optimizer == "eigen_sam" else None)
            try:
                for point in train(job.seed, rho, job.alpha or 0.0):
                    progress.advance(
                        task, point.step - (points[-1].step if points else 0)
                    )
                    points.append(point)
            except FloatingPointError as error:
                raise UserError(
                    f"{description}: {error}; leave its tracker or α out"
                ) from error
            done[job] = {
                **job._asdict(),
                "rho": rho,
                **following.summarise(points),
                "wall_time_s": time.perf_counter() - start,
            }
            yield done[job]
