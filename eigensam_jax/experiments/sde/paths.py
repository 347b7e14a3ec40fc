"""Paths of discrete SAM and of its equations, and what is looked at along them."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from eigensam_jax import eigen_sam, perturbation, sam, sde, trackers, tree_math
from eigensam_jax.eigen import Eigenpair
from eigensam_jax.experiments.sde.problem import NUM_BATCHES, Problem
from eigensam_jax.hessian import ValueFn
from eigensam_jax.sde import expansion
from eigensam_jax.tree_math import PyTree

ORDERS: dict[str, sde.Order] = {"order_1": 1, "order_2": 2, "order_3": 3}
WITHOUT_NOISE = ("mean_sam", "mean_order_2", "mean_order_3")
EIGENVECTOR = "lanczos(num_matvecs=3, update_interval=1)"  # of all batches' Hessian
CURVATURE_TOLERANCE = 1e-2  # of each linear system in Itô's term
_WITH_NOISE = ("sam", "sam_again", "order_2", "order_3")

Record = dict[str, Any]
State = tuple[PyTree, optax.OptState]  # of what is no optimizer's, an empty one
Advance = Callable[[jax.Array, State, jax.Array, jax.Array], State]
Run = Callable[[Record], Iterator[dict[str, float]]]


def jobs(rhos: tuple[float, ...], alpha: float, seeds: int) -> list[Record]:
    """What tells each path from the others, seed by seed; Eigen-SAM at the middle ρ.

    `optimizer` is "sam" or "eigen_sam", which are discrete; "sam_again", SAM from the
    same start on other batches; a key of `ORDERS`, the equation of that
    order, of which "order_1" has no ρ; or one of `WITHOUT_NOISE`, steps along
    the mean of SAM's gradient and the drifts alone. `seed` is of the start, and of what
    is drawn.
    """
    at = [(name, rho) for rho in rhos for name in _WITH_NOISE + WITHOUT_NOISE]
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
    def advance(method: str, num_steps: int) -> Advance:
        return jax.jit(make_advance(problem, method, eta, num_steps))

    def run(job: Record) -> Iterator[dict[str, float]]:
        params, optimizer = problem.init(job["seed"]), job["optimizer"]
        draw = 2 if optimizer == "sam_again" else 1
        key = jax.random.fold_in(jax.random.key(job["seed"]), draw)
        method = optimizer.removesuffix("_again")
        scalars = jnp.float32(job["rho"]), jnp.float32(job["alpha"])
        state = start(method, params)
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


def sam_gradient(value_fn: ValueFn, params: PyTree, rho: ArrayLike) -> PyTree:
    """∇f(w + ε) with ε = ρ·∇f(w)/‖∇f(w)‖."""
    gradient = jax.grad(value_fn)
    epsilon = perturbation.sam(gradient(params), rho).epsilon
    return gradient(tree_math.add_scaled(params, 1, epsilon))


def start(method: str, params: PyTree) -> State:
    """Parameters and, of a discrete method, the optimizer's state before any step."""
    if method in ORDERS or method in WITHOUT_NOISE:
        return params, ()
    return params, _optimizer(method, 0.0, 0.0, 0.0).init(params)


def make_advance(problem: Problem, method: str, eta: float, num_steps: int) -> Advance:
    """Builds (key, state, ρ, α) -> the state `num_steps` steps later.

    Args:
      problem: what is learnt.
      method: "sam" and "eigen_sam", discrete steps on batches drawn one by one, with
        replacement; a key of `ORDERS`, the equation over the time of as many steps, a
        step of Euler's to each; or one of `WITHOUT_NOISE`, steps along the mean of
        SAM's gradient or along a drift. Eigen-SAM's v is followed on the Hessian of all
        batches, at every step.
      eta: η, the learning rate.
      num_steps: how many steps.
    """
    value_fn, batches = problem.value_fn, problem.batches
    order = ORDERS.get(method.removeprefix("mean_"))

    def descend(
        key: jax.Array, state: State, rho: jax.Array, alpha: jax.Array
    ) -> State:
        tx = _optimizer(method, rho, alpha, eta)

        def step(state: State, index: jax.Array) -> Any:
            params, opt_state = state
            batch = jax.tree.map(lambda x: x[index], batches)
            of_batch = lambda p: value_fn(p, batch)
            updates, opt_state = tx.update(
                jax.grad(of_batch)(params),
                opt_state,
                params,
                value_fn=of_batch,
                curvature_fn=lambda p: value_fn(p, problem.whole),
            )
            return (optax.apply_updates(params, updates), opt_state), None

        drawn = jax.random.randint(key, (num_steps,), 0, NUM_BATCHES)
        return jax.lax.scan(step, state, drawn)[0]

    def simulate(
        key: jax.Array, state: State, rho: jax.Array, alpha: jax.Array
    ) -> State:
        del alpha
        end, _ = sde.simulate(
            *(key, value_fn, sde.start(state[0]), batches),
            rho=rho,
            eta=eta,
            num_steps=num_steps,
            order=ORDERS[method],
        )
        return end.params, ()

    def follow(key: jax.Array, state: State, rho: jax.Array, alpha: jax.Array) -> State:
        del key, alpha

        def drift(params: PyTree) -> PyTree:
            if order is not None:
                return sde.drift(value_fn, params, batches, rho, order)
            of_batch = lambda batch: sam_gradient(
                lambda p: value_fn(p, batch), params, rho
            )
            return tree_math.scale(-1, expansion.batch_mean(of_batch, batches))

        def step(params: PyTree, _: None) -> tuple[PyTree, None]:
            return tree_math.add_scaled(params, eta, drift(params)), None

        return jax.lax.scan(step, state[0], length=num_steps)[0], ()

    if method in WITHOUT_NOISE:
        return follow
    return descend if order is None else simulate


def _optimizer(
    method: str, rho: Any, alpha: Any, eta: float
) -> optax.GradientTransformationExtraArgs:
    """SAM or Eigen-SAM before plain SGD."""
    ascent = sam(rho)
    if method == "eigen_sam":
        ascent = eigen_sam(rho, alpha, trackers.lanczos(3, update_interval=1))
    return optax.chain(ascent, optax.sgd(eta))
