"""Derivatives through training steps, as meta-learning takes them."""

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from links import LINKS
from problems import network

STEPS, UNROLLED = 4, 3
# What the others do is the same, and takes minutes; the derivatives of Lanczos' method
# by itself are in eigen/test_solvers.py.
FAST = [
    *((name, True) for name in ("sam", "asam", "secant", "power_iteration", "ritz")),
    ("sam", False),
]
# Their programs are large: their parameters are one vector, of the others a tree.
WITH_PRODUCTS = ("power_iteration", "lanczos", "ritz")
each_link = pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=pytest.mark.slow if x in ("secant_2", "lanczos") else ())
        for x in LINKS
    ],
)


def trained_loss(name, loss, scans, steps=STEPS):
    """(params, ρ) -> the loss after some steps, by `scan` or written out."""

    def after_training(params, rho):
        _, *others = LINKS[name].args
        tx = optax.chain(LINKS[name].func(rho, *others), optax.sgd(0.3, momentum=0.9))

        def step(carry, batch):
            params, state = carry
            value_fn = lambda p: loss(p, batch)
            grads = jax.grad(value_fn)(params)
            updates, state = tx.update(grads, state, params, value_fn=value_fn)
            return (optax.apply_updates(params, updates), state), None

        carry = params, tx.init(params)
        if scans:
            carry, _ = jax.lax.scan(step, carry, jnp.arange(steps))
        else:
            for batch in range(steps):
                carry, _ = step(carry, jnp.int32(batch))
        return loss(carry[0], jnp.int32(4))

    return after_training


@pytest.mark.parametrize(
    ("name", "scans"),
    [
        pytest.param(*row, marks=() if row in FAST else pytest.mark.slow)
        for row in itertools.product(LINKS, (True, False))
    ],
)
def test_derivatives_are_those_of_finite_differences(name, scans):
    with jax.enable_x64(True):
        params, loss = network(dtype=jnp.float64)
        if name in WITH_PRODUCTS:
            params, unravel_params = ravel_pytree(params)
            of_tree, loss = loss, lambda x, batch: of_tree(unravel_params(x), batch)
        function = trained_loss(name, loss, scans, STEPS if scans else UNROLLED)
        at = params, jnp.float64(0.2)
        flat, unravel = ravel_pytree(at)
        direction = jnp.asarray(np.random.default_rng(0).normal(size=flat.size))
        of_flat = lambda x: function(*unravel(x))
        gradient = jax.jit(jax.grad(of_flat))(flat)
        forward = jax.jit(lambda x, t: jax.jvp(of_flat, (x,), (t,)))
        step = 1e-5

        def difference(along):
            value = lambda h: forward(flat + h * along, along)[0]
            return (value(step) - value(-step)) / (2 * step)

        along_rho = jnp.zeros_like(flat).at[-1].set(1)  # the last of the tree
        for along in (direction, along_rho):
            exact = difference(along)
            assert abs(exact) > 1e-4
            np.testing.assert_allclose(gradient @ along, exact, rtol=1e-5)
            np.testing.assert_allclose(forward(flat, along)[1], exact, rtol=1e-5)


@cache
def derivatives_of_a_bowl(name):
    """(w, ρ, eigenvalues) -> the derivatives by w and ρ, backwards and forwards."""

    def function(w, rho, eigenvalues):
        bowl = lambda w, _: 0.5 * jnp.sum(eigenvalues * (w - 1) ** 2)
        return trained_loss(name, bowl, True)(w, rho)

    return [jax.jit(of(function, argnums=(0, 1))) for of in (jax.grad, jax.jacfwd)]


def assert_derivatives_are_finite(name, w, eigenvalues):
    for derivative in derivatives_of_a_bowl(name):
        rates = derivative(w, jnp.float32(0.1), jnp.array(eigenvalues))
        assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(rates))


@each_link
def test_derivatives_at_a_zero_gradient_are_finite(name):
    for w in (jnp.ones(3), jnp.zeros(3)):
        assert_derivatives_are_finite(name, w, [2.0, 4.0, 6.0])


@pytest.mark.parametrize("name", ["sam", "asam", "secant"])
def test_at_a_zero_gradient_the_derivative_is_that_of_the_plain_one(name):
    """ε and its derivatives are 0 there, so that of the update is the Hessian."""
    curvatures, tx = jnp.array([2.0, -1.0, 3.0]), LINKS[name]()
    value_fn = lambda w: jnp.sum(curvatures * (w - 1) ** 2) / 2
    update = lambda w: tx.update(
        jax.grad(value_fn)(w), tx.init(w), w, value_fn=value_fn
    )[0]
    for jacobian in (jax.jacfwd, jax.jacrev):
        np.testing.assert_array_equal(
            jacobian(update)(jnp.ones(3)), jnp.diag(curvatures)
        )


@each_link
def test_derivatives_where_all_eigenvalues_are_the_same_are_finite(name):
    w = jnp.array([0.5, 2.0, -1.0])
    assert_derivatives_are_finite(name, w, [3.0, 3.0, 3.0])
