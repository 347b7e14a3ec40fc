"""Derivatives through training steps, as meta-learning takes them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from links import LINKS
from problems import network

STEPS = 4
UNROLLED = ("sam", "secant")  # what the others do is the same, and takes minutes
each_link = pytest.mark.parametrize("name", LINKS)


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
        *((name, True) for name in LINKS),
        *(
            pytest.param(
                name, False, marks=() if name in UNROLLED else pytest.mark.slow
            )
            for name in LINKS
        ),
    ],
)
def test_derivatives_are_those_of_finite_differences(name, scans):
    with jax.enable_x64(True):
        params, loss = network(dtype=jnp.float64)
        function = trained_loss(name, loss, scans)
        at = params, jnp.float64(0.2)
        flat, unravel = ravel_pytree(at)
        direction = jnp.asarray(np.random.default_rng(0).normal(size=flat.size))
        of_flat = jax.jit(lambda x: function(*unravel(x)))
        gradient = jax.jit(jax.grad(of_flat))(flat)
        forward = jax.jit(lambda x, t: jax.jvp(of_flat, (x,), (t,))[1])
        step = 1e-5

        def difference(along):
            return (of_flat(flat + step * along) - of_flat(flat - step * along)) / (
                2 * step
            )

        along_rho = jnp.zeros_like(flat).at[-1].set(1)  # the last of the tree
        for along in (direction, along_rho):
            exact = difference(along)
            assert abs(exact) > 1e-4
            np.testing.assert_allclose(gradient @ along, exact, rtol=1e-5)
            np.testing.assert_allclose(forward(flat, along), exact, rtol=1e-5)


@each_link
def test_derivatives_at_a_zero_gradient_are_finite(name):
    bowl = lambda w, _: jnp.sum(jnp.array([1.0, 2.0, 3.0]) * (w - 1) ** 2)
    function = trained_loss(name, bowl, True)
    for w in (jnp.ones(3), jnp.zeros(3)):
        at = w, jnp.float32(0.1)
        for derivative in (jax.grad, jax.jacfwd):
            rates = jax.jit(derivative(function, argnums=(0, 1)))(*at)
            assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(rates))


@each_link
def test_derivatives_where_all_eigenvalues_are_the_same_are_finite(name):
    ball = lambda w, _: 1.5 * jnp.sum((w - 1) ** 2)
    function = trained_loss(name, ball, True)
    at = jnp.array([0.5, 2.0, -1.0]), jnp.float32(0.1)
    for derivative in (jax.grad, jax.jacfwd):
        rates = jax.jit(derivative(function, argnums=(0, 1)))(*at)
        assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(rates))
