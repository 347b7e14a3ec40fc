"""Paths of discrete SAM and of its equations, with the looks along them.

Not by `training`: batches are drawn at random, independently, as the equations assume,
and a path of an equation has no batches at all.
"""

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
from eigensam_jax.sde import _expansion
from eigensam_jax.tree_math import PyTree, ValueFn

ORDERS: dict[str, sde.Order] = {"order_1": 1, "order_2": 2, "order_3": 3}
WITHOUT_NOISE = ("mean_sam", "mean_order_2", "mean_order_3")
EIGENVECTOR = "lanczos(num_matvecs=3, update_interval=1)"  # of all batches' Hessian
CURVATURE_TOLERANCE = 1e-2  # of each linear system in Itô's term
_WITH_NOISE = ("sam", "sam_again", "order_2", "order_3")

Record = dict[str, Any]
State = tuple[PyTree, optax.OptState]  # empty without an optimizer
Advance = Callable[[jax.Array, State, jax.Array, jax.Array], State]
Run = Callable[[Record], Iterator[dict[str, float]]]


def jobs(rhos: tuple[float, ...], alpha: float, seeds: int) -> list[Record]:
    """The identity of each path, seed by seed; Eigen-SAM at the middle ρ only.

    `optimizer` is the discrete "sam" or "eigen_sam"; "sam_again", SAM from the same
    start on other batches; a key of `ORDERS`, the equation of that order ("order_1" has
    no ρ); or one of `WITHOUT_NOISE`, the mean of SAM's gradient or a drift alone.
    `seed` fixes the start and the draws.
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
    """The middle ρ (the lower of two): its paths are plotted, its rates measured."""
    return sorted(rhos)[(len(rhos) - 1) // 2]


def make_run(
    problem: Problem, stops: tuple[int, ...], eta: float, measured_rho: float
) -> Run:
    """Compiles what paths need; the result runs one of `jobs` and yields its looks.

    A look has the `step`, the loss f over all batches, ‖w‖, ‖∇f(w)‖ and, for ∇²f,
    λ_max and its residual. "sam" and "eigen_sam" at `measured_rho` also have the
    `sde.SharpnessRates`, named `rate_…`. `stops` are the steps to look after; `eta` is
    the learning rate. A run whose training loss is not finite raises
    FloatingPointError.
    """
    value_fn, whole = problem.value_fn, problem.whole

    @jax.jit
    def look_at(params: PyTree) -> dict[str, jax.Array]:
        value, gradient = jax.value_and_grad(value_fn)(params, whole)
        return {
            "train_loss": value,
            "parameter_norm": tree_math.norm(params),
            "gradient_norm": tree_math.norm(gradient),
        }

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
        done = 0
        for stop in stops:
            if stop > done:
                key, of_stretch = jax.random.split(key)
                program = advance(method, stop - done)
                state, done = program(of_stretch, state, *scalars), stop
            params = state[0]
            look = {name: float(x) for name, x in look_at(params).items()}
            if not np.isfinite(look["train_loss"]):
                raise FloatingPointError(f"the training loss is {look['train_loss']}")
            top = problem.top_eigenpair(params)
            look["lambda_max"] = float(top.eigenvalue)
            look["lambda_max_residual"] = float(top.residual)
            if optimizer in ("sam", "eigen_sam") and job["rho"] == measured_rho:
                found = rates(params, top, *scalars)._asdict()
                del found["eigenvalue"], found["residual"]  # recorded above
                look |= {f"rate_{name}": float(x) for name, x in found.items()}
            yield {"step": stop, **look}

    return run


def sam_gradient(value_fn: ValueFn, params: PyTree, rho: ArrayLike) -> PyTree:
    """∇f(w + ε) with ε = ρ·∇f(w)/‖∇f(w)‖."""
    gradient = jax.grad(value_fn)
    epsilon = perturbation.sam(gradient(params), rho).epsilon
    return gradient(tree_math.add_scaled(params, 1, epsilon))


def start(method: str, params: PyTree) -> State:
    """Parameters and, for a discrete method, the optimizer's initial state."""
    if method in ORDERS or method in WITHOUT_NOISE:
        return params, ()
    return params, _optimizer(method, 0.0, 0.0, 0.0).init(params)


def make_advance(problem: Problem, method: str, eta: float, num_steps: int) -> Advance:
    """Builds (key, state, ρ, α) -> the state `num_steps` steps later.

    "sam" and "eigen_sam" are discrete steps on batches drawn with replacement;
    Eigen-SAM tracks v on the Hessian of all batches, at every step. A key of `ORDERS`
    takes one Euler step of its equation per step. One of `WITHOUT_NOISE` steps along
    the mean of SAM's gradient or along a drift. `eta` is the learning rate.
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
            return tree_math.scale(-1, _expansion.batch_mean(of_batch, batches))

        def step(params: PyTree, _: None) -> tuple[PyTree, None]:
            return tree_math.add_scaled(params, eta, drift(params)), None

        return jax.lax.scan(step, state[0], length=num_steps)[0], ()

    if method in WITHOUT_NOISE:
        return follow
    return descend if order is None else simulate


def _optimizer(
    method: str, rho: Any, alpha: Any, eta: float
) -> optax.GradientTransformationExtraArgs:
    ascent = sam(rho)
    if method == "eigen_sam":
        ascent = eigen_sam(rho, alpha, trackers.lanczos(3, update_interval=1))
    return optax.chain(ascent, optax.sgd(eta))
