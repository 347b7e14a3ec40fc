import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eigensam_jax import eigen, trackers, tree_math

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
@pytest.mark.parametrize("seed", range(3))
def test_starts_at_a_random_unit_vector_like_the_parameters(make, solve, seed):
    state = make(seed=seed).init(PARAMS)
    chex.assert_trees_all_equal_shapes(state.eigenvector, PARAMS)
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(tree_math.norm(state.eigenvector), 1, rtol=1e-6)
    other = make(seed=seed + 1).init(PARAMS)
    assert abs(tree_math.vdot(state.eigenvector, other.eigenvector)) < 0.99


@each_tracker
def test_refreshes_at_its_interval_from_where_it_was(make, solve):
    tracker = make(2, update_interval=3)
    refresh = jax.jit(lambda s, count: tracker.refresh(s, matvec, count, None))
    state = tracker.init(PARAMS)
    for count in range(7):
        new = refresh(state, jnp.int32(count))
        if count % 3 == 0:
            expected = solve(matvec, state.eigenvector, 2)
            chex.assert_trees_all_close(new, expected, rtol=1e-5, atol=1e-6)
            assert new.eigenvalue > state.eigenvalue
        else:
            chex.assert_trees_all_equal(new, state)
        state = new


@each_tracker
def test_the_caller_can_fix_the_refresh(make, solve):
    tracker = make(2, update_interval=3)
    state = tracker.init(PARAMS)
    due = tracker.refresh(state, matvec, jnp.int32(1), True)
    chex.assert_trees_all_close(due, solve(matvec, state.eigenvector, 2), rtol=1e-6)
    not_due = tracker.refresh(state, matvec, jnp.int32(0), False)
    chex.assert_trees_all_equal(not_due, state)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf, 1e38])
@pytest.mark.parametrize("leaf", ["w", "b"])
@each_tracker
def test_a_refresh_that_is_not_finite_changes_nothing(make, solve, leaf, bad):
    tracker = make(3, update_interval=1)
    state = tracker.refresh(tracker.init(PARAMS), matvec, jnp.int32(0), None)

    def bad_matvec(vector):
        product = matvec(vector)
        return product | {leaf: product[leaf] * bad}

    after = tracker.refresh(state, bad_matvec, jnp.int32(1), None)
    chex.assert_trees_all_equal(after, state)
    recovered = tracker.refresh(after, matvec, jnp.int32(2), None)
    assert recovered.eigenvalue > state.eigenvalue


@each_tracker
def test_a_zero_hessian_keeps_the_vector_with_eigenvalue_zero(make, solve):
    tracker = make()
    state = tracker.init(PARAMS)
    after = tracker.refresh(
        state, lambda v: tree_math.scale(0.0, v), jnp.int32(0), None
    )
    chex.assert_trees_all_close(after, state, rtol=1e-6)
    assert after.eigenvalue == 0


@each_tracker
def test_observing_changes_nothing(make, solve):
    tracker = make()
    state = tracker.init(PARAMS)
    assert tracker.observe(state, PARAMS, PARAMS, jnp.int32(0)) is state


@pytest.mark.parametrize("name", ["num_iters", "update_interval"])
@pytest.mark.parametrize("value", [0, -3, 1.5, "5", None])
def test_bad_counts_are_refused_with_name_and_value(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .* got {value!r}"):
        trackers.power_iteration(**{name: value})
    name = name.replace("num_iters", "num_matvecs")
    with pytest.raises(ValueError, match=f"{name} must be .* got {value!r}"):
        trackers.lanczos(**{name: value})
