"""Training runs in which it is seen how well a tracker follows the top eigenvector."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from eigensam_jax import eigen_sam, hessian, sam
from eigensam_jax.experiments.data.load import Dataset
from eigensam_jax.experiments.training import loop as training
from eigensam_jax.experiments.training import losses, measures
from eigensam_jax.experiments.training import steps as training_steps
from eigensam_jax.experiments.training.steps import TrainState
from eigensam_jax.experiments.training.trackers import Spec
from eigensam_jax.trackers import Tracker

_UNSEEN = 0.15  # of the steps, at the start, before the first evaluation
_NUM_VECTORS = 6  # ARPACK's: about 10 products, from where the last look ended


class Settings(NamedTuple):
    """What all runs of a benchmark share.

    Attributes:
      steps: how many.
      batch_size: examples a step; what is left over at the end of an epoch is dropped.
      learning_rate: of SGD with momentum 0.9, decayed to zero by a cosine.
      evaluations: how often to look at v, evenly spread over the last 85% of the steps.
    """

    steps: int
    batch_size: int
    learning_rate: float
    evaluations: int


class Point(NamedTuple):
    """A look at a run, before the step `step` is taken, or at its end.

    Attributes:
      step: steps taken so far.
      radius: the mean of ‖ε‖ over them.
      train_loss: mean cross-entropy over the training set, at the weights w.
      test_accuracy: fraction of the test set that is classified correctly.
      lambda_max: λ_max of ∇²L(w) on the first `measures.CURVATURE_EXAMPLES` images.
      lambda_max_residual: ‖Hv − λv‖ of that eigenpair.
      ratio: vᵀHv/λ_max for the v that the step perturbs by; None at the end, and where
        there is no tracker.
      cosine: |cos| between that v and the top eigenvector.
      tracked_eigenvalue: λ as the tracker has it, on batches, where it is known.
      tracked_residual: the residual as the tracker has it.
    """

    step: int
    radius: float
    train_loss: float
    test_accuracy: float
    lambda_max: float
    lambda_max_residual: float
    ratio: float | None = None
    cosine: float | None = None
    tracked_eigenvalue: float | None = None
    tracked_residual: float | None = None


Measure = Callable[
    [TrainState, Any, jax.Array | None],
    tuple[Point, jax.Array],
]
Run = Callable[[int, float, float], Iterator[Point]]


def evaluation_steps(settings: Settings) -> list[int]:
    """The steps whose v is looked at: the last one, and others back to 15%."""
    first, last = round(_UNSEEN * settings.steps), settings.steps - 1
    steps = np.linspace(min(first, last), last, settings.evaluations)
    return sorted({round(step) for step in steps})


def make_optimizer(
    spec: Spec | None, rho: ArrayLike, alpha: ArrayLike, settings: Settings
) -> optax.GradientTransformationExtraArgs:
    """Eigen-SAM by the tracker of `spec`, or SAM, before SGD; ρ and α may be traced."""
    ascent = sam(rho) if spec is None else eigen_sam(rho, alpha, spec.tracker)
    descent = training.sgd(settings.learning_rate, settings.steps)
    return optax.chain(ascent, descent)


def make_measure(model: nn.Module, dataset: Dataset) -> Measure:
    """Builds (state, tracked, start) -> a `Point`, and the top eigenvector.

    `tracked` is the state of a tracker whose v is to be looked at, or None. `start` is
    where the search for the top eigenvector begins. A training loss that is not finite
    raises FloatingPointError, and so does a Hessian whose top is not found.
    """
    loss, means = losses.cross_entropy(model), measures.make_means(model)
    product = measures.make_product(loss)
    top_eigenpair = measures.make_top_eigenpair(loss, _NUM_VECTORS)
    few = slice(measures.CURVATURE_EXAMPLES)
    images, labels = dataset.train_images[few], dataset.train_labels[few]

    def measure(
        state: TrainState, tracked: Any, start: jax.Array | None
    ) -> tuple[Point, jax.Array]:
        params, taken = state.params, int(state.step)
        train_loss, _ = means(params, dataset.train_images, dataset.train_labels)
        if not np.isfinite(train_loss):
            raise FloatingPointError(f"the training loss is {train_loss}")
        _, accuracy = means(params, dataset.test_images, dataset.test_labels)
        top = top_eigenpair(params, images, labels, start)
        point = Point(
            step=taken,
            radius=float(state.radius_sum) / max(taken, 1),
            train_loss=train_loss,
            test_accuracy=accuracy,
            lambda_max=float(top.eigenvalue),
            lambda_max_residual=float(top.residual),
        )
        if tracked is not None:
            v = ravel_pytree(tracked.eigenvector)[0]
            rayleigh = jnp.sum(v * product(params, images, labels, v))
            point = point._replace(
                ratio=float(rayleigh) / point.lambda_max,
                cosine=float(jnp.abs(jnp.sum(v * top.eigenvector))),
                tracked_eigenvalue=_finite(float(tracked.eigenvalue)),
                tracked_residual=_finite(float(tracked.residual)),
            )
        return point, top.eigenvector

    return measure


def make_run(
    model: nn.Module,
    dataset: Dataset,
    measure: Measure,
    spec: Spec | None,
    settings: Settings,
) -> Run:
    """Builds (seed, rho, alpha) -> the `Point`s of a run, its end the last.

    Without a `spec` the run is SAM's, and its end is the only point. ρ and α are
    arguments of the compiled steps, so that all runs of a tracker share its programs.
    As in `training.make_run`, steps are dispatched one by one, each free of branches,
    and nothing goes to the host between evaluations. A step that refreshes is two
    programs, the tracker's refresh and what is left of the step. What the tracker holds
    in between is the v that the step perturbs by.
    """
    images, labels = dataset.train_images, dataset.train_labels
    loss, step_loss = losses.cross_entropy(model), losses.training_loss(model)
    steps_per_epoch = len(images) // settings.batch_size
    stops = [] if spec is None else evaluation_steps(settings)

    rest = None if spec is None else spec._replace(tracker=_refreshed_before(spec))

    def init(seed: int) -> TrainState:
        tx = make_optimizer(spec, 0.0, 0.0, settings)
        return training_steps.start(model, tx, images, seed)

    def step(
        due: bool,
        state: TrainState,
        images: jax.Array,
        labels: jax.Array,
        rho: jax.Array,
        alpha: jax.Array,
    ) -> TrainState:
        tx = make_optimizer(rest, rho, alpha, settings)
        batch = training_steps.next_batch(state, settings.batch_size)
        return training_steps.take_step(
            tx, step_loss, state, images[batch], labels[batch], due
        )

    example, scalar = jax.eval_shape(init, 0), jnp.zeros(())
    compiled = training_steps.compile_donating
    shuffle = compiled(training_steps.start_epoch, example)
    plain = compiled(partial(step, False), example, images, labels, scalar, scalar)
    due_step, refresh = plain, None
    if spec is not None and spec.tracker.observe_interval > 1:
        due_step = compiled(
            partial(step, True), example, images, labels, scalar, scalar
        )
    if spec is not None and spec.num_matvecs > 0:
        function = partial(refreshed, spec.tracker, loss, settings.batch_size)
        refresh = compiled(function, example, images, labels)

    def run(seed: int, rho: float, alpha: float) -> Iterator[Point]:
        state, top = init(seed), None
        scalars = jnp.float32(rho), jnp.float32(alpha)
        for i in range(settings.steps):
            due = spec is not None and spec.is_due(i)
            with jax.transfer_guard("disallow"):
                if i % steps_per_epoch == 0:
                    state = shuffle(state)
                if due and refresh is not None:
                    state = refresh(state, images, labels)
            if i in stops:
                point, top = measure(state, state.opt_state[0].tracker, top)
                yield point
            with jax.transfer_guard("disallow"):
                program = due_step if due else plain
                state = program(state, images, labels, *scalars)
        yield measure(state, None, top)[0]

    return run


def _refreshed_before(spec: Spec) -> Tracker:
    """The tracker of `spec` for a step before which it was refreshed, if it was due."""
    return spec.tracker._replace(refresh=lambda state, matvec, count, due: state)


def refreshed(
    tracker: Tracker,
    loss: losses.Loss,
    batch_size: int,
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
) -> TrainState:
    """The state after what `eigen_sam`, first in the chain, does with `refresh=True`.

    The Hessian is that of the next step's batch.
    """
    batch = training_steps.next_batch(state, batch_size)
    value_fn = lambda params: loss(params, images[batch], labels[batch])
    matvec = hessian.matvec(jax.grad(value_fn), state.params)
    ascent, *rest = state.opt_state
    tracked = tracker.refresh(ascent.tracker, matvec, ascent.count, True)
    return state._replace(opt_state=(ascent._replace(tracker=tracked), *rest))


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def summarise(points: list[Point]) -> dict[str, Any]:
    """The figures of a run for `results.json`: its end, means of its looks, curves."""
    looks, end = points[:-1], points[-1]
    ratios = [point.ratio for point in looks if point.ratio is not None]
    cosines = [point.cosine for point in looks if point.cosine is not None]
    return {
        "radius": end.radius,
        "lambda_max": end.lambda_max,
        "lambda_max_residual": end.lambda_max_residual,
        "train_loss": end.train_loss,
        "test_accuracy": end.test_accuracy,
        "ratio": float(np.mean(ratios)) if ratios else None,
        "worst_ratio": min(ratios, default=None),
        "cosine": float(np.mean(cosines)) if cosines else None,
        "curves": {
            key: [getattr(point, key) for point in looks] for key in Point._fields
        },
    }
