"""The steps of a path: of discrete SAM and Eigen-SAM, of an equation, of a drift."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.typing import ArrayLike

from eigensam_jax import eigen_sam, perturbation, sam, sde, trackers, tree_math
from eigensam_jax.experiments.sde.problem import NUM_BATCHES, Problem
from eigensam_jax.hessian import ValueFn
from eigensam_jax.sde import expansion
from eigensam_jax.tree_math import PyTree

ORDERS: dict[str, sde.Order] = {"order_1": 1, "order_2": 2, "order_3": 3}
WITHOUT_NOISE = ("mean_sam", "mean_order_2", "mean_order_3")
EIGENVECTOR = "lanczos(num_matvecs=3, update_interval=1)"  # of all batches' Hessian

State = tuple[PyTree, optax.OptState]  # of what is no optimizer's, an empty one
Advance = Callable[[jax.Array, State, jax.Array, jax.Array], State]


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
