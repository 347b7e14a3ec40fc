"""Training runs: steps on the device, and what is measured between them."""

import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import serialization

from eigensam_jax.experiments.data.augmentation import Augment
from eigensam_jax.experiments.data.load import Dataset
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.training import methods
from eigensam_jax.experiments.training import steps as training_steps
from eigensam_jax.experiments.training.losses import cross_entropy, training_loss
from eigensam_jax.experiments.training.methods import Method
from eigensam_jax.experiments.training.steps import Begin, TrainState

Measurement = TypeVar("Measurement")


class DivergedError(UserError):
    """A run whose loss is not finite."""


class Settings(NamedTuple):
    """What all runs of a comparison share.

    Attributes:
      epochs: passes over the training set.
      batch_size: examples a step; what is left over at the end of an epoch is dropped.
      learning_rate: of SGD with momentum 0.9, decayed to zero by a cosine.
      evaluations: how often to measure, evenly spread over the steps, the end included.
      augment: what is done to the images of each step, before both gradients; None for
        nothing.
      begin: what a network's new variables are exchanged for before the first step;
        None to keep them.
    """

    epochs: int
    batch_size: int
    learning_rate: float
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
      radius: the mean of ‖ε‖ over those of them that perturb.
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
    """Trains by a method from a seed."""

    def __call__(
        self, method: Method, seed: int, saved: dict[str, Any] | None = None
    ) -> Iterator[Point[Measurement]]:
        """Yields the points of the run; of one that was `saved`, the points to come.

        `saved` is what `checkpoints.read` found of the `Progress` of a point.
        """


Measure = Callable[[Method, TrainState, Any], tuple[Measurement, Any]]


def check_batch_size(batch_size: int, name: str, examples: int) -> None:
    """Raises UserError where so many training images are less than a batch."""
    if batch_size > examples:
        raise UserError(
            f"--batch-size {batch_size} is more than the {examples} training images of "
            f"{name}; use at most {examples}"
        )


def protocol(dataset: Dataset) -> dict[str, Any]:
    """What a results file says of the training beside the options of the command."""
    return {
        "momentum": methods.MOMENTUM,
        "schedule": "cosine to 0",
        "train_examples": len(dataset.train_images),
        "test_examples": len(dataset.test_images),
    }


def num_steps(dataset: Dataset, batch_size: int, epochs: int) -> int:
    """The steps of a run: what is left over of an epoch makes none."""
    return len(dataset.train_labels) // batch_size * epochs


def evaluation_steps(total_steps: int, evaluations: int) -> list[int]:
    """The steps after which to measure: none, and `evaluations` or all, to the end."""
    evaluations = min(evaluations, total_steps)
    return [k * total_steps // evaluations for k in range(evaluations + 1)]


def sgd(learning_rate: float, total_steps: int) -> optax.GradientTransformation:
    """SGD with momentum and a cosine schedule to zero."""
    schedule = optax.cosine_decay_schedule(learning_rate, total_steps)
    return optax.sgd(schedule, momentum=methods.MOMENTUM)


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
    settings: Settings,
) -> Run[Measurement]:
    """The training of a network by any method, from any seed.

    `measure` is called at every evaluation, with the method, the state, and what it
    returned second the last time, at first None. The state is given away afterwards: it
    must copy what it keeps.

    The steps are dispatched one by one, without waiting for any: between evaluations
    nothing is pulled to the host and nothing is sent to the device. Whether a step
    perturbs, and whether it refreshes the eigenvector, is known here, so it is fixed at
    trace time, and each of the programs is free of branches and loops (which XLA's CPU
    backend runs slowly where convolutions are inside). ρ and α are their arguments, so
    that methods that differ in these alone share them.
    """
    images, labels = dataset.train_images, dataset.train_labels
    steps_per_epoch = len(images) // settings.batch_size
    steps = num_steps(dataset, settings.batch_size, settings.epochs)
    descent = sgd(settings.learning_rate, steps)
    loss, augment = training_loss(model), settings.augment

    def init(method: Method, seed: int) -> TrainState:
        tx = methods.make_optimizer(method, descent)
        return training_steps.start(model, tx, images, seed, settings.begin)

    def step(
        structure: Method,
        acts: bool,
        refresh: bool,
        state: TrainState,
        images: jax.Array,
        labels: jax.Array,
        rho: jax.Array,
        alpha: jax.Array,
    ) -> TrainState:
        method = structure._replace(rho=rho, alpha=alpha)
        tx = methods.make_optimizer(method, descent, acts)
        batch = training_steps.next_batch(state, settings.batch_size)
        examples = images[batch]
        if augment is not None:
            examples = augment(training_steps.step_key(state), examples)
        return training_steps.take_step(
            *(tx, loss, state, examples, labels[batch]),
            *(refresh, method.parts, acts),
            cross_entropy(model),
        )

    @cache
    def program(structure: Method, acts: bool, refresh: bool) -> Any:
        example, scalar = jax.eval_shape(partial(init, structure), 0), jnp.zeros(())
        return training_steps.compile_donating(
            partial(step, structure, acts, refresh),
            *(example, images, labels, scalar, scalar),
        )

    @cache
    def shuffle(structure: Method) -> Any:
        example = jax.eval_shape(partial(init, structure), 0)
        return training_steps.compile_donating(training_steps.start_epoch, example)

    def run(
        method: Method, seed: int, saved: dict[str, Any] | None = None
    ) -> Iterator[Point[Measurement]]:
        start_epoch = shuffle(method.structure)
        kinds = [
            (acts, acts and method.refreshes(i, steps))
            for i in range(steps)
            for acts in (method.acts(i, steps),)
        ]
        programs = {kind: program(method.structure, *kind) for kind in set(kinds)}
        scalars = jnp.float32(method.rho), jnp.float32(method.alpha)
        stops, done = evaluation_steps(steps, settings.evaluations), 0
        if saved is None:
            state, top, seconds = init(method, seed), None, 0.0
        else:
            example = jax.eval_shape(partial(init, method), 0)
            state, top, seconds = restored(example, saved)
            done = int(state.step)
            stops = [stop for stop in stops if stop > done]
        for stop in stops:
            began = time.perf_counter()
            with jax.transfer_guard("disallow"):
                for i in range(done, stop):
                    if i % steps_per_epoch == 0:
                        state = start_epoch(state)
                    state = programs[kinds[i]](state, images, labels, *scalars)
                state.step.block_until_ready()
            seconds, done = seconds + time.perf_counter() - began, stop
            try:
                measurement, top = measure(method, state, top)
            except FloatingPointError as error:
                raise DivergedError(
                    f"{method.optimizer}, seed {seed}: {error} after {done} steps; "
                    f"lower --learning-rate (now {settings.learning_rate:g}) or --rho "
                    f"(now {method.rho:g})"
                ) from error
            perturbed = sum(acts for acts, _ in kinds[:done])
            radius = float(state.radius_sum) / max(perturbed, 1)
            progress = Progress(state, top, seconds)
            yield Point(
                done, radius, 1e3 * seconds / max(done, 1), measurement, progress
            )

    return run
