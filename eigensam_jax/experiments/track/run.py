"""`eigensam track`: how well each tracker follows the top eigenvector in training."""

import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from eigensam_jax.experiments.data import load as data
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.models.small import MODELS
from eigensam_jax.experiments.records import results, resumption, tables
from eigensam_jax.experiments.track import looks as following
from eigensam_jax.experiments.track import plots
from eigensam_jax.experiments.track.trackers import TRACKERS
from eigensam_jax.experiments.training import measures, methods

RHO = 0.1
BATCH_SIZE = 128
LEARNING_RATES = {"mlp": 0.05, "cnn": 0.1, "strided_cnn": 0.1}
TRAIN_EXAMPLES = 10_000

_DIFFERENCES = {  # title, factor, digits
    "lambda_max": ("λ_max", 1, 3),
    "train_loss": ("train loss", 1, 5),
    "test_accuracy": ("test acc. %", 100, 2),
}

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


class Job(NamedTuple):
    """One training run.

    Attributes:
      optimizer: "eigen_sam", "sam", or "sam_matched", which is SAM at the mean radius
        that the run of `tracker`, `alpha` and `seed` had.
      tracker: a key of `TRACKERS`; None for "sam".
      alpha: α; None for "sam".
      seed: of the initialisation and of the order of the examples.
    """

    optimizer: str
    tracker: str | None
    alpha: float | None
    seed: int


def jobs(config: Config) -> list[Job]:
    """What to run: seed by seed, so that an early end leaves whole comparisons."""
    result = []
    for seed in range(config.seeds):
        result.append(Job("sam", None, None, seed))
        for alpha in config.alphas:
            for name in config.trackers:
                result.append(Job("eigen_sam", name, alpha, seed))
                if not TRACKERS[name].is_ceiling:
                    result.append(Job("sam_matched", name, alpha, seed))
    return result


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
    for alpha in alphas(runs):
        console.print(table(runs, alpha, title))
    examples = document["config"]["curvature_examples"]
    console.print(
        "Mean ± standard deviation over seeds; worst: the least of all looks. HVPs: "
        "Hessian-vector products per 100 steps. ratio: vᵀHv/λ_max of the v that a step "
        f"uses, and |cos| with the true one, on {examples} training images."
    )
    console.print(difference_table(runs, title))
    console.print(
        "eigen_sam − SAM at its radius, paired by seed, with 95% intervals.\n"
        f"Results: {path}   Plot: {config.out / 'track.png'}   "
        f"Wall time: {document['wall_time_s']:.0f} s"
    )


def in_order(runs: list[Record]) -> list[Record]:
    """By seed and α, whenever they were run."""
    return sorted(runs, key=lambda run: (run["seed"], run["alpha"] or 0.0))


def alphas(runs: list[Record]) -> list[float]:
    """All α of the runs, ascending."""
    return sorted({run["alpha"] for run in runs if run["alpha"] is not None})


def table(runs: list[Record], alpha: float, title: str) -> Table:
    """The rows of `summary` for a terminal."""
    headers = ("HVPs", "ratio", "worst", "|cos|", "λ_max", "train loss", "acc. %")
    title = f"{title}, α = {alpha:g}"
    return tables.table(title, ("tracker", *headers), summary(runs, alpha))


def difference_table(runs: list[Record], title: str) -> Table:
    """The rows of `differences` for a terminal."""
    headers = ("α", "radius", *(header for header, _, _ in _DIFFERENCES.values()))
    return tables.table(title, ("tracker", *headers), differences(runs))


def summary(runs: list[Record], alpha: float) -> list[list[str]]:
    """SAM and every tracker at α: cost, how well v is followed, and where runs end.

    The columns are products per 100 steps, vᵀHv/λ_max and its minimum, |cos(v, v_top)|,
    the final λ_max, training loss and test accuracy.
    """
    rows = []
    for name in (None, *names(runs)):
        optimizer, at = ("sam", None) if name is None else ("eigen_sam", alpha)
        chosen = [
            run
            for run in runs
            if (run["optimizer"], run["tracker"], run["alpha"]) == (optimizer, name, at)
        ]
        if not chosen:
            continue
        column = {key: [run[key] for run in chosen] for key in chosen[0]}
        followed = ["–"] * 4
        if name is not None:
            followed = [
                f"{TRACKERS[name].products:g}",
                tables.mean_and_deviation(column["ratio"], 2),
                f"{min(column['worst_ratio']):.2f}",
                tables.mean_and_deviation(column["cosine"], 2).split()[0],
            ]
        rows.append(
            [
                name or "sam",
                *followed,
                tables.mean_and_deviation(
                    column["lambda_max"], 3 if max(column["lambda_max"]) < 1 else 2
                ),
                tables.mean_and_deviation(column["train_loss"], 4).split()[0],
                tables.mean_and_deviation(column["test_accuracy"], 1, 100),
            ]
        )
    return rows


def across(networks: list[list[Record]]) -> list[list[str]]:
    """A row a tracker: its products, and the ratio on each network at α 0.2 and 1."""
    summaries = [
        {row[0]: row for row in summary(runs, alpha)}
        for runs in networks
        for alpha in (0.2, 1.0)
    ]
    return [
        [
            name,
            f"{spec.products:g}",
            *(rows[name][2] if name in rows else "–" for rows in summaries),
        ]
        for name, spec in TRACKERS.items()
    ]


def differences(runs: list[Record]) -> list[list[str]]:
    """A row a tracker and α: the radius, and Eigen-SAM less SAM at that of its run."""
    by_job = {tuple(run[key] for key in Job._fields): run for run in runs}
    rows = []
    for alpha in alphas(runs):
        for name in names(runs):
            pairs = [
                (run, by_job["sam_matched", name, alpha, run["seed"]])
                for run in runs
                if (run["optimizer"], run["tracker"], run["alpha"])
                == ("eigen_sam", name, alpha)
                and ("sam_matched", name, alpha, run["seed"]) in by_job
            ]
            if pairs:
                radius = np.mean([run["radius"] for run, _ in pairs])
                row = [name, f"{alpha:g}", f"{radius:.3f}"]
                for key, (_, factor, digits) in _DIFFERENCES.items():
                    less = [a[key] - b[key] for a, b in pairs]
                    row.append(tables.mean_and_interval(less, digits, factor))
                rows.append(row)
    return rows


def names(runs: list[Record]) -> list[str]:
    """The trackers of the runs, in the order of `TRACKERS`."""
    present = {run["tracker"] for run in runs}
    return [name for name in TRACKERS if name in present]


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
    missing = [job for job in jobs(config) if job not in done]
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
