"""What does the jobs of a plan: one run, from its checkpoint where it has one."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import serialization

from eigensam_jax.experiments.data import augmentation
from eigensam_jax.experiments.data import load as data
from eigensam_jax.experiments.data.load import Dataset
from eigensam_jax.experiments.models import small as models
from eigensam_jax.experiments.models.pretrained import Pretrained
from eigensam_jax.experiments.records import checkpoints
from eigensam_jax.experiments.study.plans import Job, Record
from eigensam_jax.experiments.training import loop as training
from eigensam_jax.experiments.training import losses, measures
from eigensam_jax.experiments.training.measures import Measurement
from eigensam_jax.experiments.training.methods import Method
from eigensam_jax.experiments.training.steps import TrainState

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
      train_examples: how many of the training images there are; None for all.
      pretrained: the file of what the network begins from; None for nothing.
      resolution: height and width that the network resizes images to; None for its own.
      curvature_examples: training images that λ_max is taken on at the end.
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
    train_examples: int | None
    pretrained: Path | None
    resolution: int | None
    curvature_examples: int


class Runner:
    """Does a job; one that has a checkpoint goes on from there.

    A candidate that diverges counts as the worst: no image is classified correctly.
    """

    def __init__(self, config: Config, dataset: Dataset, weights: Pretrained | None):
        self.config, self.dataset, self.weights = config, dataset, weights
        self.unfinished = checkpoints.read(config.out / CHECKPOINT) or {}
        self.runs: dict[tuple[float, bool], tuple[training.Run[Look], int]] = {}

    def __call__(self, job: Job) -> Record:
        """The record of a job."""
        described = {
            "method": job.method._asdict(),
            "learning_rate": job.learning_rate,
            "seed": job.seed,
            "tuning": job.tuning,
        }
        try:
            return described | self._figures(job)
        except training.DivergedError as error:
            if not job.tuning:
                raise
            return described | {"test_accuracy": 0.0, "diverged": str(error)}

    def _figures(self, job: Job) -> Record:
        curves: Curves = {"step": [], "radius": []}
        curves |= {key: [] for key in Measurement._fields}
        saved = None
        if self.unfinished.get("job") == str(job):
            curves, saved = self.unfinished["curves"], self.unfinished["progress"]
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
                checkpoints.write(self.config.out / CHECKPOINT, state)
        return {
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
            dataset = data.for_tuning(self.dataset) if job.tuning else self.dataset
            settings = training.Settings(
                config.epochs,
                config.batch_size,
                job.learning_rate,
                1 if job.tuning else config.looks,
                augmentation.of(config.dataset, config.augment),
                self.weights and self.weights.begin,
            )
            classes = self.dataset.num_classes
            model = models.make(config.model, classes, config.resolution)
            steps = training.num_steps(dataset, config.batch_size, config.epochs)
            at_look = min(LOOK_EXAMPLES, config.curvature_examples)
            at_end = at_look if job.tuning else config.curvature_examples
            measure = _make_measure(model, dataset, settings, at_look, at_end, steps)
            run = training.make_run(model, dataset, measure, settings)
            self.runs[key] = run, steps
        return self.runs[key]


def _make_measure(
    model: nn.Module,
    dataset: Dataset,
    settings: training.Settings,
    at_look: int,
    at_end: int,
    steps: int,
) -> training.Measure[Look]:
    """What looks at a network: nothing at the start, closely at the end only."""
    loss = losses.cross_entropy(model)
    top = measures.make_top_eigenpair(loss, _NUM_VECTORS, TOLERANCE)
    make = partial(measures.make_measure, model, dataset, settings.batch_size)
    look, end = make(at_look, top, LOOK_EXAMPLES), make(at_end, top)

    def measure(
        method: Method, state: TrainState, start: Any
    ) -> tuple[Look, jax.Array | None]:
        step = int(state.step)
        if step == 0:
            return None, None
        return (end if step == steps else look)(method, state, start)

    return measure
