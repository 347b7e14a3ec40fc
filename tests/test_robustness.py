"""What trackers withstand inside `eigen_sam`: batches, scales, dtypes and callers."""

import collections
from functools import cache, partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from links import LINKS
from problems import flatten, network

from eigensam_jax import eigen_sam, trackers, tree_math

TRACKERS = {
    "power_iteration": trackers.power_iteration(5, update_interval=2),
    "lanczos": trackers.lanczos(5, update_interval=2),
    "secant": trackers.secant(),
    "ritz": trackers.ritz(update_interval=2),
}

# --- what the secant's λ and its gate withstand ---------------------------------------


def secant_on_random_batches(alpha, factors, key, rho=0.05, decay=0.95):
    """Steps whose batches have `factors` times one Hessian, and gradients at random.

    Of each: λ before it, vᵀHv of its v, and whether the α-term was on.
    """
    spectrum = jnp.array([-0.3, 0.1, 0.5, 1.0, 2.0], factors.dtype)
    tx = eigen_sam(rho, alpha, trackers.secant(decay))
    w = jnp.zeros_like(spectrum)

    def step(state, given):
        factor, key = given
        g = jax.random.normal(key, w.shape, w.dtype)
        grad_fn = lambda p: g + factor * spectrum * p
        tracked = state.tracker
        quotient = jnp.sum(spectrum * tracked.eigenvector**2)
        _, state = tx.update(g, state, w, grad_fn=grad_fn)
        radius = rho(state.num_updates - 1) if callable(rho) else rho
        is_on = state.info.perturbation_norm > radius * (1 + 1e-6)
        return state, (tracked.eigenvalue, quotient, is_on)

    keys = jax.random.split(key, len(factors))
    return jax.lax.scan(step, tx.init(w), (factors, keys))[1]


@jax.jit
@partial(jax.vmap, in_axes=(None, 0, None))
@partial(jax.vmap, in_axes=(None, None, 0))
def steps_off(alpha, strength, key):
    """How many steps are without the α-term from a strong batch on, and before."""
    factors = jnp.ones(400).at[200].set(-strength)
    *_, is_on = secant_on_random_batches(alpha, factors, key)
    return jnp.sum(~is_on[200:]), jnp.sum(~is_on[1:200])


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0])
def test_one_batch_of_any_strength_switches_the_secant_off_for_30_steps_at_most(alpha):
    strengths = jnp.array([1e3, 1e5, 1e8])
    keys = jax.random.split(jax.random.key(0), 5)
    after, before = steps_off(jnp.float32(alpha), strengths, keys)
    assert after.max() <= 30
    assert before.max() <= 10


def test_the_secants_eigenvalue_follows_when_radius_and_curvature_change_together():
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 5)
        factors = jnp.where(jnp.arange(401) < 300, 1.0, 3.0)
        rho = lambda count: jnp.where(count < 300, 0.05, 0.001)
        run = lambda key: secant_on_random_batches(0.5, factors, key, rho)
        eigenvalue, quotient, _ = jax.jit(jax.vmap(run))(keys)
        np.testing.assert_allclose(eigenvalue[:, -1], 3 * quotient[:, -1], rtol=0.2)
        np.testing.assert_allclose(eigenvalue[:, 300], quotient[:, 300], rtol=0.2)


def test_the_secants_eigenvalue_is_that_of_the_mean_hessian():
    """Of curvature that scatters by a lognormal factor with σ = 1, in float32."""
    keys = jax.random.split(jax.random.key(0), 5)

    @jax.jit
    @jax.vmap
    def run(key):
        own, key = jax.random.split(key)
        factors = jnp.exp(jax.random.normal(own, (3000,)))
        eigenvalue, quotient, _ = secant_on_random_batches(0.5, factors, key)
        return eigenvalue[200:].mean(), (factors.mean() * quotient[200:]).mean()

    eigenvalue, expected = run(keys)
    np.testing.assert_allclose(eigenvalue, expected, rtol=0.2)


# --- what a scaled loss changes -------------------------------------------------------


@cache
def on_a_scaled_loss(name):
    """From a factor of the loss to the state after 12 steps, and the radii."""
    params, loss = network()
    tx = eigen_sam(0.1, 0.5, TRACKERS[name])

    @jax.jit
    def run(factor):
        def step(state, batch):
            value_fn = lambda p: factor * loss(p, batch)
            grads = jax.grad(value_fn)(params)
            _, state = tx.update(grads, state, params, value_fn=value_fn)
            return state, state.info.perturbation_norm

        return jax.lax.scan(step, tx.init(params), jnp.arange(12) % 5)

    return run


@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1e18, 1e20, 1e30])
@pytest.mark.parametrize("name", TRACKERS)
def test_a_scaled_loss_has_the_same_perturbation_and_vector(name, factor):
    run = on_a_scaled_loss(name)
    state, radii = run(jnp.float32(factor))
    expected, expected_radii = run(jnp.float32(1))
    np.testing.assert_allclose(radii, expected_radii, rtol=1e-3)
    assert radii.min() > 0.0999
    v, expected_v = (flatten(s.tracker.eigenvector) for s in (state, expected))
    assert abs(v @ expected_v) > 0.9999
    assert expected.tracker.eigenvalue > 0.1
    for field in ("eigenvalue", "residual"):
        got, of_one = (getattr(s.tracker, field) for s in (state, expected))
        np.testing.assert_allclose(got / factor, of_one, rtol=1e-2)


# --- how v is kept --------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def cosine_by_a_long_memory(dtype, key, top):
    """Of v with the top eigenvector after 4,000 steps."""
    tx = eigen_sam(0.1, 1.0, trackers.secant(0.999), eigenvector_dtype=dtype)
    w = jnp.zeros_like(top)

    def step(state, key):
        g = jax.random.normal(key, w.shape)
        # The identity, and 20 along the top.
        grad_fn = lambda p: g + p + 19 * top * (top @ p)
        return tx.update(g, state, w, grad_fn=grad_fn)[1], None

    state, _ = jax.lax.scan(step, tx.init(w), jax.random.split(key, 4_000))
    v = state.tracker.eigenvector
    assert v.dtype == dtype
    return jnp.abs(v.astype(jnp.float32) @ top)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
)
def test_v_in_bfloat16_keeps_the_increments_of_a_long_memory(seed):
    keys = jax.random.split(jax.random.key(seed), 2)
    top = jax.random.normal(keys[0], (500,))
    top /= jnp.linalg.norm(top)
    exact, kept = (
        cosine_by_a_long_memory(dtype, keys[1], top)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert exact > 0.5
    np.testing.assert_allclose(kept, exact, atol=0.05)


def test_every_vector_of_a_tracker_is_kept_in_its_dtype():
    params, loss = network()
    tx = eigen_sam(tracker=TRACKERS["ritz"], eigenvector_dtype=jnp.bfloat16)
    state, grads = tx.init(params), jax.grad(loss)(params)
    update = jax.jit(lambda s: tx.update(grads, s, params, value_fn=loss))
    for _ in range(4):
        _, after = update(state)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        state = after
    for vector in (state.tracker.eigenvector, state.tracker.companion):
        assert {x.dtype for x in jax.tree.leaves(vector)} == {jnp.dtype(jnp.bfloat16)}
        np.testing.assert_allclose(tree_math.norm(vector), 1, rtol=1e-2)


# --- shapes alone ---------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 1e-200, 1e-60, 1.0])
@pytest.mark.parametrize("narrow", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", LINKS)
def test_gradients_out_of_the_range_of_some_leaves_leave_all_finite(
    name, narrow, scale
):
    """Beside float64 a gradient may be 0 or 1e-200, which others cannot be."""
    with jax.enable_x64(True):
        params = {"a": jnp.ones(3, narrow), "b": jnp.ones(2)}
        value_fn = lambda p: scale * jnp.sum(p["b"] ** 2) + 0 * jnp.sum(p["a"])
        tx = LINKS[name]()
        state, grads = tx.init(params), jax.grad(value_fn)(params)
        for _ in range(3):
            updates, state = tx.update(grads, state, params, value_fn=value_fn)
            numbers = [
                x for x in jax.tree.leaves((updates, state)) if x.dtype.kind != "i"
            ]
            assert all(bool(jnp.isfinite(x).all()) for x in numbers)
        # f is a parabola along b, up which ε leads by the length ρ.
        np.testing.assert_array_equal(updates["a"], 0)
        assert (updates["b"] > grads["b"]).all() == (scale > 0)
        if name == "sam":
            further = (1 + 0.1 / np.sqrt(2)) * grads["b"]
            np.testing.assert_allclose(updates["b"], further, rtol=1e-6)


@pytest.mark.parametrize("name", LINKS)
def test_shapes_alone_are_enough(name):
    params, loss = network()
    tx = optax.chain(LINKS[name](), optax.adam(1e-3))
    shapes = jax.eval_shape(lambda: params)
    state = tx.init(shapes)
    chex.assert_trees_all_equal(state, tx.init(params))
    kinds = jax.eval_shape(tx.init, shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(kinds, state)
    update = lambda g, s, p: tx.update(g, s, p, value_fn=loss)
    after = jax.eval_shape(update, shapes, kinds, shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, (shapes, kinds))


# --- a tracker of one's own -----------------------------------------------------------


class Kept(NamedTuple):
    """State of a tracker of the test's own; `usable` is a field here."""

    eigenvector: list
    eigenvalue: jax.Array
    residual: jax.Array
    usable: jax.Array
    calls: jax.Array


@pytest.mark.parametrize(
    ("refresh", "refreshes"),
    [(None, [0, 4, 8]), (True, [*range(9)]), (False, [])],
)
def test_a_tracker_is_called_when_it_is_due_and_sees_lists(refresh, refreshes):
    """A refresh fixed at trace time leaves `observe`, of another interval, alone."""
    params, loss = network()
    mask = {"hidden": {"w": True, "b": False}, "out": True}
    chosen = [params["hidden"]["w"], params["out"]["w"]]

    def init(weights):
        chex.assert_trees_all_equal_shapes_and_dtypes(weights, chosen)
        zero = jnp.zeros(())
        v = jax.tree.map(jnp.zeros_like, weights)
        return Kept(v, zero, zero, zero == 0, jnp.zeros(2, jnp.int32))

    def refreshed(state, matvec):
        product = matvec(weights := jax.tree.map(jnp.ones_like, state.eigenvector))
        chex.assert_trees_all_equal_shapes_and_dtypes(product, weights)
        assert matvec.unroll == bool(refresh)
        return state._replace(calls=state.calls.at[0].add(1))

    def observe(state, change, projection, radius):
        chex.assert_trees_all_equal_shapes_and_dtypes(change, chosen)
        assert projection.shape == radius.shape == ()
        return state._replace(calls=state.calls.at[1].add(1), residual=radius)

    tx = eigen_sam(
        0.1, 0.5, trackers.Tracker(init, refreshed, observe, 4, 3), mask=mask
    )
    update = lambda g, s: tx.update(g, s, params, value_fn=loss, refresh=refresh)
    grads, seen = jax.grad(loss)(params), [[], []]
    for function in (update, jax.jit(update)):
        state, seen = tx.init(params), [[], []]
        for step in range(9):
            before = state.tracker.calls
            _, state = function(grads, state)
            for kind in np.flatnonzero(state.tracker.calls - before):
                seen[kind].append(step)
        assert seen == [refreshes, [0, 3, 6]]


def test_a_fixed_refresh_fixes_what_is_observed_at_the_same_interval():
    params, loss = network()
    tx = eigen_sam(tracker=trackers.secant(update_interval=3))
    grads, init = jax.grad(loss)(params), tx.init(params)
    for refresh in (True, False):
        text = jax.jit(
            lambda g, s, p, due=refresh: tx.update(g, s, p, value_fn=loss, refresh=due)
        ).lower(grads, init, params)
        assert "stablehlo.case" not in text.as_text()
        _, state = tx.update(grads, init, params, value_fn=loss, refresh=refresh)
        assert jnp.any(state.tracker.eigenvector["out"]["w"] != 0) == refresh


READ = ("eigenvector", "eigenvalue", "residual", "usable")


@pytest.mark.parametrize("name", READ)
def test_a_state_that_lacks_what_eigen_sam_reads_is_refused(name):
    names = [x for x in READ if x != name]
    Lacking = collections.namedtuple("Lacking", names)
    init = lambda weights: Lacking(weights, *[jnp.zeros(())] * (len(names) - 1))
    same = lambda state, *_: state
    tx = eigen_sam(tracker=trackers.Tracker(init, same, same))
    with pytest.raises(ValueError, match=rf"a Lacking without \['{name}'\]"):
        tx.init(jnp.ones(2))
    of_dict = trackers.Tracker(lambda weights: {"eigenvector": weights}, same, same)
    with pytest.raises(ValueError, match="a dict without"):
        eigen_sam(tracker=of_dict).init(jnp.ones(2))


def test_intervals_of_a_tracker_are_checked():
    for name in ("refresh_interval", "observe_interval"):
        tracker = trackers.secant()._replace(**{name: 0})
        with pytest.raises(ValueError, match=f"tracker.{name} must be .* got 0"):
            eigen_sam(tracker=tracker)


def test_the_gate_is_open_until_the_eigenvalue_is_certainly_negative():
    """λ < 0 by less than the residual leaves the α-term on."""
    params, loss = network()
    tx = eigen_sam(0.1, 0.5, trackers.power_iteration(1, update_interval=100))
    grads = jax.grad(loss)(params)
    _, state = tx.update(grads, tx.init(params), params, value_fn=loss)
    for eigenvalue, is_on in ((-0.045, True), (-0.6, False)):
        tracked = state.tracker._replace(
            eigenvalue=jnp.float32(eigenvalue), residual=jnp.float32(0.5)
        )
        at = state._replace(tracker=tracked)
        _, after = tx.update(grads, at, params, value_fn=loss)
        assert (after.info.perturbation_norm > 0.1001) == is_on
