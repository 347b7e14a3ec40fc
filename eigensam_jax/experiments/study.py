"""`eigensam accuracy` and `eigensam ablate`: many runs of one network, by a plan."""

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from rich.console import Console

from eigensam_jax.experiments import (
    augmentation,
    checkpoints,
    data,
    losses,
    measures,
    results,
    resumption,
    study_plots,
    study_tables,
    tables,
    training,
)
from eigensam_jax.experiments.data import Dataset
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.measures import Measurement
from eigensam_jax.experiments.methods import Method
from eigensam_jax.experiments.models import MODELS
from eigensam_jax.experiments.plans import PARTS, Job, Plan, Record
from eigensam_jax.experiments.training_steps import TrainState

CURVATURE_EXAMPLES = 5_000
LOOK_EXAMPLES = 1_000
TOLERANCE = 1e-2
CHECKPOINT = "checkpoint.msgpack"
_NUM_VECTORS = 8  # of the search for the top eigenvector

Look = Measurement | None
Curves = dict[str, list[Any]]


class Config(NamedTuple):
    """What all runs share, and what the results file says of the plan.

    Attributes:
      dataset: a key of `data.LOADERS`.
      data_dir: the folder with its files.
      model: a key of `models.MODELS`.
      epochs: of each run.
      batch_size: of each step.
      augment: whether training images are changed at random, where that is usual.
      label_noise: the share of training labels that are drawn anew.
      looks: how often the network is measured on the way, the end included.
      plan: the options of the plan.
      out: where results go.
      file: the name of the results file.
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
    file: str


def run(config: Config, plan: Plan, command: str, console: Console) -> None:
    """Does the runs that are missing; leaves a results file and a plot in `config.out`.

    The results file is brought up to date after each run, and a run in progress has a
    checkpoint after every look. Whatever ends the command, the same one goes on.

    Args:
      config: what all runs share.
      plan: what to run.
      command: the command line, for the results file.
      console: where progress and the tables go.

    Raises:
      UserError: for what can't be run, before any training; or when a run diverges.
      KeyboardInterrupt: passed on, with the finished runs on disk.
    """
    _check_tables(config)
    dataset = data.load(config.dataset, config.data_dir)
    training.check_batch_size(config.batch_size, config.dataset, dataset)
    results.make_folder(config.out)
    path = config.out / config.file
    document = resumption.of_runs(path, command, _protocol(config, dataset))
    missing = _records(config, dataset, plan, document["runs"], console)
    resumption.add_runs(path, document, missing, lambda runs: runs, console)
    (config.out / CHECKPOINT).unlink(missing_ok=True)
    runs, title = document["runs"], f"{config.dataset}, {config.model}"
    for table in study_tables.all_tables(runs, title):
        console.print(table)
    is_main = any(run["table"] == "main" for run in runs)
    draw = study_plots.accuracy if is_main else study_plots.ablations
    plot = config.out / ("accuracy.png" if is_main else "ablate.png")
    draw(runs, title, plot)
    console.print(
        "Means over seeds with 95% intervals; differences are paired by seed. "
        "gradients: evaluations a step, a product counted as two. λ_max on "
        f"{document['config']['curvature_examples']} training images.\n"
        f"Results: {path}   Plot: {plot}   Wall time: {document['wall_time_s']:.0f} s"
    )


def with_label_noise(dataset: Dataset, share: float) -> Dataset:
    """A `share` of the training labels, drawn anew from all classes alike."""
    rng = np.random.default_rng(0)
    labels = np.asarray(dataset.train_labels)
    drawn = rng.integers(0, dataset.num_classes, len(labels), labels.dtype)
    noisy = np.where(rng.random(len(labels)) < share, drawn, labels)
    return dataset._replace(train_labels=jnp.asarray(noisy))


def for_tuning(dataset: Dataset) -> Dataset:
    """Nine tenths of the training set; the last tenth, drawn at random, is the test."""
    order = np.random.default_rng(0).permutation(len(dataset.train_labels))
    kept, held = np.split(order, [len(order) * 9 // 10])
    images, labels = dataset.train_images, dataset.train_labels
    return Dataset(images[kept], labels[kept], images[held], labels[held])


def _check_tables(config: Config) -> None:
    """Raises UserError where the network or the batch does not fit an option."""
    if config.label_noise > 1:
        raise UserError(
            f"--label-noise {config.label_noise:g} is a share of the labels; use at "
            "most 1"
        )
    names, model = config.plan.get("tables", ()), MODELS[config.model](10)
    has_norms = "train" in signature(type(model).__call__).parameters
    if "norms" in names and not has_norms:
        raise UserError(
            f"--tables norms: {config.model} has no batch normalisation; use norm_cnn "
            "or resnet18"
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


def _protocol(config: Config, dataset: Dataset) -> dict[str, Any]:
    examples = len(dataset.train_images)
    return {
        **config._asdict(),
        "data_dir": config.data_dir and str(config.data_dir),
        "out": str(config.out),
        **training.protocol(dataset),
        "curvature_examples": min(examples, CURVATURE_EXAMPLES),
        "look_examples": min(examples, LOOK_EXAMPLES),
        "curvature_tolerance": TOLERANCE,
        "alignment_batches": measures.ALIGNMENT_BATCHES,
    }


def _records(
    config: Config,
    dataset: Dataset,
    plan: Plan,
    runs: list[Record],
    console: Console,
) -> Iterator[Record]:
    """The records that `runs` lacks; of a job that is done, another row's is copied."""
    known = {(run["table"], run["row"], run["job"]): run for run in runs}
    done: dict[Job, Record] = {}
    total = sum(1 for _ in plan(_Anything()))
    trainer = _Trainer(config, with_label_noise(dataset, config.label_noise))
    with tables.progress_bar(console) as progress:
        task = progress.add_task("", total=total)
        for table, row, job in plan(done):
            progress.update(task, description=f"{table}: {row}, seed {job.seed}")
            key = str(job)
            found = known.get((table, row, key))
            if found is None:
                figures = done.get(job) or trainer(job)
                found = {**figures, "table": table, "row": row, "job": key}
                yield found
            done[job] = found
            progress.advance(task)


class _Anything(dict[Job, Record]):
    """A record of every job, to count a plan's jobs without running them."""

    def __missing__(self, job: Job) -> Record:
        return defaultdict(float)


class _Trainer:
    """Does a job; one that has a checkpoint goes on from there."""

    def __init__(self, config: Config, dataset: Dataset):
        self.config, self.dataset = config, dataset
        self.runs: dict[tuple[float, bool], tuple[training.Run[Look], int]] = {}

    def __call__(self, job: Job) -> Record:
        path = self.config.out / CHECKPOINT
        found = checkpoints.read(path) or {}
        curves: Curves = {"step": [], "radius": []}
        curves |= {key: [] for key in Measurement._fields}
        saved = None
        if found.get("job") == str(job):
            curves, saved = found["curves"], found["progress"]
        run, total_steps = self._run_of(job)
        for point in run(job.method, job.seed, saved):
            if point.measurement is None:
                continue
            looked = {**point._asdict(), **point.measurement._asdict()}
            for key, curve in curves.items():
                curve.append(looked[key])
            if point.step < total_steps:
                progress = serialization.to_state_dict(point.progress)
                state = {"job": str(job), "curves": curves, "progress": progress}
                checkpoints.write(path, state)
        return {
            "method": job.method._asdict(),
            "learning_rate": job.learning_rate,
            "seed": job.seed,
            "tuning": job.tuning,
            "gradients": job.method.gradients(total_steps),
            "training_time_s": point.progress.seconds,
            **{key: curve[-1] for key, curve in curves.items()},
            "alignment": float(np.mean(curves["alignment"])),
            "curves": curves,
        }

    def _run_of(self, job: Job) -> tuple[training.Run[Look], int]:
        """What trains, which jobs of the same rate and data share, and its steps."""
        key = (job.learning_rate, job.tuning)
        if key not in self.runs:
            config = self.config
            dataset = for_tuning(self.dataset) if job.tuning else self.dataset
            settings = training.Settings(
                config.epochs,
                config.batch_size,
                job.learning_rate,
                1 if job.tuning else config.looks,
                augmentation.of(config.dataset, config.augment),
            )
            model = MODELS[config.model](self.dataset.num_classes)
            steps = len(dataset.train_labels) // config.batch_size * config.epochs
            measure = _make_measure(model, dataset, settings, job.tuning, steps)
            run = training.make_run(model, dataset, measure, settings)
            self.runs[key] = run, steps
        return self.runs[key]


def _make_measure(
    model: nn.Module,
    dataset: Dataset,
    settings: training.Settings,
    tuning: bool,
    steps: int,
) -> training.Measure[Look]:
    """What looks at a network: nothing at the start, closely at the end only."""
    loss = losses.cross_entropy(model)
    top = measures.make_top_eigenpair(loss, _NUM_VECTORS, TOLERANCE)
    make = partial(measures.make_measure, model, dataset, settings.batch_size)
    look = make(LOOK_EXAMPLES, top, LOOK_EXAMPLES)
    end = make(LOOK_EXAMPLES if tuning else CURVATURE_EXAMPLES, top)

    def measure(
        method: Method, state: TrainState, start: Any
    ) -> tuple[Look, jax.Array | None]:
        step = int(state.step)
        if step == 0:
            return None, None
        return (end if step == steps else look)(method, state, start)

    return measure
