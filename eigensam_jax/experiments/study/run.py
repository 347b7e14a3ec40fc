"""`eigensam compare`, `accuracy` and `ablate`: many runs of one network, by a plan."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import serialization
from rich.console import Console

from eigensam_jax.experiments import registry
from eigensam_jax.experiments.data import load
from eigensam_jax.experiments.data.load import Dataset
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.models import pretrained
from eigensam_jax.experiments.models.pretrained import Pretrained
from eigensam_jax.experiments.records import (
    checkpoints,
    progress,
    results,
    resumption,
    tables,
)
from eigensam_jax.experiments.study import tables as study_tables
from eigensam_jax.experiments.study.ablations import PARTS
from eigensam_jax.experiments.study.plans import Job, Plan, Record
from eigensam_jax.experiments.study.plots import DRAW
from eigensam_jax.experiments.training import loop, losses, measures
from eigensam_jax.experiments.training.measures import Measurement
from eigensam_jax.experiments.training.methods import Setup
from eigensam_jax.experiments.training.steps import TrainState
from eigensam_jax.tree_math import PyTree

LOOK_EXAMPLES = 1_000
TOLERANCE = 1e-2
CHECKPOINT = "checkpoint.msgpack"
_JOB = Job(Setup(""), 0.0, 0).record  # with defaults, for what older files lack

Curves = dict[str, list[Any]]
Do = Callable[[Job], Record]


class Config(NamedTuple):
    """What all runs share, and what the results file says of the plan.

    Attributes:
      dataset: a key of `registry.DATASETS`.
      data_dir: the folder with its files.
      model: a key of `registry.MODELS`.
      epochs: of each run.
      batch_size: of each step.
      augment: whether training images are changed at random, where that is usual.
      label_noise: the share of training labels that are drawn anew.
      looks: how often the network is measured on the way, the end included.
      plan: the options of the plan.
      out: where results go.
      train_examples: how many of the training images there are; None for all.
      pretrained: the file of what the network begins from; None for nothing.
      resolution: height and width that the network resizes images to; None for its own.
      curvature_examples: training images that λ_max is taken on at the end.
      base_optimizer: of methods that have none of their own.
      weight_decay: of the base optimizer.
    """

    dataset: str
    data_dir: Path | None
    model: str
    epochs: int
    batch_size: int
    augment: bool
    label_noise: float
    looks: int
    plan: dict[str, Any]
    out: Path
    train_examples: int | None
    pretrained: Path | None
    resolution: int | None
    curvature_examples: int
    base_optimizer: str
    weight_decay: float


def run(config: Config, plan: Plan, kind: str, command: str) -> None:
    """Does the runs that are missing; leaves a results file and a plot in `config.out`.

    The results file is brought up to date after each run, and a run in progress has a
    checkpoint after every look. Whatever ends the command, the same one goes on.

    Args:
      config: what all runs share.
      plan: what to run.
      kind: the name of the command, a key of `DRAW`.
      command: the command line, for the results file.

    Raises:
      UserError: for what can't be run, before any training; or when a run diverges.
      KeyboardInterrupt: passed on, with the finished runs on disk.
    """
    console = Console()
    _check(config)
    weights = None
    if config.pretrained is not None:
        weights = pretrained.load(config.pretrained, config.model)
    dataset = registry.dataset(config.dataset, config.data_dir)
    if config.train_examples is not None:
        dataset = load.first(dataset, config.train_examples, config.dataset)
    examples = len(dataset.train_labels)
    if kind == "accuracy":
        examples = load.num_for_tuning(dataset)
    loop.check_batch_size(config.batch_size, config.dataset, examples)
    results.make_folder(config.out)
    path = config.out / results.FILE
    document = resumption.of_runs(path, command, _protocol(config, dataset, weights))
    noisy = load.with_label_noise(dataset, config.label_noise)
    do = make_runs(config, noisy, weights)
    missing = _records(do, plan, document["runs"], console)
    checkpoint = config.out / CHECKPOINT
    resumption.add_runs(path, document, missing, console, checkpoint=checkpoint)
    checkpoint.unlink(missing_ok=True)
    runs, title = document["runs"], f"{config.dataset}, {config.model}"
    for table in study_tables.all_tables(runs, title):
        console.print(table)
    plot = config.out / f"{kind}.png"
    DRAW[kind](runs, title, plot)
    console.print(
        f"{tables.of_seeds(runs)} λ_max on "
        f"{document['config']['curvature_examples']} training images.\n"
        f"Results: {path}   Plot: {plot}   Wall time: {document['wall_time_s']:.0f} s"
    )


def _check(config: Config) -> None:
    """Raises UserError where the network or the batch does not fit an option."""
    model = registry.model(config.model, 10, config.resolution)
    if config.label_noise > 1:
        raise UserError(
            f"--label-noise {config.label_noise:g} is a share of the labels; use at "
            "most 1"
        )
    names = config.plan.get("tables", ())
    has_norms = "train" in signature(type(model).__call__).parameters
    if "norms" in names and not has_norms:
        raise UserError(
            f"--tables norms: {config.model} has no batch normalisation; use norm_cnn, "
            "resnet18 or efficientnet_lite0"
        )
    if "parts" in names and has_norms:
        raise UserError(
            f"--tables parts: {config.model} normalises by the batch, which has no "
            "parts then; use mlp, or another without"
        )
    if "parts" in names and config.batch_size % PARTS[-1]:
        raise UserError(
            f"--batch-size {config.batch_size} cannot be cut into {PARTS[-1]} parts; "
            "use a multiple"
        )


def _protocol(
    config: Config, dataset: Dataset, weights: Pretrained | None
) -> dict[str, Any]:
    examples = len(dataset.train_images)
    return {
        **config._asdict(),
        "data_dir": config.data_dir and str(config.data_dir),
        "out": str(config.out),
        "pretrained": weights and weights.record(),
        **loop.protocol(dataset, config.base_optimizer, config.weight_decay),
        "curvature_examples": min(examples, config.curvature_examples),
        "look_examples": min(examples, config.curvature_examples, LOOK_EXAMPLES),
        "curvature_tolerance": TOLERANCE,
        "alignment_batches": measures.ALIGNMENT_BATCHES,
    }


def _records(
    do: Do, plan: Plan, runs: list[Record], console: Console
) -> Iterator[Record]:
    """The records that `runs` lacks; of a job that is done, another row's is copied."""
    known = {_place(run["table"], run["row"], run): run for run in runs}
    done: dict[Job, Record] = {}
    total = sum(1 for _ in plan(_Anything()))
    with progress.shown(console) as bar:
        task = bar.add_task("", total=total)
        for table, row, job in plan(done):
            bar.update(task, description=f"{table}: {row}, seed {job.seed}")
            found = known.get(_place(table, row, job.record))
            if found is None:
                figures = done.get(job) or do(job)
                found = {"table": table, "row": row, **figures}
                found |= {"table": table, "row": row}
                yield found
            done[job] = found
            bar.advance(task)


def _place(table: str, row: str, run: Record) -> tuple[Any, ...]:
    """What tells a record from all others: its place, and what was run."""
    return table, row, *(run.get(key, usual) for key, usual in _JOB.items())


class _Anything(dict[Job, Record]):
    """A record of every job, to count a plan's jobs without running them."""

    def __missing__(self, job: Job) -> Record:
        return defaultdict(float)


def make_runs(config: Config, dataset: Dataset, weights: Pretrained | None) -> Do:
    """Builds what does a job; one that has a checkpoint goes on from there.

    A candidate that diverges counts as the worst: no image is classified correctly.
    """
    path = config.out / CHECKPOINT
    unfinished = checkpoints.read(path) or {}

    @cache
    def run_of(
        rate: float, tuning: bool, longer: float
    ) -> tuple[loop.Run[Measurement], int]:
        """What trains, which jobs of the same rate and data share, and its steps."""
        used = load.for_tuning(dataset) if tuning else dataset
        steps = loop.num_steps(used, config.batch_size, config.epochs)
        steps = round(longer * steps)
        settings = loop.Settings(
            *(steps, config.batch_size, rate),
            looks=loop.evaluation_steps(steps, 1 if tuning else config.looks)[1:],
            augment=registry.augmentation(config.dataset, config.augment),
            begin=weights and weights.begin,
            base=config.base_optimizer,
            weight_decay=config.weight_decay,
        )
        model = registry.model(config.model, dataset.num_classes, config.resolution)
        few = min(LOOK_EXAMPLES, config.curvature_examples)
        matvec_at = measures.make_matvec(losses.cross_entropy(model))
        look, end = (
            measures.make_measure(
                *(model, used, config.batch_size, examples),
                matvec_at=matvec_at,
                tolerance=TOLERANCE,
                loss_examples=loss_examples,
            )
            for examples, loss_examples in (
                (few, LOOK_EXAMPLES),
                (few if tuning else config.curvature_examples, None),
            )
        )

        def measure(
            setup: Setup, state: TrainState, start: PyTree | None
        ) -> tuple[Measurement, PyTree]:
            return (end if int(state.step) == steps else look)(setup, state, start)

        return loop.make_run(model, used, measure, settings), steps

    def figures(job: Job) -> Record:
        curves: Curves = {"step": [], "radius": []}
        curves |= {key: [] for key in Measurement._fields}
        saved = None
        if unfinished.get("job") == job.record:
            curves, saved = unfinished["curves"], unfinished["progress"]
        run, steps = run_of(job.learning_rate, job.tuning, job.longer)
        for point in run(job.method, job.seed, saved):
            looked = {**point._asdict(), **point.measurement._asdict()}
            for key, curve in curves.items():
                curve.append(looked[key])
            if point.step < steps:
                progress = serialization.to_state_dict(point.progress)
                state = {"job": job.record, "curves": curves, "progress": progress}
                checkpoints.write(path, state)
        return {
            "gradients": job.method.gradients(steps),
            "training_time_s": point.progress.seconds,
            **{key: curve[-1] for key, curve in curves.items()},
            "alignment": float(np.mean(curves["alignment"])),
            "curves": curves,
        }

    def do(job: Job) -> Record:
        try:
            found: Record = results.rounded(figures(job))
            return job.record | found
        except loop.DivergedError as error:
            if not job.tuning:
                raise
            return job.record | {"test_accuracy": 0.0, "diverged": str(error)}

    return do
