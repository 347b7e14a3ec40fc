"""Until a refresh has succeeded there is no v, and the steps are those of `sam`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import network

from eigensam_jax import eigen_sam, sam, trackers, tree_math

TRACKERS = {
    "power_iteration": trackers.power_iteration(2, update_interval=3),
    "lanczos": trackers.lanczos(2, update_interval=3),
}


def gradient_without_hessian(value_fn, factor):
    """The gradient of `value_fn`, whose Hessian-vector products are times `factor`."""

    @jax.custom_jvp
    def gradient(params):
        return jax.grad(value_fn)(params)

    @gradient.defjvp
    def _(primals, tangents):
        out, product = jax.jvp(jax.grad(value_fn), primals, tangents)
        return out, jax.tree.map(lambda x: factor * x, product)

    return gradient


def both(tracker, factors, **kwargs):
    """Parameters of `eigen_sam` and `sam` before each step, and the tracker's state."""
    params, loss = network()
    links = [
        optax.chain(x, optax.sgd(0.1)) for x in (eigen_sam(0.1, 0.5, tracker), sam(0.1))
    ]

    def step(tx, params, state, batch, factor):
        grad_fn = gradient_without_hessian(lambda p: loss(p, batch), factor)
        grads = grad_fn(params)
        updates, state = tx.update(grads, state, params, grad_fn=grad_fn, **kwargs)
        return optax.apply_updates(params, updates), state

    steps = [jax.jit(lambda *a, tx=tx: step(tx, *a)) for tx in links]
    at = [(params, tx.init(params)) for tx in links]
    seen = [(params, params, at[0][1][0].tracker)]
    for i, factor in enumerate(factors):
        at = [s(*x, i % 5, jnp.float32(factor)) for s, x in zip(steps, at, strict=True)]
        seen.append((at[0][0], at[1][0], at[0][1][0].tracker))
    return seen


def assert_is_sam(seen):
    for ours, theirs, tracked in seen:
        chex.assert_trees_all_equal(ours, theirs)
        assert not any(map(jnp.any, jax.tree.leaves(tracked.eigenvector)))
        assert tracked.eigenvalue == tracked.residual == 0


@pytest.mark.parametrize("name", TRACKERS)
def test_where_the_hessian_is_never_finite_it_is_sam_for_ever(name):
    assert_is_sam(both(TRACKERS[name], [jnp.inf] * 10))


@pytest.mark.parametrize("name", TRACKERS)
def test_v_appears_at_the_next_refresh_that_is_good(name):
    seen = both(TRACKERS[name], [jnp.inf] + [1.0] * 5)
    assert_is_sam(seen[:4])  # the second refresh is on step 3
    ours, theirs, tracked = seen[4]
    np.testing.assert_allclose(tree_math.norm(tracked.eigenvector), 1, rtol=1e-6)
    assert tree_math.norm(tree_math.add_scaled(ours, -1, theirs)) > 1e-4


@pytest.mark.parametrize("name", TRACKERS)
def test_a_refresh_that_is_switched_off_from_the_start_leaves_sam(name):
    assert_is_sam(both(TRACKERS[name], [1.0] * 5, refresh=False))


@pytest.mark.parametrize("name", TRACKERS)
def test_of_a_zero_hessian_it_is_sam(name):
    linear = lambda w: jnp.dot(w, jnp.array([3.0, 4.0]))
    w = jnp.array([1.0, 2.0])
    tx, plain = eigen_sam(0.1, 0.5, TRACKERS[name]), sam(0.1)
    state, of_sam = tx.init(w), plain.init(w)
    grads = jax.grad(linear)(w)
    eager = lambda *args: tx.update(*args, value_fn=linear)
    for update in (eager, jax.jit(eager)):
        for _ in range(4):
            updates, state = update(grads, state, w)
            expected, of_sam = plain.update(grads, of_sam, w, value_fn=linear)
            np.testing.assert_array_equal(updates, expected)
            assert not jnp.any(state.tracker.eigenvector)
            assert state.tracker.eigenvalue == 0
