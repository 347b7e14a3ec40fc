import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import dense_hessian, network

from eigensam_jax import perturbation, sde, tree_math

ORDERS = (1, 2, 3)


def loss(params, index):
    return network(0, jnp.float64)[1](params, index)


def mean_hessian(params, batches):
    losses = lambda p: jax.vmap(lambda i: loss(p, i))(batches)
    return dense_hessian(lambda p: jnp.mean(losses(p)), params)


def sam_step(params, index, rho, alpha, eta, v):
    """One step of the discrete method, by the library's perturbation."""
    gradient = jax.grad(lambda p: loss(p, index))
    step = perturbation.eigen_sam(gradient(params), v, rho, alpha)
    moved = tree_math.add_scaled(params, 1, step.epsilon)
    return tree_math.add_scaled(params, -eta, gradient(moved))


@pytest.mark.parametrize("alpha", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_many_steps_are_off_by_the_power_of_rho_that_the_order_says(alpha):
    """Discrete SAM on one batch against Euler's path: slopes 1, 2 and 3 again.

    Those of Eigen-SAM at order 1 are SGD's, as SAM's.
    """
    orders = (2, 3) if alpha else ORDERS
    radii, eta, num_steps = np.geomspace(3e-3, 3e-2, 4), 0.1, 30
    batches = jnp.arange(1)

    @jax.jit
    def distances(params, rho):
        unravel = ravel_pytree(params)[1]

        def advance(params, _):
            v = jnp.zeros_like(ravel_pytree(params)[0])
            if alpha:
                v = jnp.linalg.eigh(mean_hessian(params, batches))[1][:, -1]
            return sam_step(params, 0, rho, alpha, eta, unravel(v)), None

        end, _ = jax.lax.scan(advance, params, length=num_steps)

        def distance(order):
            state, info = sde.simulate(
                *(jax.random.key(0), loss, sde.start(params), batches),
                rho=rho,
                eta=eta,
                num_steps=num_steps,
                order=order,
                alpha=alpha,
                tol=1e-10,
            )
            difference = tree_math.add_scaled(state.params, -1, end)
            return tree_math.norm(difference), info

        pairs = [distance(order) for order in orders]
        return jnp.stack([distance for distance, _ in pairs]), pairs[-1][1]

    with jax.enable_x64(True):
        for seed in range(3):
            params, _ = network(seed, jnp.float64)
            table, infos = zip(*(distances(params, rho) for rho in radii), strict=True)
            slopes = np.polyfit(np.log(radii), np.log(table), 1)[0]
            np.testing.assert_allclose(slopes, orders, atol=0.3)
            for info in infos if alpha else ():
                assert max(info.residual / info.eigenvalue) < 1e-9


def moments(observed):
    """First and second moments of each column, with their Monte Carlo errors."""
    powers = np.concatenate([observed, observed**2], axis=1)
    return powers.mean(0), powers.std(0, ddof=1) / np.sqrt(len(powers))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_moments_over_paths_are_those_of_discrete_sam(seed):
    """1,000 paths each: loss, λ_max, ‖w‖², ‖∇f‖² and one weight after 20 steps.

    The equation of order 3 agrees within the Monte Carlo error, those of order 1 and 2
    do not.
    """
    rho, eta, num_steps, num_paths = 0.2, 0.05, 20, 1_000
    batches = jnp.arange(5)

    def observe(params):
        flat, unravel = ravel_pytree(params)
        mean = lambda x: jnp.mean(jax.vmap(lambda i: loss(unravel(x), i))(batches))
        value, gradient = jax.value_and_grad(mean)(flat)
        top = jnp.linalg.eigvalsh(mean_hessian(params, batches))[-1]
        return jnp.stack([value, top, flat @ flat, gradient @ gradient, flat[0]])

    def discrete(key, params):
        drawn = jax.random.randint(key, (num_steps,), 0, len(batches))
        zero = tree_math.zeros_like(params)
        step = lambda w, index: (sam_step(w, index, rho, 0.0, eta, zero), None)
        return observe(jax.lax.scan(step, params, drawn)[0])

    def simulated(order):
        def path(key, params):
            state, _ = sde.simulate(
                *(key, loss, sde.start(params), batches),
                rho=rho,
                eta=eta,
                num_steps=num_steps,
                order=order,
            )
            return observe(state.params)

        return path

    @jax.jit
    def many(params):
        paths = (discrete, *map(simulated, ORDERS))
        keys = jax.random.split(jax.random.key(seed), (len(paths), num_paths))
        return [
            jax.vmap(lambda key, path=path: path(key, params))(of_path)
            for path, of_path in zip(paths, keys, strict=True)
        ]

    with jax.enable_x64(True):
        params, _ = network(seed, jnp.float64)
        expected, *ours = (moments(np.asarray(x)) for x in many(params))
        scores = [
            abs(mean - expected[0]) / np.hypot(error, expected[1])
            for mean, error in ours
        ]
        assert max(scores[2]) < 4
        assert max(scores[0]) > 20
        assert max(scores[1]) > 5


@pytest.mark.parametrize("substeps", [1, 4])
def test_substeps_come_nearer_to_the_equation(substeps):
    """On ½x² with gradients x ± 1, of which Euler's steps have known moments."""
    eta, num_steps, num_paths = 0.5, 8, 4_000
    value_fn = lambda w, x: 0.5 * jnp.sum((w - x) ** 2)
    batches, start = jnp.array([[-1.0], [1.0]]), sde.start(jnp.array([3.0]))

    @jax.jit
    @jax.vmap
    def paths(key):
        return sde.simulate(
            *(key, value_fn, start, batches),
            rho=0.0,
            eta=eta,
            num_steps=num_steps,
            order=2,
            substeps=substeps,
            observe=lambda state, info: (state.params[0], state.time, info.value),
        )

    ends, (observed, times, values) = paths(
        jax.random.split(jax.random.key(substeps), num_paths)
    )
    np.testing.assert_allclose(times[0], eta * np.arange(1, num_steps + 1), rtol=1e-6)
    np.testing.assert_array_equal(ends.params[:, 0], observed[:, -1])
    dt = eta / substeps
    factor = (1 - dt) ** substeps
    kept = factor ** np.arange(1, num_steps + 1)
    mean, variance = 3 * kept, eta * dt * (1 - kept**2) / (1 - (1 - dt) ** 2)
    errors = np.sqrt(variance / num_paths)
    assert max(abs(observed.mean(0) - mean) / errors) < 4
    spread = variance * np.sqrt(2 / num_paths)
    assert max(abs(observed.var(0) - variance) / spread) < 4
    if substeps == 1:  # the last substep starts where the step before ended
        np.testing.assert_allclose(
            values[:, 1:], 0.5 * observed[:, :-1] ** 2 + 0.5, rtol=1e-5
        )


@pytest.mark.parametrize("order", [2, 3])
def test_a_step_reports_the_norms_of_its_drift_and_of_its_noise(order):
    value_fn = lambda w, x: jnp.sum(jnp.cosh(w * x))
    w, batches, rho = jnp.array([0.5, -1.0]), jnp.array([0.5, 1.0, 2.0]), 0.3
    rows = []
    for x in batches:
        gradient = jax.grad(lambda w, x=x: value_fn(w, x))
        rows.append(gradient(w + perturbation.sam(gradient(w), rho).epsilon))
    variance = np.trace(np.cov(np.transpose(rows), bias=True))
    step = sde.make_step(value_fn, batches, rho=rho, eta=0.1, order=order)
    keys = jax.random.split(jax.random.key(0), 4000)
    _, info = jax.vmap(lambda key: step(key, sde.start(w), 0.1))(keys)
    # The standard error of the mean is at most √(2/4000) of it, 2%.
    np.testing.assert_allclose(np.mean(info.noise_norm**2), variance, rtol=0.1)
    drift = sde.drift(value_fn, w, batches, rho, order)
    np.testing.assert_allclose(info.drift_norm[0], np.linalg.norm(drift), rtol=1e-5)


def test_a_path_is_one_step_after_another():
    params, key = {"a": jnp.ones(2), "b": jnp.zeros(())}, jax.random.key(3)
    batches = jnp.linspace(-1, 2, 5)

    def small(params, x):
        return jnp.sum(jnp.tanh(params["a"] - x) ** 2 + params["a"] * params["b"])

    start, options = sde.start(params), {"rho": 0.1, "eta": 0.2}
    one_step = jax.jit(sde.make_step(small, batches, **options))
    state, norms = start, []
    for keys in jax.random.split(key, (3, 2)):
        for of_step in keys:
            state, info = one_step(of_step, state, 0.1)
        norms.append(info.drift_norm)
    run = jax.jit(
        lambda key: sde.simulate(
            key, small, start, batches, num_steps=3, substeps=2, **options
        )
    )
    end, infos = run(key)
    chex.assert_trees_all_close(end, state, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(infos.drift_norm, norms, rtol=1e-4)
    np.testing.assert_allclose(end.time, 0.6, rtol=1e-6)
    other, _ = run(jax.random.key(4))
    moved = tree_math.add_scaled(other.params, -1, end.params)
    assert tree_math.norm(moved) > 1e-3


@pytest.mark.parametrize("order", ORDERS)
def test_parameters_keep_their_dtype(order):
    dtype = jnp.bfloat16
    value_fn = lambda w, x: jnp.sum((w["a"] - x) ** 2).astype("float32")
    params = {"a": jnp.ones(2, dtype)}
    state, info = jax.jit(
        lambda key: sde.simulate(
            *(key, value_fn, sde.start(params), jnp.ones((3, 2), dtype)),
            rho=0.1,
            eta=0.1,
            num_steps=2,
            order=order,
        )
    )(jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(state.params, params)
    assert state.time.dtype == jnp.float32
    assert info.drift_norm.shape == (2,)
    assert info.eigenvalue is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, "num_steps must be an integer of at least 1"),
        ({"substeps": 1.5}, "substeps must be an integer of at least 1"),
        ({"eta": -1.0}, "eta must be a finite number of at least 0"),
        ({"alpha": -0.5}, "alpha must be a finite number of at least 0"),
        ({"order": 4}, "order must be 1, 2 or 3"),
    ],
)
def test_what_can_not_be_meant_is_refused(change, message):
    right = {
        "key": jax.random.key(0),
        "value_fn": lambda w, x: x * jnp.sum(w**2),
        "state": sde.start(jnp.ones(2)),
        "batches": jnp.ones(2),
        "rho": 0.1,
        "eta": 0.1,
        "num_steps": 1,
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        sde.simulate(**{**right, **change})


@pytest.mark.parametrize("change", [{"rho": -1.0}, {"alpha": -1.0}, {"order": 4}])
def test_a_step_of_no_method_is_refused_when_it_is_made(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} must be"):
        sde.make_step(jnp.dot, jnp.ones(2), **{"rho": 0.1, "eta": 0.1, **change})
