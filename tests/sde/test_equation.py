import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import dense_hessian, network

from eigensam_jax import perturbation, sde, tree_math

NUM_BATCHES = 5
BATCHES = jnp.arange(NUM_BATCHES)
ORDERS = (1, 2, 3)
FLAT = lambda tree: ravel_pytree(tree)[0]


def problem(seed):
    """Parameters in float64, and the top eigenvector of the mean loss's Hessian."""
    params, _ = network(seed, jnp.float64)
    _, vectors = np.linalg.eigh(mean_hessian(params))
    return params, ravel_pytree(params)[1](jnp.asarray(vectors[:, -1]))


def loss(params, index):
    return network(0, jnp.float64)[1](params, index)


@jax.jit
def mean_hessian(params):
    losses = lambda p: jax.vmap(lambda i: loss(p, i))(BATCHES)
    return dense_hessian(lambda p: jnp.mean(losses(p)), params)


@jax.jit
def computed(params, v, rho, alpha):
    """At each order the drift, flat; and Bᵀ, a row a batch."""
    kwargs = {"alpha": alpha, "eigenvector": v}
    drifts = [
        FLAT(sde.drift(loss, params, BATCHES, rho, order, **kwargs)) for order in ORDERS
    ]

    def root(order):
        column = lambda xi: FLAT(
            sde.diffusion(loss, params, BATCHES, rho, xi, order, **kwargs)
        )
        return jax.vmap(column)(jnp.eye(NUM_BATCHES))

    return drifts, [root(order) for order in ORDERS]


@jax.jit
def exact_gradients(params, v, rho, alpha):
    """∇f_γ(w + ε_γ) of every batch, a row each, by the formulas and nothing else."""
    flat, unravel = ravel_pytree(params)
    v = FLAT(v)

    def row(index):
        gradient = jax.grad(lambda x: loss(unravel(x), index))
        g = gradient(flat)
        u = g / jnp.linalg.norm(g)
        beside = v - (u @ v) * u
        return gradient(flat + rho * (u + alpha * jnp.sign(g @ v) * beside))

    return jax.vmap(row)(BATCHES)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_one_step_is_off_by_the_power_of_rho_that_the_order_says(alpha):
    """‖E[∇f_γ(w + ε_γ)] + b‖ over ρ, the expectation exact: slopes 1, 2 and 3."""
    radii = np.geomspace(1e-3, 1e-2, 5)
    with jax.enable_x64(True):
        for seed in range(3):
            params, v = problem(seed)
            errors = []
            for rho in radii.tolist():  # as other tests do: one compilation
                exact = exact_gradients(params, v, rho, alpha).mean(0)
                drifts, _ = computed(params, v, rho, alpha)
                errors.append([np.linalg.norm(exact + b) for b in drifts])
            slopes = np.polyfit(np.log(radii), np.log(errors), 1)[0]
            np.testing.assert_allclose(slopes, ORDERS, atol=0.05)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_covariance_of_the_noise_is_exact(alpha):
    """BBᵀ against Σ, by enumeration of the batches."""
    with jax.enable_x64(True):
        for seed in range(3):
            params, v = problem(seed)
            _, roots = computed(params, v, 0.3, alpha)
            radii = (0.0, 0.3, 0.3)  # SGD's noise at order 1, SAM's at 2 and 3
            for rho, root in zip(radii, map(np.asarray, roots), strict=True):
                rows = np.asarray(exact_gradients(params, v, rho, alpha))
                covariance = np.cov(rows.T, bias=True)
                np.testing.assert_allclose(
                    root.T @ root, covariance, atol=1e-12 * abs(covariance).max()
                )


def test_the_sign_of_v_does_not_matter_and_v_does():
    with jax.enable_x64(True):
        for seed in range(3):
            params, v = problem(seed)
            minus = tree_math.scale(-1, v)
            one, other = (computed(params, x, 0.1, 0.5)[0][2] for x in (v, minus))
            np.testing.assert_allclose(one, other, rtol=1e-12)
            sam = computed(params, v, 0.1, 0.0)[0][2]
            assert np.linalg.norm(one - sam) > 1e-3 * np.linalg.norm(sam)


@pytest.mark.slow
def test_where_no_v_is_given_it_is_found():
    find = jax.jit(
        lambda params: FLAT(sde.drift(loss, params, BATCHES, 0.1, alpha=0.5, tol=1e-10))
    )
    with jax.enable_x64(True):
        for seed in range(3):
            params, v = problem(seed)
            given = computed(params, v, 0.1, 0.5)[0][2]
            np.testing.assert_allclose(given, find(params), rtol=0, atol=1e-8)


def test_a_quadratic_needs_two_derivatives_and_a_cubic_three():
    rho, batches = 0.3, jnp.array([0.5, 1.0, 3.0])
    for power, enough in ((2, 2), (3, 3)):
        loss = lambda w, x, power=power: x * jnp.sum(w**power)
        w = jnp.array([1.0, 2.0])
        exact = jnp.mean(
            jnp.stack(
                [
                    jax.grad(loss)(
                        w + perturbation.sam(jax.grad(loss)(w, x), rho).epsilon, x
                    )
                    for x in batches
                ]
            ),
            axis=0,
        )
        for order in ORDERS:
            ours = -sde.drift(loss, w, batches, rho, order)
            close = np.allclose(ours, exact, rtol=1e-5)
            assert close == (order >= enough), (power, order)


def test_without_a_radius_it_is_gradient_flow_and_without_alpha_sam():
    with jax.enable_x64(True):
        params, v = problem(1)
        gradient = np.mean(exact_gradients(params, v, 0.0, 0.0), axis=0)
        for b in computed(params, v, 0.0, 0.5)[0]:
            np.testing.assert_allclose(-b, gradient, rtol=1e-10)
        drift = jax.jit(
            lambda params, v: FLAT(
                sde.drift(loss, params, BATCHES, 0.1, alpha=0, eigenvector=v)
            )
        )
        sam, traced = drift(params, v), computed(params, v, 0.1, 0.0)[0][2]
        np.testing.assert_allclose(sam, traced, rtol=1e-12)


def test_a_zero_gradient_moves_nothing_and_makes_no_nan():
    value_fn = lambda w, x: x * jnp.sum(w**2)
    w, x = jnp.zeros(3), jnp.ones(2)

    def moved(v):
        for alpha, order in itertools.product((0.0, 0.5), ORDERS):
            kwargs = {"alpha": alpha, "eigenvector": v}
            yield sde.drift(value_fn, w, x, 0.1, order, **kwargs)
            yield sde.diffusion(value_fn, w, x, 0.1, jnp.ones(2), order, **kwargs)

    for still in jax.jit(lambda v: [*moved(v)])(jnp.eye(3)[0]):
        np.testing.assert_array_equal(still, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": 4}, "order must be 1, 2 or 3, got 4"),
        ({"order": 0}, "where 1 is SGD"),
        ({"rho": -1.0}, "rho must be a finite number of at least 0"),
        ({"alpha": float("nan")}, "alpha must be a finite number"),
        ({"batches": jnp.zeros(())}, "stack batches of one size"),
        ({"params": jnp.arange(3)}, "params must be real floating-point"),
        ({"value_fn": lambda w, x: w}, "value_fn must return a scalar"),
        (
            {"alpha": 0.5, "eigenvector": jnp.ones(2)},
            "eigenvector must be a tree like params",
        ),
    ],
)
def test_what_can_not_be_meant_is_refused(change, message):
    right = {
        "value_fn": lambda w, x: x * jnp.sum(w**2),
        "params": jnp.ones(3),
        "batches": jnp.ones(2),
        "rho": 0.1,
    }
    for function in (sde.drift, sde.diffusion):
        more = {} if function is sde.drift else {"increments": jnp.ones(2)}
        with pytest.raises(ValueError, match=re.escape(message)):
            function(**{**right, **more, **change})


def test_increments_of_another_shape_are_refused():
    loss, w, x = (lambda w, x: x * w), jnp.array(1.0), jnp.ones(4)
    with pytest.raises(ValueError, match=re.escape("shape (4,), one for each batch")):
        sde.diffusion(loss, w, x, 0.1, jnp.ones(3))


@pytest.mark.parametrize(
    ("sizes", "most"),
    [((784, 64, 64, 10), (1.01, 2.75, 3.1)), ((128,) * 9, (1.01, 3.7, 6.3))],
    ids=["wide inputs", "deep"],
)
def test_a_drift_costs_a_few_gradients(sizes, most):
    """Of one batch, since the compiler counts the body of a loop once."""
    params = [
        jax.ShapeDtypeStruct(pair, "float32") for pair in itertools.pairwise(sizes)
    ]
    inputs = jax.ShapeDtypeStruct((1, 128, sizes[0]), "float32")

    def loss(params, x):
        for layer in params[:-1]:
            x = jnp.tanh(x @ layer)
        return jnp.mean(jax.nn.logsumexp(x @ params[-1], axis=1))

    def operations(function):
        compiled = jax.jit(function).lower(params, inputs).compile()
        return compiled.cost_analysis()["flops"]

    gradient = operations(lambda p, x: jax.grad(loss)(p, x[0]))
    for order, times in zip(ORDERS, most, strict=True):
        drift = lambda p, x, k=order: sde.drift(loss, p, x, 0.1, k)
        assert gradient <= operations(drift) <= times * gradient
