"""`eigensam compare`: the same network from the same seeds, by each optimizer."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from eigensam_jax.experiments import data, measures, plots, results, tables, training
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.models import MODELS

_COLUMNS = {
    "test_accuracy": ("test acc. %", 100, 1),
    "train_loss": ("train loss", 1, 4),
    "lambda_max": ("λ_max", 1, 3),
    "alignment": ("alignment", 1, 3),
    "step_time_ms": ("ms a step", 1, 2),
}


class Config(NamedTuple):
    """The options of the command; see `eigensam compare --help`."""

    dataset: str
    data_dir: Path | None
    model: str
    optimizers: tuple[str, ...]
    seeds: int
    epochs: int
    batch_size: int
    learning_rate: float
    rho: float
    alpha: float
    evaluations: int
    out: Path


def run(config: Config, command: str, console: Console) -> None:
    """Runs the comparison and leaves `results.json` and `compare.png` in `config.out`.

    The results are brought up to date after every run, so that an interruption loses at
    most the run in progress.

    Args:
      config: what to compare.
      command: the command line, for the results file.
      console: where progress and the table go.

    Raises:
      UserError: for what can't be run, before any training; or when a run diverges.
      KeyboardInterrupt: passed on, with the finished runs on disk.
    """
    _check(config)
    dataset = data.load(config.dataset, config.data_dir)
    training.check_batch_size(config.batch_size, config.dataset, dataset)
    examples = len(dataset.train_images)
    results.make_folder(config.out)
    document: dict[str, Any] = {
        "command": command,
        "config": {
            **config._asdict(),
            "data_dir": config.data_dir and str(config.data_dir),
            "out": str(config.out),
            **training.protocol(dataset),
            "curvature_examples": min(examples, measures.CURVATURE_EXAMPLES),
            "curvature_tolerance": measures.CURVATURE_TOLERANCE,
            "alignment_batches": measures.ALIGNMENT_BATCHES,
        },
        **results.environment(),
        "complete": False,
        "wall_time_s": 0.0,
        "runs": [],
    }
    runs: list[dict[str, Any]] = document["runs"]
    path, start = config.out / "results.json", time.perf_counter()
    try:
        for record in _records(config, dataset, console):
            runs.append(record)
            document["wall_time_s"] = time.perf_counter() - start
            results.write(
                path, document
            )  # only now in place of an earlier comparison's
            if len(runs) == 1:
                (config.out / "compare.png").unlink(missing_ok=True)
    except (KeyboardInterrupt, UserError):
        console.print(
            f"{len(runs)} finished runs are in {path}"
            if runs
            else "No run was finished."
        )
        raise
    document["complete"] = True
    results.write(path, document)
    title = f"{config.dataset}, {config.model}, {config.seeds} seeds"
    plots.compare(runs, title, config.out / "compare.png")
    console.print(table(runs, title))
    console.print(
        f"Mean ± standard deviation over seeds. λ_max on "
        f"{document['config']['curvature_examples']} training images; alignment with "
        "the true top eigenvector, mean over training. Times are means over the run, "
        "one optimizer after the other."
    )
    if difference := paired_difference(runs):
        console.print(f"eigen_sam − sam_matched, 95% intervals: {difference}")
    console.print(
        f"Results: {path}   Plot: {config.out / 'compare.png'}   "
        f"Wall time: {document['wall_time_s']:.0f} s"
    )


def table(runs: list[dict[str, Any]], title: str) -> Table:
    """The rows of `summary` for a terminal."""
    headers = ["optimizer", *(header for header, _, _ in _COLUMNS.values())]
    return tables.table(title, headers, summary(runs))


def summary(runs: list[dict[str, Any]]) -> list[list[str]]:
    """A row an optimizer: its name, and mean ± standard deviation of each column."""
    rows = []
    for name in dict.fromkeys(run["optimizer"] for run in runs):
        row = [name]
        for key, (_, factor, digits) in _COLUMNS.items():
            values = [run[key] for run in runs if run["optimizer"] == name]
            row.append(tables.mean_and_deviation(values, digits, factor))
        rows.append(row)
    return rows


def paired_difference(runs: list[dict[str, Any]]) -> str | None:
    """What direction alone did: Eigen-SAM less SAM at the radius of the same seed.

    Means over the seeds with 95% intervals by Student's t; None without two seeds.
    """
    by_seed = {(run["optimizer"], run["seed"]): run for run in runs}
    pairs = [
        (run, by_seed["sam_matched", run["seed"]])
        for run in runs
        if run["optimizer"] == "eigen_sam" and ("sam_matched", run["seed"]) in by_seed
    ]
    if len(pairs) < 2:
        return None
    parts = []
    for key in ("test_accuracy", "train_loss", "lambda_max", "alignment"):
        header, factor, digits = _COLUMNS[key]
        differences = [a[key] - b[key] for a, b in pairs]
        interval = tables.mean_and_interval(differences, digits, factor)
        parts.append(f"{header} {interval}")
    return ", ".join(parts)


def _records(
    config: Config, dataset: data.Dataset, console: Console
) -> Iterator[dict[str, Any]]:
    """Trains every optimizer from every seed; yields the record of each run."""
    settings = training.Settings(
        config.epochs,
        config.batch_size,
        config.learning_rate,
        config.alpha,
        config.evaluations,
    )
    model = MODELS[config.model](dataset.num_classes)
    measure = measures.make_measure(model, dataset, config.batch_size, config.alpha)
    # `sam_matched` takes its radius from `eigen_sam`, so it comes last.
    names = sorted(config.optimizers, key=lambda name: name == "sam_matched")
    total_steps = len(dataset.train_labels) // config.batch_size * config.epochs
    points_a_run = len(training.evaluation_steps(total_steps, config.evaluations))
    runners: dict[tuple[str, float], training.Run[measures.Measurement]] = {}
    with tables.progress_bar(console) as progress:
        task = progress.add_task("", total=points_a_run * config.seeds * len(names))
        for seed in range(config.seeds):
            radius = config.rho
            for name in names:
                progress.update(task, description=f"{name}, seed {seed}")
                rho = radius if name == "sam_matched" else config.rho
                if (name, rho) not in runners:
                    runners[name, rho] = training.make_run(
                        model, dataset, measure, name, rho, settings
                    )
                points = []
                for point in runners[name, rho](seed):
                    points.append(point)
                    progress.advance(task)
                if name == "eigen_sam":
                    radius = points[-1].radius
                yield _record(config, name, seed, rho, points)


def _record(
    config: Config,
    name: str,
    seed: int,
    rho: float,
    points: list[training.Point[measures.Measurement]],
) -> dict[str, Any]:
    """What `results.json` says of a run: figures of its end, and its curves.

    `alignment` is the mean over training, without the point before the first step.
    """
    curves: dict[str, Any] = {
        "step": [point.step for point in points],
        "radius": [point.radius for point in points],
        **{
            key: [getattr(point.measurement, key) for point in points]
            for key in measures.Measurement._fields
        },
    }
    return {
        "dataset": config.dataset,
        "model": config.model,
        "optimizer": name,
        "seed": seed,
        "rho": 0.0 if name == "sgd" else rho,
        **points[-1].measurement._asdict(),
        "alignment": float(np.mean(curves["alignment"][1:])),
        "step_time_ms": points[-1].step_time_ms,
        "curves": curves,
    }


def _check(config: Config) -> None:
    if "sam_matched" in config.optimizers and "eigen_sam" not in config.optimizers:
        raise UserError(
            "--optimizers: sam_matched takes its radius from the run of eigen_sam; "
            "name eigen_sam too, or leave sam_matched out"
        )
