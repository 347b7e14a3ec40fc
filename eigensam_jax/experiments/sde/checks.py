"""Checks of the equation against SAM: errors, moments, costs."""

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eigensam_jax import hessian, perturbation, sde, tree_math
from eigensam_jax.experiments.sde.paths import ORDERS, make_advance, sam_gradient, start
from eigensam_jax.experiments.sde.problem import Problem
from eigensam_jax.experiments.training import programs
from eigensam_jax.sde import _expansion
from eigensam_jax.tree_math import PyTree

RADII = (0.0005, 0.001, 0.002, 0.004)
FULL_BATCH_STEPS = 50
MOMENT_STEPS = 10
OBSERVABLES = ("loss", "‖∇f‖²", "‖w‖²", "vᵀHv", "⟨v, w⟩")
_TURNS = 15

Record = dict[str, Any]


def one_step(problem: Problem, alpha: float) -> list[Record]:
    """‖E[∇f_γ(w + ε_γ)] + b‖ over ρ, for SAM and Eigen-SAM, in float64.

    w is the network before training; the expectation is over all batches.
    """

    @jax.jit
    def errors(
        params: PyTree, batches: PyTree, v: PyTree, rho: jax.Array, alpha: jax.Array
    ) -> list[jax.Array]:
        def perturbed(batch: PyTree) -> PyTree:
            f = lambda p: problem.value_fn(p, batch)
            step = perturbation.eigen_sam(jax.grad(f)(params), v, rho, alpha)
            return jax.grad(f)(tree_math.add_scaled(params, 1, step.epsilon))

        exact = _expansion.batch_mean(perturbed, batches)
        kwargs = {"alpha": alpha, "eigenvector": v}
        drifts = [
            sde.drift(problem.value_fn, params, batches, rho, order, **kwargs)
            for order in ORDERS.values()
        ]
        return [tree_math.norm(tree_math.add_scaled(exact, 1, b)) for b in drifts]

    v, records = _eigenvector(problem), list[Record]()
    with jax.enable_x64(True):
        arrays = _in_float64((problem.init(0), problem.batches, v))
        for name, weight in (("sam", 0.0), ("eigen_sam", alpha)):
            for rho in RADII:
                found = errors(*arrays, jnp.asarray(rho), jnp.asarray(weight))
                records += _errors(name, 1, rho, found)
    return records


def many_steps(problem: Problem, learning_rate: float) -> list[Record]:
    """The distance of full-batch SAM to the equations' Euler paths, over ρ."""

    @jax.jit
    def distances(params: PyTree, whole: PyTree, rho: jax.Array) -> list[jax.Array]:
        f = lambda p: problem.value_fn(p, jax.tree.map(lambda x: x[0], whole))

        def step(params: PyTree, _: None) -> tuple[PyTree, None]:
            gradient = sam_gradient(f, params, rho)
            return tree_math.add_scaled(params, -learning_rate, gradient), None

        end, _ = jax.lax.scan(step, params, length=FULL_BATCH_STEPS)
        paths = [
            sde.simulate(
                *(jax.random.key(0), problem.value_fn, sde.start(params), whole),
                rho=rho,
                eta=learning_rate,
                num_steps=FULL_BATCH_STEPS,
                order=order,
            )[0].params
            for order in ORDERS.values()
        ]
        return [tree_math.norm(tree_math.add_scaled(p, -1, end)) for p in paths]

    records: list[Record] = []
    with jax.enable_x64(True):
        one_batch = jax.tree.map(lambda x: x[None], problem.whole)
        arrays = _in_float64((problem.init(0), one_batch))
        for rho in RADII:
            found = distances(*arrays, jnp.asarray(rho))
            records += _errors("sam", FULL_BATCH_STEPS, rho, found)
    return records


def moments(
    problem: Problem, rho: float, learning_rate: float, num_paths: int
) -> list[Record]:
    """First and second moments over paths from one start, with Monte Carlo errors."""
    params = problem.init(0)
    v = _eigenvector(problem)
    f = lambda p: problem.value_fn(p, problem.whole)

    def observe(params: PyTree) -> jax.Array:
        value, gradient = jax.value_and_grad(f)(params)
        curvature = tree_math.vdot(v, hessian.hvp(f, params, v))
        squares = [tree_math.vdot(x, x) for x in (gradient, params)]
        return jnp.stack([value, *squares, curvature, tree_math.vdot(v, params)])

    @partial(jax.jit, static_argnums=0)
    def ends(method: str, keys: jax.Array) -> jax.Array:
        advance = make_advance(problem, method, learning_rate, MOMENT_STEPS)
        state, scalars = start(method, params), (jnp.float32(rho), jnp.float32(0))
        found: jax.Array = jax.lax.map(
            lambda key: observe(advance(key, state, *scalars)[0]), keys
        )
        return found

    names = [(name, power) for power in (1, 2) for name in OBSERVABLES]
    methods, records = ("sam", *ORDERS), list[Record]()
    keys = jax.random.split(jax.random.key(0), (len(methods), num_paths))
    for method, of_method in zip(methods, keys, strict=True):
        seen = np.asarray(ends(method, of_method), np.float64)
        powers = np.concatenate([seen, seen**2], axis=1)
        errors = powers.std(0, ddof=1) / np.sqrt(num_paths)
        shared = {"optimizer": method, "rho": rho, "steps": MOMENT_STEPS}
        shared["paths"] = num_paths
        figures = zip(names, powers.mean(0).tolist(), errors.tolist(), strict=True)
        records += [
            {**shared, "observable": x, "power": n, "mean": mean, "error": error}
            for (x, n), mean, error in figures
        ]
    return records


def costs(problem: Problem, rho: float) -> list[Record]:
    """The operations and time of a drift by order, in gradients.

    Operations are of one batch, since the compiler counts a loop's body once. Times are
    of all batches: medians over turns.
    """
    params = problem.init(0)
    one = jax.tree.map(lambda x: x[:1], problem.batches)

    def gradient(params: PyTree, batches: PyTree) -> PyTree:
        of_batch = lambda batch: jax.grad(lambda p: problem.value_fn(p, batch))(params)
        return _expansion.batch_mean(of_batch, batches)

    def drift(order: sde.Order, params: PyTree, batches: PyTree) -> PyTree:
        return sde.drift(problem.value_fn, params, batches, rho, order)

    functions: dict[str, Any] = {"gradient": gradient}
    functions |= {name: partial(drift, order) for name, order in ORDERS.items()}
    counted = {
        name: programs.compile_program(function, params, one).costs.operations
        for name, function in functions.items()
    }
    compiled = {
        name: programs.compile_program(function, params, problem.batches).call
        for name, function in functions.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(_TURNS):
        for name, call in compiled.items():
            began = time.perf_counter()
            jax.block_until_ready(call(params, problem.batches))  # type: ignore[no-untyped-call]
            seconds[name].append(time.perf_counter() - began)
    median = {name: float(np.median(x)) for name, x in seconds.items()}
    return [
        {
            "optimizer": name,
            "operations": counted[name] / counted["gradient"],
            "time": median[name] / median["gradient"],
            "time_ms": 1e3 * median[name],
        }
        for name in functions
    ]


def _eigenvector(problem: Problem) -> PyTree:
    """The top eigenvector before training, from seed 0."""
    return problem.top_eigenpair(problem.init(0)).eigenvector


def _errors(
    optimizer: str, steps: int, rho: float, found: list[jax.Array]
) -> list[Record]:
    shared = {"optimizer": optimizer, "steps": steps, "rho": rho}
    return [
        {**shared, "order": order, "error": float(error)}
        for order, error in zip(ORDERS.values(), found, strict=True)
    ]


def _in_float64(tree: PyTree) -> PyTree:
    """Makes floating-point leaves float64, under `jax.enable_x64`."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        tree,
    )
