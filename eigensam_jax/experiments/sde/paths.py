"""Paths of discrete SAM and of its equations, and what is looked at along them."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eigensam_jax import sde, tree_math
from eigensam_jax.eigen import Eigenpair
from eigensam_jax.experiments.sde import steps as sde_steps
from eigensam_jax.experiments.sde.problem import Problem
from eigensam_jax.tree_math import PyTree

CURVATURE_TOLERANCE = 1e-2  # of each linear system in Itô's term
_WITH_NOISE = ("sam", "sam_again", "order_2", "order_3")

Record = dict[str, Any]
Run = Callable[[Record], Iterator[dict[str, float]]]


def jobs(rhos: tuple[float, ...], alpha: float, seeds: int) -> list[Record]:
    """What tells each path from the others, seed by seed; Eigen-SAM at the middle ρ.

    `optimizer` is "sam" or "eigen_sam", which are discrete; "sam_again", SAM from the
    same start on other batches; a key of `sde_steps.ORDERS`, the equation of that
    order, of which "order_1" has no ρ; or one of `sde_steps.WITHOUT_NOISE`, steps along
    the mean of SAM's gradient and the drifts alone. `seed` is of the start, and of what
    is drawn.
    """
    at = [(name, rho) for rho in rhos for name in _WITH_NOISE + sde_steps.WITHOUT_NOISE]
    return [
        {"optimizer": name, "rho": rho, "alpha": weight, "seed": seed}
        for seed in range(seeds)
        for name, rho, weight in (
            ("order_1", 0.0, 0.0),
            *((name, rho, 0.0) for name, rho in at),
            ("eigen_sam", middle(rhos), alpha),
        )
    ]


def middle(rhos: tuple[float, ...]) -> float:
    """The ρ whose paths are drawn, and whose rates of λ_max are measured.

    Of an even number, the lower one.
    """
    return sorted(rhos)[(len(rhos) - 1) // 2]


def make_run(
    problem: Problem, stops: tuple[int, ...], eta: float, measured_rho: float
) -> Run:
    """Compiles what paths need; the result runs one of `jobs`, yielding its looks.

    A look has the `step`; losses over all batches and the test set, and the accuracy on
    that; ‖w‖, and ‖∇f(w)‖ of the training loss; λ_max of its Hessian, and its residual.
    For "sam" and "eigen_sam" at `measured_rho` it has the `sde.SharpnessRates` too,
    with `rate_` before their names.

    Args:
      problem: what is learnt.
      stops: the steps after which to look.
      eta: η, the learning rate.
      measured_rho: ρ where the rates of λ_max are measured.

    Raises:
      FloatingPointError: by a run whose training loss is not finite.
    """
    value_fn, whole = problem.value_fn, problem.whole

    @jax.jit
    def norms(params: PyTree) -> tuple[jax.Array, jax.Array]:
        gradient = jax.grad(lambda p: value_fn(p, whole))(params)
        return tree_math.norm(params), tree_math.norm(gradient)

    @jax.jit
    def rates(
        params: PyTree, top: Eigenpair, rho: jax.Array, alpha: jax.Array
    ) -> sde.SharpnessRates:
        return sde.sharpness_rates(
            *(value_fn, params, problem.batches),
            rho=rho,
            eta=eta,
            alpha=alpha,
            eigenpair=top,
            curvature_tol=CURVATURE_TOLERANCE,
        )

    @cache
    def advance(method: str, num_steps: int) -> sde_steps.Advance:
        return jax.jit(sde_steps.make_advance(problem, method, eta, num_steps))

    def run(job: Record) -> Iterator[dict[str, float]]:
        params, optimizer = problem.init(job["seed"]), job["optimizer"]
        draw = 2 if optimizer == "sam_again" else 1
        key = jax.random.fold_in(jax.random.key(job["seed"]), draw)
        method = optimizer.removesuffix("_again")
        scalars = jnp.float32(job["rho"]), jnp.float32(job["alpha"])
        state = sde_steps.start(method, params)
        v0, done = tree_math.zeros_like(params), 0
        for stop in stops:
            if stop > done:
                key, of_stretch = jax.random.split(key)
                program = advance(method, stop - done)
                state, done = program(of_stretch, state, *scalars), stop
            params = state[0]
            train_loss, _ = problem.means(params, *whole)
            if not np.isfinite(train_loss):
                raise FloatingPointError(f"the training loss is {train_loss}")
            test_loss, accuracy = problem.means(params, *problem.test)
            top = problem.top_eigenpair(params, v0)
            v0 = top.eigenvector
            look = {"train_loss": train_loss, "test_loss": test_loss}
            look["test_accuracy"] = accuracy
            look["parameter_norm"], look["gradient_norm"] = map(float, norms(params))
            look["lambda_max"] = float(top.eigenvalue)
            look["lambda_max_residual"] = float(top.residual)
            if optimizer in ("sam", "eigen_sam") and job["rho"] == measured_rho:
                found = rates(params, top, *scalars)._asdict()
                del found["eigenvalue"], found["residual"]  # which are λ_max's above
                look |= {f"rate_{name}": float(x) for name, x in found.items()}
            yield {"step": stop, **look}

    return run
