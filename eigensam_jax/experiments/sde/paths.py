"""Paths of discrete SAM and of its equations, and what is looked at along them."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eigensam_jax import sde, tree_math
from eigensam_jax.eigen import Eigenpair
from eigensam_jax.experiments.sde import steps as sde_steps
from eigensam_jax.experiments.sde.problem import Problem
from eigensam_jax.experiments.training import loop
from eigensam_jax.tree_math import PyTree

CURVATURE_TOLERANCE = 1e-2  # of each linear system in Itô's term
_WITH_NOISE = ("sam", "sam_again", "order_2", "order_3")

Means = dict[str, float]


class Job(NamedTuple):
    """One path.

    Attributes:
      optimizer: "sam" and "eigen_sam", which are discrete; "sam_again", SAM from the
        same start on other batches; a key of `sde_steps.ORDERS`, the equation of that
        order; or one of `sde_steps.WITHOUT_NOISE`, steps along the mean of SAM's
        gradient and the drifts alone.
      rho: ρ; 0 for "order_1", which has none.
      alpha: α of Eigen-SAM, else 0.
      seed: of the start, and of what is drawn.
    """

    optimizer: str
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


def jobs(rhos: tuple[float, ...], alpha: float, seeds: int) -> list[Job]:
    """All paths, seed by seed; Eigen-SAM at the middle ρ."""
    result = []
    for seed in range(seeds):
        result.append(Job("order_1", 0.0, 0.0, seed))
        for rho in rhos:
            for method in (*_WITH_NOISE, *sde_steps.WITHOUT_NOISE):
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
    stops = loop.evaluation_steps(plan.steps, plan.evaluations)
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
    def advance(method: str, num_steps: int) -> sde_steps.Advance:
        return jax.jit(sde_steps.make_advance(problem, method, eta, num_steps))

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
        draw = 2 if job.optimizer == "sam_again" else 1
        key = jax.random.fold_in(jax.random.key(job.seed), draw)
        method = job.optimizer.removesuffix("_again")
        state = sde_steps.start(method, params)
        v0, done = tree_math.zeros_like(params), 0
        for stop in stops:
            if stop > done:
                key, of_stretch = jax.random.split(key)
                rho, alpha = jnp.float32(job.rho), jnp.float32(job.alpha)
                program = advance(method, stop - done)
                state, done = program(of_stretch, state, rho, alpha), stop
            params = state[0]
            seen, top = look(stop, params, v0)
            v0, parts = top.eigenvector, None
            if job.optimizer in ("sam", "eigen_sam") and job.rho == measured_rho:
                found = rates(params, top, jnp.float32(job.rho), jnp.float32(job.alpha))
                parts = {key: float(x) for key, x in found._asdict().items()}
            yield seen, parts

    return run
