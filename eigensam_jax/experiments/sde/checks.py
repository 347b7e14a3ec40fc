"""How far the equation is from SAM, where that can be told: errors, moments, costs."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eigensam_jax import hessian, perturbation, sde, tree_math
from eigensam_jax.experiments.sde.problem import Problem
from eigensam_jax.experiments.sde.steps import ORDERS, make_advance, sam_gradient, start
from eigensam_jax.experiments.training import programs
from eigensam_jax.sde import expansion
from eigensam_jax.tree_math import PyTree

RADII = (0.0005, 0.001, 0.002, 0.004)
FULL_BATCH_STEPS = 50
MOMENT_STEPS = 10
OBSERVABLES = ("loss", "‖∇f‖²", "‖w‖²", "vᵀHv", "⟨v, w⟩")
_TURNS = 15

Record = dict[str, Any]


def one_step(problem: Problem, alpha: float) -> Record:
    """‖E[∇f_γ(w + ε_γ)] + b‖ over ρ, of SAM and Eigen-SAM, in float64.

    At the network before training, the expectation over all batches. Of each method and
    order the errors, one a radius, and the slope of their logarithms.
    """

    @jax.jit
    def errors(
        params: PyTree, batches: PyTree, v: PyTree, rho: jax.Array, alpha: jax.Array
    ) -> list[jax.Array]:
        def perturbed(batch: PyTree) -> PyTree:
            f = lambda p: problem.value_fn(p, batch)
            step = perturbation.eigen_sam(jax.grad(f)(params), v, rho, alpha)
            return jax.grad(f)(tree_math.add_scaled(params, 1, step.epsilon))

        exact = expansion.batch_mean(perturbed, batches)
        kwargs = {"alpha": alpha, "eigenvector": v}
        drifts = [
            sde.drift(problem.value_fn, params, batches, rho, order, **kwargs)
            for order in ORDERS.values()
        ]
        return [tree_math.norm(tree_math.add_scaled(exact, 1, b)) for b in drifts]

    v = _eigenvector(problem)
    with jax.enable_x64(True):
        params, batches = _in_float64((problem.init(0), problem.batches))
        v, found = _in_float64(v), {}
        for name, weight in (("sam", 0.0), ("eigen_sam", alpha)):
            table = [
                errors(params, batches, v, *map(jnp.asarray, (rho, weight)))
                for rho in RADII
            ]
            found[name] = _with_slopes(table)
        return {"radii": list(RADII), **found}


def many_steps(problem: Problem, learning_rate: float) -> Record:
    """Distance of discrete SAM on all images at once to Euler's paths, over ρ."""
    with jax.enable_x64(True):
        params = _in_float64(problem.init(0))
        whole = _in_float64(
            (problem.dataset.train_images[None], problem.dataset.train_labels[None])
        )

        def descend(params: PyTree, rho: jax.Array) -> PyTree:
            f = lambda p: problem.value_fn(p, jax.tree.map(lambda x: x[0], whole))

            def step(params: PyTree, _: None) -> tuple[PyTree, None]:
                gradient = sam_gradient(f, params, rho)
                return tree_math.add_scaled(params, -learning_rate, gradient), None

            return jax.lax.scan(step, params, length=FULL_BATCH_STEPS)[0]

        @jax.jit
        def distances(params: PyTree, rho: jax.Array) -> list[jax.Array]:
            end = descend(params, rho)
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

        table = [distances(params, jnp.asarray(rho)) for rho in RADII]
        return {
            "radii": list(RADII),
            "steps": FULL_BATCH_STEPS,
            "sam": _with_slopes(table),
        }


def moments(
    problem: Problem, rho: float, learning_rate: float, num_paths: int
) -> Record:
    """First and second moments over paths of `MOMENT_STEPS` steps from one start.

    Of each observable and moment: SAM's mean, its Monte Carlo error, and by how many
    standard errors of the difference each equation's is off.
    """
    params = problem.init(0)
    v = _eigenvector(problem)
    whole = (problem.dataset.train_images, problem.dataset.train_labels)
    f = lambda p: problem.value_fn(p, whole)

    def observe(params: PyTree) -> jax.Array:
        value, gradient = jax.value_and_grad(f)(params)
        curvature = tree_math.vdot(v, hessian.hvp(f, params, v))
        squares = [tree_math.vdot(x, x) for x in (gradient, params)]
        return jnp.stack([value, *squares, curvature, tree_math.vdot(v, params)])

    def path(method: str) -> Callable[[jax.Array], jax.Array]:
        advance = make_advance(problem, method, learning_rate, MOMENT_STEPS)
        state, radius = start(method, params), jnp.float32(rho)
        return lambda key: observe(advance(key, state, radius, jnp.float32(0))[0])

    paths = {name: path(name) for name in ("sam", *ORDERS)}
    keys = jax.random.split(jax.random.key(0), (len(paths), num_paths))
    mean, error = {}, {}
    for of_path, (name, follow) in zip(keys, paths.items(), strict=True):
        run = jax.jit(lambda keys, follow=follow: jax.lax.map(follow, keys))
        seen = np.asarray(run(of_path), np.float64)
        powers = np.concatenate([seen, seen**2], axis=1)
        mean[name] = powers.mean(0)
        error[name] = powers.std(0, ddof=1) / np.sqrt(num_paths)
    return {
        "paths": num_paths,
        "steps": MOMENT_STEPS,
        "rho": rho,
        "observables": list(OBSERVABLES),
        **{
            name: {
                "mean": mean[name].tolist(),
                "error": error[name].tolist(),
                "off": (
                    (mean[name] - mean["sam"]) / np.hypot(error[name], error["sam"])
                ).tolist(),
            }
            for name in paths
        },
    }


def costs(problem: Problem, rho: float) -> Record:
    """A drift in gradients, by order: operations of a batch, times of all batches.

    Operations are those that the compiler counts, of one batch, as it would count a
    loop's body once. Times are medians of turns, each a ratio to the gradient's.
    """
    params = problem.init(0)
    one = jax.tree.map(lambda x: x[:1], problem.batches)

    def gradient(params: PyTree, batches: PyTree) -> PyTree:
        of_batch = lambda batch: jax.grad(lambda p: problem.value_fn(p, batch))(params)
        return expansion.batch_mean(of_batch, batches)

    def drift(order: sde.Order) -> Callable[[PyTree, PyTree], PyTree]:
        return lambda params, batches: sde.drift(
            problem.value_fn, params, batches, rho, order
        )

    functions = {
        "gradient": gradient,
        **{name: drift(order) for name, order in ORDERS.items()},
    }
    counted = {
        name: programs.compile_program(function, params, one).costs.operations
        for name, function in functions.items()
    }
    compiled = {name: jax.jit(function) for name, function in functions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(_TURNS + 1):
        for name, function in compiled.items():
            began = time.perf_counter()
            jax.block_until_ready(function(params, problem.batches))  # type: ignore[no-untyped-call]
            if turn:  # the first compiles
                seconds[name].append(time.perf_counter() - began)
    median = {name: float(np.median(x)) for name, x in seconds.items()}
    return {
        name: {
            "operations": counted[name] / counted["gradient"],
            "time": median[name] / median["gradient"],
            "time_ms": 1e3 * median[name],
        }
        for name in functions
    }


def _eigenvector(problem: Problem) -> PyTree:
    """The top one before training, from seed 0."""
    params = problem.init(0)
    return problem.top_eigenpair(params, tree_math.zeros_like(params)).eigenvector


def _with_slopes(table: list[list[jax.Array]]) -> Record:
    """Errors by order, a row a radius, and the slopes of their logarithms."""
    errors = np.array(table, np.float64)
    slopes = np.polyfit(np.log(RADII), np.log(errors), 1)[0]
    return {"errors": errors.T.tolist(), "slopes": slopes.tolist()}


def _in_float64(tree: PyTree) -> PyTree:
    """The same with floating-point leaves in float64, under `jax.enable_x64`."""
    return jax.tree.map(
        lambda x: (
            jnp.asarray(np.asarray(x, np.float64))
            if jnp.issubdtype(x.dtype, jnp.floating)
            else x
        ),
        tree,
    )
