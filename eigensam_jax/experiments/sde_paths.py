"""Paths of discrete SAM and of its equations, and what is looked at along them."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eigensam_jax import (
    eigen,
    eigen_sam,
    hessian,
    perturbation,
    sam,
    sde,
    trackers,
    tree_math,
)
from eigensam_jax.eigen import Eigenpair
from eigensam_jax.experiments import measures, training
from eigensam_jax.experiments.data import Dataset
from eigensam_jax.experiments.models import MLP
from eigensam_jax.sde import expansion
from eigensam_jax.tree_math import PyTree

NUM_BATCHES = 16
BATCH_SIZE = 64
WIDTH = 32
TOLERANCE = 1e-4  # of λ_max's residual, relative to it
CURVATURE_TOLERANCE = 1e-2  # of each linear system in Itô's term
EIGENVECTOR = "lanczos(num_matvecs=3, update_interval=1)"  # of all batches' Hessian
ORDERS: dict[str, sde.Order] = {"order_1": 1, "order_2": 2, "order_3": 3}
WITHOUT_NOISE = ("mean_sam", "mean_order_2", "mean_order_3")
_WITH_NOISE = ("sam", "sam_again", "order_2", "order_3")

Means = dict[str, float]


class Problem(NamedTuple):
    """What is learnt, by what.

    Attributes:
      init: from a seed to parameters.
      value_fn: (params, batch) -> the batch's mean cross-entropy.
      batches: images and labels, the leading axis over `NUM_BATCHES` batches.
      top_eigenpair: from parameters, and where to start, to that of all batches.
      means: (params, images, labels) -> loss and accuracy.
      dataset: with the training images of `batches` alone.
    """

    init: Callable[[int], PyTree]
    value_fn: Callable[[PyTree, PyTree], jax.Array]
    batches: PyTree
    top_eigenpair: Callable[[PyTree, PyTree], Eigenpair]
    means: measures.Means
    dataset: Dataset


class Job(NamedTuple):
    """One path.

    Attributes:
      method: "sam" and "eigen_sam", which are discrete; "sam_again", SAM from the same
        start on other batches; a key of `ORDERS`, the equation of that order; or one of
        `WITHOUT_NOISE`, steps along the mean of SAM's gradient and the drifts alone.
      rho: ρ; 0 for "order_1", which has none.
      alpha: α of Eigen-SAM, else 0.
      seed: of the start, and of what is drawn.
    """

    method: str
    rho: float
    alpha: float
    seed: int


class Plan(NamedTuple):
    """What all paths share.

    Attributes:
      steps: how many.
      evaluations: how often to look, the start not counted.
      learning_rate: η.
    """

    steps: int
    evaluations: int
    learning_rate: float


class Look(NamedTuple):
    """The network at a point of a path.

    Attributes:
      step: steps so far.
      train_loss: mean cross-entropy over all batches.
      test_loss: over the test set.
      test_accuracy: fraction of the test set that is classified correctly.
      parameter_norm: ‖w‖.
      gradient_norm: ‖∇f(w)‖ of the training loss.
      lambda_max: λ_max of its Hessian.
      lambda_max_residual: ‖Hv − λv‖ of that eigenpair.
    """

    step: int
    train_loss: float
    test_loss: float
    test_accuracy: float
    parameter_norm: float
    gradient_norm: float
    lambda_max: float
    lambda_max_residual: float


def make_problem(dataset: Dataset) -> Problem:
    """A tanh network on the first `NUM_BATCHES` · `BATCH_SIZE` training images.

    Of tanh, since the third derivative of a network of rectified linear units is not
    what its kinks do.
    """
    count = NUM_BATCHES * BATCH_SIZE
    few = dataset._replace(
        train_images=dataset.train_images[:count],
        train_labels=dataset.train_labels[:count],
    )
    model = MLP(dataset.num_classes, WIDTH, jnp.tanh)
    loss = measures.cross_entropy(model)
    batches = jax.tree.map(
        lambda x: x.reshape(NUM_BATCHES, BATCH_SIZE, *x.shape[1:]),
        (few.train_images, few.train_labels),
    )

    def init(seed: int) -> PyTree:
        return model.init(jax.random.key(seed), few.train_images[:1])["params"]

    def value_fn(params: PyTree, batch: PyTree) -> jax.Array:
        return loss(params, *batch)

    @jax.jit
    def top_eigenpair(params: PyTree, v0: PyTree) -> Eigenpair:
        matvec = hessian.mean_matvec(value_fn, params, batches)
        pairs = eigen.top_eigenpairs(matvec, params, 1, tol=TOLERANCE, v0=v0)
        return Eigenpair(*jax.tree.map(lambda x: x[0], pairs))

    return Problem(
        init,
        value_fn,
        batches,
        top_eigenpair,
        measures.make_means(model),
        few,
    )


def jobs(rhos: tuple[float, ...], alpha: float, seeds: int) -> list[Job]:
    """All paths, seed by seed; Eigen-SAM at the middle ρ."""
    result = []
    for seed in range(seeds):
        result.append(Job("order_1", 0.0, 0.0, seed))
        for rho in rhos:
            for method in (*_WITH_NOISE, *WITHOUT_NOISE):
                result.append(Job(method, rho, 0.0, seed))
        result.append(Job("eigen_sam", middle(rhos), alpha, seed))
    return result


def middle(rhos: tuple[float, ...]) -> float:
    """The ρ whose paths are drawn, and whose rates of λ_max are measured.

    Of an even number, the lower one.
    """
    return sorted(rhos)[(len(rhos) - 1) // 2]


def make_run(problem: Problem, plan: Plan, measured_rho: float) -> Callable[..., Any]:
    """Compiles what paths need; the result runs a `Job`, yielding its looks.

    With each `Look` come the parts of the rate of λ_max, for "sam" and "eigen_sam" at
    `measured_rho`, else None. A loss that is not finite raises FloatingPointError.
    """
    value_fn, batches = problem.value_fn, problem.batches
    images, labels = problem.dataset.train_images, problem.dataset.train_labels
    stops = training.evaluation_steps(plan.steps, plan.evaluations)
    eta = plan.learning_rate

    @jax.jit
    def norms(params: PyTree) -> tuple[jax.Array, jax.Array]:
        whole = (images, labels)
        gradient = jax.grad(lambda p: value_fn(p, whole))(params)
        return tree_math.norm(params), tree_math.norm(gradient)

    @jax.jit
    def rates(
        params: PyTree, top: Eigenpair, rho: jax.Array, alpha: jax.Array
    ) -> sde.SharpnessRates:
        return sde.sharpness_rates(
            *(value_fn, params, batches),
            rho=rho,
            eta=eta,
            alpha=alpha,
            eigenpair=top,
            curvature_tol=CURVATURE_TOLERANCE,
        )

    @cache
    def advance(method: str, num_steps: int) -> Callable[..., Any]:
        if method in ORDERS:
            order = ORDERS[method]
            return jax.jit(partial(_simulate, problem, order, eta, num_steps))
        if method in WITHOUT_NOISE:
            expanded = ORDERS.get(method.removeprefix("mean_"))
            return jax.jit(partial(_follow, problem, expanded, eta, num_steps))
        return jax.jit(partial(_descend, problem, method, eta, num_steps))

    def look(step: int, params: PyTree, v0: PyTree) -> tuple[Look, Eigenpair]:
        train_loss, _ = problem.means(params, images, labels)
        if not np.isfinite(train_loss):
            raise FloatingPointError(f"the training loss is {train_loss}")
        test = problem.dataset.test_images, problem.dataset.test_labels
        top = problem.top_eigenpair(params, v0)
        values = (
            *(train_loss, *problem.means(params, *test), *norms(params)),
            *(top.eigenvalue, top.residual),
        )
        return Look(step, *map(float, values)), top

    def run(job: Job) -> Iterator[tuple[Look, Means | None]]:
        params = problem.init(job.seed)
        draw = 2 if job.method == "sam_again" else 1
        key = jax.random.fold_in(jax.random.key(job.seed), draw)
        bare = job.method in ORDERS or job.method in WITHOUT_NOISE
        state = params if bare else start(job, params)
        v0, done = tree_math.zeros_like(params), 0
        for stop in stops:
            if stop > done:
                key, of_stretch = jax.random.split(key)
                rho, alpha = jnp.float32(job.rho), jnp.float32(job.alpha)
                method = job.method.removesuffix("_again")
                program = advance(method, stop - done)
                state = program(of_stretch, state, rho, alpha)
                params, done = (state if bare else state[0]), stop
            seen, top = look(stop, params, v0)
            v0, parts = top.eigenvector, None
            if job.method in ("sam", "eigen_sam") and job.rho == measured_rho:
                found = rates(params, top, jnp.float32(job.rho), jnp.float32(job.alpha))
                parts = {key: float(x) for key, x in found._asdict().items()}
            yield seen, parts

    return run


def start(job: Job, params: PyTree) -> tuple[PyTree, optax.OptState]:
    """Parameters and the optimizer's state before the first step."""
    return params, _optimizer(job.method, job.rho, job.alpha, 0.0).init(params)


def _optimizer(
    method: str, rho: Any, alpha: Any, eta: float
) -> optax.GradientTransformationExtraArgs:
    """SAM or Eigen-SAM before plain SGD."""
    ascent = sam(rho)
    if method == "eigen_sam":
        ascent = eigen_sam(rho, alpha, trackers.lanczos(3, update_interval=1))
    return optax.chain(ascent, optax.sgd(eta))


def _descend(
    problem: Problem,
    method: str,
    eta: float,
    num_steps: int,
    key: jax.Array,
    state: tuple[PyTree, optax.OptState],
    rho: jax.Array,
    alpha: jax.Array,
) -> tuple[PyTree, optax.OptState]:
    """Steps of the discrete method, on batches drawn one by one, with replacement.

    Eigen-SAM's v is followed on the Hessian of all batches, at every step.
    """
    value_fn, batches = problem.value_fn, problem.batches
    images, labels = problem.dataset.train_images, problem.dataset.train_labels
    tx = _optimizer(method, rho, alpha, eta)

    def step(state: tuple[PyTree, optax.OptState], index: jax.Array) -> Any:
        params, opt_state = state
        batch = jax.tree.map(lambda x: x[index], batches)
        of_batch = lambda p: value_fn(p, batch)
        updates, opt_state = tx.update(
            jax.grad(of_batch)(params),
            opt_state,
            params,
            value_fn=of_batch,
            curvature_fn=lambda p: value_fn(p, (images, labels)),
        )
        return (optax.apply_updates(params, updates), opt_state), None

    drawn = jax.random.randint(key, (num_steps,), 0, NUM_BATCHES)
    end, _ = jax.lax.scan(step, state, drawn)
    return end


def _simulate(
    problem: Problem,
    order: sde.Order,
    eta: float,
    num_steps: int,
    key: jax.Array,
    params: PyTree,
    rho: jax.Array,
    alpha: jax.Array,
) -> PyTree:
    """The equation over the time of as many steps, a step of Euler's to each."""
    del alpha
    state, _ = sde.simulate(
        *(key, problem.value_fn, sde.start(params), problem.batches),
        rho=rho,
        eta=eta,
        num_steps=num_steps,
        order=order,
    )
    return state.params


def _follow(
    problem: Problem,
    order: sde.Order | None,
    eta: float,
    num_steps: int,
    key: jax.Array,
    params: PyTree,
    rho: jax.Array,
    alpha: jax.Array,
) -> PyTree:
    """Steps along the drift, or without an order along the mean of SAM's gradient."""
    del key, alpha
    value_fn, batches = problem.value_fn, problem.batches

    def perturbed_gradient(params: PyTree, batch: PyTree) -> PyTree:
        gradient = jax.grad(lambda p: value_fn(p, batch))
        epsilon = perturbation.sam(gradient(params), rho).epsilon
        return gradient(tree_math.add_scaled(params, 1, epsilon))

    def step(params: PyTree, _: None) -> tuple[PyTree, None]:
        if order is None:
            of_batch = lambda batch: perturbed_gradient(params, batch)
            mean = expansion.batch_mean(of_batch, batches)
            return tree_math.add_scaled(params, -eta, mean), None
        drift = sde.drift(value_fn, params, batches, rho, order)
        return tree_math.add_scaled(params, eta, drift), None

    return jax.lax.scan(step, params, length=num_steps)[0]
