"""`eigensam compare`: the same network from the same seeds, by each optimizer."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import serialization
from rich.console import Console
from rich.table import Table

from eigensam_jax.experiments import (
    augmentation,
    checkpoints,
    data,
    measures,
    methods,
    plots,
    pretrained,
    results,
    resumption,
    tables,
    training,
)
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.models import MODELS

_COLUMNS = {
    "test_accuracy": ("test acc. %", 100, 1),
    "train_loss": ("train loss", 1, 4),
    "lambda_max": ("λ_max", 1, 3),
    "alignment": ("alignment", 1, 2),
    "step_time_ms": ("ms a step", 1, 1),
}

CHECKPOINT = "checkpoint.msgpack"

Record = dict[str, Any]
Curves = dict[str, list[Any]]


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
    augment: bool
    evaluations: int
    out: Path
    pretrained: Path | None = None


class Unfinished(NamedTuple):
    """A run in progress, after an evaluation that is not its last.

    Attributes:
      curves: what was measured so far.
      progress: a `training.Progress`, as the dict that a checkpoint holds.
    """

    curves: Curves
    progress: dict[str, Any]


def run(
    config: Config, command: str, console: Console, *, resume: bool = False
) -> None:
    """Runs the comparison and leaves `results.json` and `compare.png` in `config.out`.

    The results are brought up to date after every run, and a checkpoint after every
    evaluation, so that whatever ends the command loses what came after that. The
    checkpoint alone says where an unfinished comparison is: it holds the results so far
    and the run in progress.

    Args:
      config: what to compare.
      command: the command line, for the results file.
      console: where progress and the table go.
      resume: whether to go on with what is unfinished in `config.out`, if anything is.

    Raises:
      UserError: for what can't be run, before any training; or when a run diverges.
      KeyboardInterrupt: passed on, with the finished runs on disk.
    """
    _check(config)
    weights = None
    if config.pretrained is not None:
        weights = pretrained.load(config.pretrained, config.model)
    dataset = data.load(config.dataset, config.data_dir)
    training.check_batch_size(config.batch_size, config.dataset, dataset)
    examples = len(dataset.train_images)
    results.make_folder(config.out)
    new = {
        "command": command,
        "config": {
            **config._asdict(),
            "data_dir": config.data_dir and str(config.data_dir),
            "optimizers": list(config.optimizers),
            "out": str(config.out),
            "pretrained": weights and weights.record(),
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
    path, checkpoint = config.out / "results.json", config.out / CHECKPOINT
    document, unfinished = new, None
    if resume:
        document, unfinished = _begun(path, checkpoint, new)
    elif checkpoint.exists() or resumption.is_unfinished(path):
        raise UserError(
            f"--out {config.out} holds an unfinished comparison; add --resume to go on "
            "with it, or delete it or name another folder to begin anew"
        )
    runs: list[Record] = document["runs"]
    before, start = document["wall_time_s"], time.perf_counter()
    try:
        for step in _training(config, dataset, weights, runs, unfinished, console):
            document["wall_time_s"] = before + time.perf_counter() - start
            in_progress = None
            if isinstance(step, Unfinished):
                in_progress = step._asdict()
            else:
                runs.append(step)
                # Only now in place of an earlier comparison's.
                results.write(path, document)
                if len(runs) == 1:
                    (config.out / "compare.png").unlink(missing_ok=True)
            checkpoints.write(checkpoint, {"results": document, "run": in_progress})
    except (KeyboardInterrupt, UserError) as error:
        if isinstance(error, UserError):  # it would end there again
            checkpoint.unlink(missing_ok=True)
        done = f"{len(runs)} finished runs are in {path}"
        more = "; --resume goes on from there" if checkpoint.exists() else ""
        console.print((done if runs else "No run was finished") + more + ".")
        raise
    document["complete"] = True
    results.write(path, document)
    checkpoint.unlink(missing_ok=True)
    seeds = "1 seed" if config.seeds == 1 else f"{config.seeds} seeds"
    title = f"{config.dataset}, {config.model}, {seeds}"
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


def _begun(
    path: Path, checkpoint: Path, new: dict[str, Any]
) -> tuple[dict[str, Any], Unfinished | None]:
    """The results to go on with, and the run in progress, if there are."""
    found = checkpoints.read(checkpoint)
    if found is None:
        return resumption.document(path, new), None
    document = resumption.carried_on(path.parent, found["results"], new)
    return document, found["run"] and Unfinished(**found["run"])


def _training(
    config: Config,
    dataset: data.Dataset,
    weights: pretrained.Pretrained | None,
    runs: list[Record],
    unfinished: Unfinished | None,
    console: Console,
) -> Iterator[Unfinished | Record]:
    """Does the runs that `runs` lacks, from every seed by every optimizer.

    Yields after every evaluation: of the last one of a run, its record. `unfinished` is
    where the first of them was.
    """
    settings = training.Settings(
        config.epochs,
        config.batch_size,
        config.learning_rate,
        config.evaluations,
        augmentation.of(config.dataset, config.augment),
        weights and weights.begin,
    )
    model = MODELS[config.model](dataset.num_classes)
    measure = measures.make_measure(
        model, dataset, config.batch_size, measures.CURVATURE_EXAMPLES
    )
    # `sam_matched` takes its radius from `eigen_sam`, so it comes last.
    names = sorted(config.optimizers, key=lambda name: name == "sam_matched")
    jobs = [(name, seed) for seed in range(config.seeds) for name in names]
    done = {(run["optimizer"], run["seed"]): run for run in runs}
    total_steps = len(dataset.train_labels) // config.batch_size * config.epochs
    points_a_run = len(training.evaluation_steps(total_steps, config.evaluations))
    train: training.Run[measures.Measurement] | None = None
    with tables.progress_bar(console) as progress:
        task = progress.add_task(
            "", total=points_a_run * len(jobs), completed=points_a_run * len(done)
        )
        for name, seed in jobs:
            if (name, seed) in done:
                continue
            progress.update(task, description=f"{name}, seed {seed}")
            rho = config.rho
            if name == "sam_matched":
                rho = done["eigen_sam", seed]["curves"]["radius"][-1]
            method = methods.named(name, rho, config.alpha)
            train = train or training.make_run(model, dataset, measure, settings)
            curves: Curves = {
                key: [] for key in ("step", "radius", *measures.Measurement._fields)
            }
            saved = None
            if unfinished is not None:
                curves, saved, unfinished = *unfinished, None
                progress.advance(task, len(curves["step"]))
            for point in train(method, seed, saved):
                looked = {**point._asdict(), **point.measurement._asdict()}
                for key, curve in curves.items():
                    curve.append(looked[key])
                progress.advance(task)
                if point.step < total_steps:
                    state = serialization.to_state_dict(point.progress)
                    yield Unfinished(curves, state)
            record = _record(config, name, seed, rho, curves, point.step_time_ms)
            done[name, seed] = record
            yield record


def _record(
    config: Config,
    name: str,
    seed: int,
    rho: float,
    curves: Curves,
    step_time_ms: float,
) -> Record:
    """What `results.json` says of a run: figures of its end, and its curves.

    `alignment` is the mean over training, without the point before the first step.
    """
    return {
        "dataset": config.dataset,
        "model": config.model,
        "optimizer": name,
        "seed": seed,
        "rho": 0.0 if name == "sgd" else rho,
        **{key: curves[key][-1] for key in measures.Measurement._fields},
        "alignment": float(np.mean(curves["alignment"][1:])),
        "step_time_ms": step_time_ms,
        "curves": curves,
    }


def _check(config: Config) -> None:
    if "sam_matched" in config.optimizers and "eigen_sam" not in config.optimizers:
        raise UserError(
            "--optimizers: sam_matched takes its radius from the run of eigen_sam; "
            "name eigen_sam too, or leave sam_matched out"
        )
