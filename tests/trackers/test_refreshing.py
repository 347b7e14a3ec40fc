import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eigensam_jax import eigen, trackers, tree_math
from eigensam_jax._update import rounding

PARAMS = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2, jnp.bfloat16)}
SPECTRUM = {"w": jnp.arange(6.0).reshape(3, 2), "b": jnp.array([7.0, 10.0])}


def matvec(vector):
    return jax.tree.map(jnp.multiply, SPECTRUM, vector)


TRACKERS = {
    "power_iteration": (trackers.power_iteration, eigen.power_iteration),
    "lanczos": (trackers.lanczos, eigen.lanczos),
}
each_tracker = pytest.mark.parametrize(
    ("make", "solve"), TRACKERS.values(), ids=TRACKERS
)


@each_tracker
def test_there_is_no_vector_before_a_refresh(make, solve):
    tracker = make(update_interval=7)
    assert (tracker.refresh_interval, tracker.observe_interval) == (7, None)
    state = tracker.init(PARAMS)
    chex.assert_trees_all_equal_shapes(state.eigenvector, PARAMS)
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    assert not any(map(jnp.any, jax.tree.leaves(state)))
    assert tracker.observe(state, PARAMS, None, None) is state


@each_tracker
@pytest.mark.parametrize("seed", range(3))
def test_the_first_refresh_starts_at_random_by_its_seed(make, solve, seed):
    tracker = make(2, seed=seed)
    state = tracker.refresh(tracker.init(PARAMS), matvec)
    chex.assert_trees_all_equal_shapes(state.eigenvector, PARAMS)
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    start = rounding.spread_like(tree_math.zeros_like(PARAMS), jnp.int32(seed))
    assert tree_math.norm(start) > 1
    chex.assert_trees_all_close(tuple(state), tuple(solve(matvec, start, 2)), rtol=1e-6)
    other = make(2, seed=seed + 1)
    other = other.refresh(other.init(PARAMS), matvec)
    assert abs(tree_math.vdot(state.eigenvector, other.eigenvector)) < 0.999


@each_tracker
@pytest.mark.parametrize("shape", [(), (4,)])
def test_v_is_found_where_leaves_count_by_their_difference_alone(make, solve, shape):
    del solve
    tracker, params = make(), {"pos": jnp.zeros(shape), "neg": jnp.zeros(shape)}

    def product(v):  # of |pos − neg|²
        change = 2 * (v["pos"] - v["neg"])
        return {"pos": change, "neg": -change}

    state = tracker.refresh(tracker.init(params), product)
    np.testing.assert_allclose(tree_math.norm(state.eigenvector), 1, rtol=1e-5)
    np.testing.assert_allclose(state.eigenvalue, 4, rtol=1e-5)


@each_tracker
def test_refreshes_go_on_from_where_the_last_one_was(make, solve):
    tracker = make(2)
    refresh = jax.jit(lambda s: tracker.refresh(s, matvec))
    state = refresh(tracker.init(PARAMS))
    for _ in range(3):
        new = refresh(state)
        expected = solve(matvec, state.eigenvector, 2)
        chex.assert_trees_all_close(tuple(new), tuple(expected), rtol=1e-5, atol=1e-6)
        assert new.eigenvalue > state.eigenvalue
        state = new


@functools.cache
def refreshed(make):
    """(state, factors of each leaf of a product) -> the state, compiled once."""

    def refresh(state, factors):
        spoilt = lambda v: jax.tree.map(jnp.multiply, matvec(v), factors)
        return make(3).refresh(state, spoilt)

    return jax.jit(refresh)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("leaf", ["w", "b"])
@each_tracker
def test_a_refresh_that_is_not_finite_changes_nothing(make, solve, leaf, bad):
    good = {"w": 1.0, "b": 1.0}
    state = make(3).init(PARAMS)
    for _ in range(2):  # of the first one, and of one that has a vector
        after = refreshed(make)(state, good | {leaf: bad})
        chex.assert_trees_all_equal(after, state)
        recovered = refreshed(make)(after, good)
        np.testing.assert_allclose(tree_math.norm(recovered.eigenvector), 1, rtol=1e-6)
        assert recovered.eigenvalue > state.eigenvalue
        state = recovered


@each_tracker
def test_products_at_the_end_of_the_range_do_no_harm(make, solve):
    """Products that overflow, or whose norm does, change nothing; others count."""
    tracker = make(3)
    state = tracker.refresh(tracker.init(PARAMS), matvec)
    ones = jax.tree.map(lambda x: jnp.ones(x.shape), PARAMS)
    for bad in (
        lambda v: tree_math.scale(jnp.float32(3e38), matvec(v)),
        lambda v: tree_math.scale(jnp.float32(3e38), ones),
    ):
        chex.assert_trees_all_equal(tracker.refresh(state, bad), state)
    huge = lambda v: tree_math.scale(jnp.float32(1e35), matvec(v))
    after = tracker.refresh(state, huge)
    np.testing.assert_allclose(tree_math.norm(after.eigenvector), 1, rtol=1e-6)
    np.testing.assert_allclose(after.eigenvalue, 1e36, rtol=0.1)


@each_tracker
def test_of_a_hessian_that_the_compiler_knows_to_be_zero_there_is_no_vector(
    make, solve
):
    tracker = make()
    state = tracker.init(PARAMS)
    zero = lambda v: tree_math.zeros_like(PARAMS)
    for refresh in (tracker.refresh, jax.jit(tracker.refresh, static_argnums=1)):
        chex.assert_trees_all_equal(refresh(state, zero), state)


@each_tracker
def test_of_a_zero_hessian_there_is_no_vector(make, solve):
    tracker = make()
    zero = lambda v: tree_math.scale(0.0, v)
    state = tracker.init(PARAMS)
    chex.assert_trees_all_equal(tracker.refresh(state, zero), state)
    state = tracker.refresh(state, matvec)
    chex.assert_trees_all_equal(tracker.refresh(state, zero), state)


@each_tracker
@pytest.mark.parametrize(
    ("eigenvalue", "residual", "usable"),
    [(-0.045, 0.3, True), (-0.3, 0.045, False), (0.3, 0.045, True), (0.0, 0.0, True)],
)
def test_v_is_left_out_where_its_eigenvalue_is_certainly_negative(
    make, solve, eigenvalue, residual, usable
):
    """Some eigenvalue lies within the residual of λ: above 0, as far as is known."""
    state = (
        make()
        .init(PARAMS)
        ._replace(eigenvalue=jnp.float32(eigenvalue), residual=jnp.float32(residual))
    )
    assert state.usable == usable


@each_tracker
@pytest.mark.parametrize("seed", [0.5, 2**31, "a", None])
def test_a_seed_is_an_integer_of_32_bits(make, solve, seed):
    del solve
    with pytest.raises(ValueError, match=rf"seed must be .* got {seed!r}"):
        make(seed=seed)


@pytest.mark.parametrize("make", [trackers.power_iteration, trackers.lanczos])
@pytest.mark.parametrize("name", ["num_matvecs", "update_interval"])
@pytest.mark.parametrize("value", [0, -3, 1.5, "5", None])
def test_bad_counts_are_refused_with_name_and_value(make, name, value):
    with pytest.raises(ValueError, match=f"{name} must be .* got {value!r}"):
        make(**{name: value})
