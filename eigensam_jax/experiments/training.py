"""Training runs: steps on the device, and what is measured between them."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import serialization

from eigensam_jax import eigen_sam, sam, trackers
from eigensam_jax.experiments import training_steps
from eigensam_jax.experiments.augmentation import Augment
from eigensam_jax.experiments.data import Dataset
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.measures import training_loss
from eigensam_jax.experiments.training_steps import Begin, TrainState
from eigensam_jax.tree_math import PyTree

MOMENTUM = 0.9
NUM_ITERS = 5
UPDATE_INTERVAL = 100

Measurement = TypeVar("Measurement")


class Settings(NamedTuple):
    """What all runs of a comparison share.

    Attributes:
      epochs: passes over the training set.
      batch_size: examples a step; what is left over at the end of an epoch is dropped.
      learning_rate: of SGD with momentum 0.9, decayed to zero by a cosine.
      alpha: α of Eigen-SAM.
      evaluations: how often to measure, evenly spread over the steps, the end included.
      augment: what is done to the images of each step, before both gradients; None for
        nothing.
      begin: what a network's new variables are exchanged for before the first step;
        None to keep them.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    alpha: float
    evaluations: int
    augment: Augment | None = None
    begin: Begin | None = None


class Progress(NamedTuple):
    """All that the rest of a run depends on.

    Attributes:
      state: after the steps so far.
      top: what `measure` returned second the last time.
      seconds: wall time of the steps so far.
    """

    state: TrainState
    top: Any
    seconds: float


class Point(NamedTuple, Generic[Measurement]):
    """Where a run is, between its first step and its last.

    Attributes:
      step: steps so far.
      radius: the mean of ‖ε‖ over them.
      step_time_ms: their mean wall time, refreshes included, compilation not.
      measurement: what `make_run` was given to measure, of the network as it is now.
      progress: from where the run goes on; given away for the next point.
    """

    step: int
    radius: float
    step_time_ms: float
    measurement: Measurement
    progress: Progress


class Run(Protocol[Measurement]):
    """Trains from a seed."""

    def __call__(
        self, seed: int, saved: dict[str, Any] | None = None
    ) -> Iterator[Point[Measurement]]:
        """Yields the points of the run; of one that was `saved`, the points to come.

        `saved` is what `checkpoints.read` found of the `Progress` of a point.
        """


Measure = Callable[
    [PyTree, optax.OptState, jax.Array, Any, PyTree], tuple[Measurement, Any]
]


def check_batch_size(batch_size: int, name: str, dataset: Dataset) -> None:
    """Raises UserError where the training set is less than a batch."""
    examples = len(dataset.train_images)
    if batch_size > examples:
        raise UserError(
            f"--batch-size {batch_size} is more than the {examples} training images of "
            f"{name}; use at most {examples}"
        )


def protocol(dataset: Dataset) -> dict[str, Any]:
    """What a results file says of the training beside the options of the command."""
    return {
        "momentum": MOMENTUM,
        "schedule": "cosine to 0",
        "num_iters": NUM_ITERS,
        "update_interval": UPDATE_INTERVAL,
        "train_examples": len(dataset.train_images),
        "test_examples": len(dataset.test_images),
    }


def evaluation_steps(total_steps: int, evaluations: int) -> list[int]:
    """The steps after which to measure: none, and `evaluations` or all, to the end."""
    evaluations = min(evaluations, total_steps)
    return [k * total_steps // evaluations for k in range(evaluations + 1)]


def sgd(learning_rate: float, total_steps: int) -> optax.GradientTransformation:
    """SGD with momentum and a cosine schedule to zero."""
    schedule = optax.cosine_decay_schedule(learning_rate, total_steps)
    return optax.sgd(schedule, momentum=MOMENTUM)


def make_optimizer(
    name: str, rho: float, total_steps: int, settings: Settings
) -> optax.GradientTransformationExtraArgs:
    """SGD with momentum and a cosine schedule, after `sam`, `eigen_sam` or neither."""
    descent = sgd(settings.learning_rate, total_steps)
    if name == "sgd":
        return optax.with_extra_args_support(descent)
    if name == "eigen_sam":
        tracker = trackers.power_iteration(NUM_ITERS, UPDATE_INTERVAL)
        return optax.chain(eigen_sam(rho, settings.alpha, tracker), descent)
    return optax.chain(sam(rho), descent)


def restored(example: TrainState, saved: dict[str, Any]) -> Progress:
    """The `Progress` that was saved, with arrays that can be given away."""
    progress: Progress = serialization.from_state_dict(
        Progress(example, None, 0.0), saved
    )
    return progress._replace(state=jax.tree.map(jnp.array, progress.state))


def make_run(
    model: nn.Module,
    dataset: Dataset,
    measure: Measure[Measurement],
    name: str,
    rho: float,
    settings: Settings,
) -> Run[Measurement]:
    """Compiles the training of one optimizer; the result trains it from a seed.

    `measure` is called at every evaluation, with the parameters, the optimizer's state,
    the order of the examples, what it returned second the last time, at first None, and
    the running statistics. All are given away afterwards: it must copy what it keeps.

    The steps are dispatched one by one, without waiting for any: between evaluations
    nothing is pulled to the host and nothing is sent to the device. Whether a step
    refreshes the eigenvector is known here, so it is fixed at trace time, and each of
    the two programs is free of branches and loops (which XLA's CPU backend runs slowly
    where convolutions are inside).
    """
    images, labels = dataset.train_images, dataset.train_labels
    steps_per_epoch = len(images) // settings.batch_size
    total_steps = steps_per_epoch * settings.epochs
    tx = make_optimizer(name, rho, total_steps, settings)
    loss, augment = training_loss(model), settings.augment

    def init(seed: int) -> TrainState:
        return training_steps.start(model, tx, images, seed, settings.begin)

    def step(
        refresh: bool, state: TrainState, images: jax.Array, labels: jax.Array
    ) -> TrainState:
        batch = training_steps.next_batch(state, settings.batch_size)
        examples = images[batch]
        if augment is not None:
            examples = augment(training_steps.step_key(state), examples)
        return training_steps.take_step(
            tx, loss, state, examples, labels[batch], refresh
        )

    example = jax.eval_shape(init, 0)
    shuffle = training_steps.compile_donating(training_steps.start_epoch, example)
    plain = training_steps.compile_donating(
        partial(step, False), example, images, labels
    )
    refreshing = plain
    if name == "eigen_sam":
        refreshing = training_steps.compile_donating(
            partial(step, True), example, images, labels
        )

    def run(
        seed: int, saved: dict[str, Any] | None = None
    ) -> Iterator[Point[Measurement]]:
        stops, done = evaluation_steps(total_steps, settings.evaluations), 0
        if saved is None:
            state, top, seconds = init(seed), None, 0.0
        else:
            state, top, seconds = restored(example, saved)
            done = int(state.step)
            stops = [stop for stop in stops if stop > done]
        for stop in stops:
            began = time.perf_counter()
            with jax.transfer_guard("disallow"):
                for i in range(done, stop):
                    if i % steps_per_epoch == 0:
                        state = shuffle(state)
                    program = refreshing if i % UPDATE_INTERVAL == 0 else plain
                    state = program(state, images, labels)
                state.step.block_until_ready()
            seconds, done = seconds + time.perf_counter() - began, stop
            try:
                measurement, top = measure(
                    *(state.params, state.opt_state, state.order, top),
                    state.batch_stats,
                )
            except FloatingPointError as error:
                raise UserError(
                    f"{name}, seed {seed}: {error} after {done} steps; lower "
                    f"--learning-rate (now {settings.learning_rate:g}) or --rho (now "
                    f"{rho:g})"
                ) from error
            steps = max(done, 1)
            radius = float(state.radius_sum) / steps
            progress = Progress(state, top, seconds)
            yield Point(done, radius, 1e3 * seconds / steps, measurement, progress)

    return run
