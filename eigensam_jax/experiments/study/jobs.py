"""The jobs of a study: training runs, continued from a checkpoint if there is one."""

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import serialization

from eigensam_jax.experiments import registry
from eigensam_jax.experiments.data import load
from eigensam_jax.experiments.data.load import Dataset
from eigensam_jax.experiments.models.pretrained import Pretrained
from eigensam_jax.experiments.records import checkpoints, results, resumption
from eigensam_jax.experiments.study.plans import Job, Record
from eigensam_jax.experiments.training import loop, losses, measures, validation
from eigensam_jax.experiments.training.measures import Measurement
from eigensam_jax.experiments.training.methods import Setup
from eigensam_jax.experiments.training.steps import TrainState
from eigensam_jax.tree_math import PyTree

LOOK_EXAMPLES = 1_000
TOLERANCE = 1e-2
CHECKPOINT = "checkpoint.msgpack"
_OF_LOOKS = {"step", "radius", "held_loss"}  # known at each, of the weights then
_NOT_OF_TRIALS = ("train_loss", "lambda_max", "lambda_max_residual", "alignment")

Curves = dict[str, list[Any]]
Say = Callable[[str, float], object]  # what a job does, and its share that is done
Do = Callable[[Job, Say], Record]


class Config(NamedTuple):
    """What all runs share (see the commands' help), and the options of the `plan`."""

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


def make_runs(
    config: Config, dataset: Dataset, weights: Pretrained | None, described: Record
) -> Do:
    """Builds the function that does a job, from its checkpoint if there is one.

    A candidate that diverges counts as the worst: its test accuracy is 0. UserError is
    raised for a checkpoint of runs that `described` does not describe.
    """
    path = config.out / CHECKPOINT
    unfinished = resumption.unfinished(path, described)

    @cache
    def data_of(tuning: bool) -> Dataset:
        used = load.for_tuning(dataset) if tuning else dataset
        return load.first(used, config.train_examples)

    @cache
    def run_of(rate: float, tuning: bool, longer: float) -> tuple[loop.Run[Any], int]:
        """The training and its steps, shared by jobs of the same rate and data."""
        used = data_of(tuning)
        steps = loop.num_steps(used, config.batch_size, config.epochs)
        steps = round(longer * steps)
        is_short = tuning and dataset.held_images is None  # else the best look counts
        settings = loop.Settings(
            *(steps, config.batch_size, rate),
            looks=loop.evaluation_steps(steps, 1 if is_short else config.looks)[1:],
            augment=registry.augmentation(config.dataset, config.augment),
            base=config.base_optimizer,
            weight_decay=config.weight_decay,
        )
        model = registry.model(config.model, dataset.num_classes, config.resolution)
        make_measure = partial(
            measures.make_measure,
            *(model, used, config.batch_size),
            matvec_at=measures.make_matvec(losses.evaluation_loss(model)),
        )
        few = min(LOOK_EXAMPLES, config.curvature_examples)
        look = make_measure(few, tolerance=TOLERANCE, loss_examples=LOOK_EXAMPLES)
        end = make_measure(config.curvature_examples, tolerance=TOLERANCE)
        alive = make_measure(
            min(few, measures.CHUNK),
            tolerance=1.0,
            loss_examples=LOOK_EXAMPLES,
            batches=0,
        )

        def measure(
            setup: Setup, state: TrainState, start: PyTree | None
        ) -> tuple[Measurement, PyTree]:
            if tuning:  # three products tell whether the Hessian is zero
                return alive(setup, state, None)
            return (end if int(state.step) == steps else look)(setup, state, start)

        at_look: loop.Measure[Any] = measure
        if dataset.held_images is not None:
            whole, means = alive if tuning else end, measures.make_means(model)
            at_look = validation.at_best(whole, means, used, steps)
        return loop.make_run(model, used, at_look, settings), steps

    def figures(job: Job, say: Say) -> Record:
        curves: Curves = {"step": [], "radius": []}
        curves |= {key: [] for key in Measurement._fields}
        saved = None
        if unfinished.get("job") == job.record:
            curves, saved = unfinished["curves"], unfinished["progress"]
        run, steps = run_of(job.learning_rate, job.tuning, job.longer)
        begin = weights and weights.begin
        loss, share = "", 0.0
        tell = lambda doing: say(doing + loss, share)
        for point in run(job.method, job.seed, saved, begin, tell):
            looked = {**point._asdict(), **point.measurement._asdict()}
            shown = looked.get("train_loss", looked["held_loss"])
            loss, share = f", loss {shown:.3g}", point.step / steps
            for key, curve in curves.items():
                curve.append(looked.get(key))
            if point.step < steps:
                progress = serialization.to_state_dict(point.progress)
                kept = {"job": job.record, "curves": curves, "progress": progress}
                checkpoints.write(path, {"described": json.dumps(described), **kept})
        held = curves["held_loss"]
        at = -1 if None in held else int(np.argmin(held))  # else at all looks
        if None in held:
            del curves["held_loss"]
        chosen = {key: curves[key][at] for key in _OF_LOOKS & curves.keys()}
        aligned = [x for x in curves["alignment"] if x is not None]
        found = {
            "gradients": job.method.gradients(steps),
            "training_time_s": point.progress.seconds,
            **{key: curve[-1] for key, curve in curves.items()},
            **chosen,
            "alignment": float(np.mean(aligned)),
        }
        if found["test_accuracy"] is None:
            del found["test_accuracy"]
        if job.tuning:
            return {key: x for key, x in found.items() if key not in _NOT_OF_TRIALS}
        del curves["lambda_max_residual"]
        return found | {"curves": {k: x for k, x in curves.items() if None not in x}}

    def do(job: Job, say: Say) -> Record:
        try:
            found: Record = results.rounded(figures(job, say))
            return job.record | found
        except loop.DivergedError as error:
            if not job.tuning:
                raise
            return job.record | {"test_accuracy": 0.0, "diverged": str(error)}

    return do
