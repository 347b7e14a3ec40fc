"""Training runs: steps on the device, with measurements between them."""

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
from eigensam_jax.experiments.data.load import Dataset, checksum
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.registry import BASE_OPTIMIZERS, METHODS
from eigensam_jax.experiments.training import methods
from eigensam_jax.experiments.training import steps as training_steps
from eigensam_jax.experiments.training.losses import evaluation_loss, training_loss
from eigensam_jax.experiments.training.methods import Setup
from eigensam_jax.experiments.training.steps import Begin, TrainState

Measurement = TypeVar("Measurement")


class DivergedError(UserError):
    """The loss of a run is not finite."""


class Settings(NamedTuple):
    """What all runs of a comparison share.

    Attributes:
      steps: of each run.
      batch_size: examples per step; an incomplete batch at the end of an epoch is
        dropped.
      learning_rate: initial rate of the base optimizer, decayed to zero by a cosine.
      looks: the steps after which to measure, ascending, including the last.
      augment: applied to the images of each step, before both gradients.
      base: the base optimizer of methods without their own.
      weight_decay: of the base optimizer.
    """

    steps: int
    batch_size: int
    learning_rate: float
    looks: tuple[int, ...]
    augment: Augment | None = None
    base: str = "sgd"
    weight_decay: float = 0.0


class Progress(NamedTuple):
    """Everything that the rest of a run depends on.

    Attributes:
      state: after the steps so far.
      top: the second result of the last `measure`.
      seconds: wall time of the steps so far, with refreshes but without compilation.
    """

    state: TrainState
    top: Any
    seconds: float


class Point(NamedTuple, Generic[Measurement]):
    """A run at one of its looks.

    Attributes:
      step: steps so far.
      radius: mean ‖ε‖ of the steps that perturb.
      measurement: the first result of `measure`.
      progress: where the run continues; donated on the way to the next point.
    """

    step: int
    radius: float
    measurement: Measurement
    progress: Progress


Say = Callable[[str], object]
_silent: Say = lambda text: None


class Run(Protocol[Measurement]):
    """Trains by a method from a seed."""

    def __call__(
        self,
        setup: Setup,
        seed: int,
        saved: dict[str, Any] | None = None,
        begin: Begin | None = None,
        say: Say = _silent,
    ) -> Iterator[Point[Measurement]]:
        """Yields the points of a run, or those after the `Progress` in `saved`.

        `begin` maps the network's new variables to those that training starts from.
        `say` is told what the run does: it compiles, or trains in which epoch.
        """


Measure = Callable[[Setup, TrainState, Any], tuple[Measurement, Any]]


def check_batch_size(
    batch_size: int, name: str, examples: int, is_option: bool = True
) -> None:
    """Raises UserError if a batch is larger than the training set."""
    if batch_size > examples:
        option = "--batch-size" if is_option else "a batch of"
        remedy = f"use at most {examples}" if is_option else "name a larger data set"
        raise UserError(
            f"{option} {batch_size} is more than the {examples} training images of "
            f"{name}; {remedy}"
        )


def protocol(dataset: Dataset, base: str, weight_decay: float) -> dict[str, Any]:
    """What a results file says of training beside the options of the command."""
    return {
        "base_optimizer": base,
        **BASE_OPTIMIZERS[base].constants,
        "weight_decay": weight_decay,
        "schedule": "cosine to 0",
        "train_examples": len(dataset.train_images),
        "test_examples": len(dataset.test_images),
        "data_crc32": checksum(dataset),
    }


def num_steps(dataset: Dataset, batch_size: int, epochs: int) -> int:
    """The steps of a run; the incomplete batch of an epoch is dropped."""
    return len(dataset.train_labels) // batch_size * epochs


def evaluation_steps(total_steps: int, evaluations: int) -> tuple[int, ...]:
    """Step 0 and `evaluations` more (or every step), evenly spread to the last."""
    evaluations = min(evaluations, total_steps)
    return tuple(k * total_steps // evaluations for k in range(evaluations + 1))


def restored(example: TrainState, saved: dict[str, Any]) -> Progress:
    """The saved `Progress`, in arrays that can be donated."""
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
    """Builds the training of a network, for any setup and seed.

    Each look calls `measure` with the setup, the state and the second result of the
    last call, at first None. The state is donated afterwards, so `measure` must copy
    what it keeps.

    Between looks the host neither waits for steps nor transfers data. Whether a step
    perturbs and refreshes is fixed at trace time, so programs have no branches or
    loops, in which XLA's CPU backend runs convolutions slowly. ρ and α are arguments,
    so methods that differ only in these share programs.
    """
    images, labels = dataset.train_images, dataset.train_labels
    steps_per_epoch = len(images) // settings.batch_size
    steps = settings.steps
    schedule = optax.cosine_decay_schedule(settings.learning_rate, steps)
    loss, augment = training_loss(model), settings.augment

    def optimizer(setup: Setup) -> optax.GradientTransformationExtraArgs:
        base = METHODS[setup.optimizer].base or settings.base
        descent = BASE_OPTIMIZERS[base].make(schedule, settings.weight_decay)
        return methods.make_optimizer(setup, descent)

    def init(setup: Setup, seed: int, begin: Begin | None = None) -> TrainState:
        return training_steps.start(model, optimizer(setup), images, seed, begin)

    def step(
        structure: Setup,
        acts: bool,
        refresh: bool,
        state: TrainState,
        images: jax.Array,
        labels: jax.Array,
        *scalars: jax.Array,
    ) -> TrainState:
        tx = optimizer(structure.with_scalars(scalars))
        batch = training_steps.next_batch(state, settings.batch_size)
        examples = images[batch]
        if augment is not None:
            examples = augment(training_steps.step_key(state), examples)
        return training_steps.take_step(
            *(tx, loss, state, examples, labels[batch]),
            *(refresh, structure.parts, acts),
            evaluation_loss(model),
        )

    @cache
    def program(structure: Setup, acts: bool, refresh: bool) -> Any:
        example = jax.eval_shape(partial(init, structure), 0)
        function = jax.jit(partial(step, structure, acts, refresh), donate_argnums=0)
        return function.lower(example, images, labels, *structure.scalars).compile()

    @cache
    def shuffle() -> Any:
        key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
        order = jax.eval_shape(lambda: jnp.arange(len(images)))
        function = jax.jit(training_steps.shuffled, donate_argnums=(0, 1))
        return function.lower(key, order).compile()

    def run(
        setup: Setup,
        seed: int,
        saved: dict[str, Any] | None = None,
        begin: Begin | None = None,
        say: Say = _silent,
    ) -> Iterator[Point[Measurement]]:
        kinds = [
            (acts, acts and setup.refreshes(i, steps))
            for i in range(steps)
            for acts in (setup.acts(i, steps),)
        ]
        say("compiling")
        programs = {kind: program(setup.structure, *kind) for kind in set(kinds)}
        shuffle()  # compiled before anything is timed
        scalars, stops, done = setup.scalars, settings.looks, 0
        if saved is None:
            state, top, seconds = init(setup, seed, begin), None, 0.0
        else:
            example = jax.eval_shape(partial(init, setup), 0)
            state, top, seconds = restored(example, saved)
            done = int(state.step)
            stops = tuple(stop for stop in stops if stop > done)
        for stop in stops:
            say(
                f"epoch {done // steps_per_epoch + 1} of {-(-steps // steps_per_epoch)}"
            )
            began = time.perf_counter()
            with jax.transfer_guard("disallow"):
                for i in range(done, stop):
                    if i % steps_per_epoch == 0:
                        key, order = shuffle()(state.key, state.order)
                        state = state._replace(key=key, order=order)
                    state = programs[kinds[i]](state, images, labels, *scalars)
                state.step.block_until_ready()
            seconds, done = seconds + time.perf_counter() - began, stop
            try:
                measurement, top = measure(setup, state, top)
            except FloatingPointError as error:
                raise DivergedError(
                    f"{setup.optimizer}, seed {seed}: {error} after {done} steps; "
                    f"lower the learning rate (now {settings.learning_rate:g}) or ρ "
                    f"(now {setup.rho:g})"
                ) from error
            perturbed = sum(acts for acts, _ in kinds[:done])
            radius = float(state.radius_sum) / max(perturbed, 1)
            progress = Progress(state, top, seconds)
            yield Point(done, radius, measurement, progress)

    return run
