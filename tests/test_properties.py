"""Random trees: scalars, empty and zero-size leaves, nested, None, mixed dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eigensam_jax import asam, eigen_sam, perturbation, sam, trackers, tree_math

SHAPES = [(), (1,), (3,), (0,), (2, 3), (2, 0), (1, 2, 1)]
DTYPES = ["float32", "bfloat16", "float16"]
exact = settings(derandomize=True, deadline=None, max_examples=40, database=None)
few = settings(exact, max_examples=5)


@st.composite
def leaves(draw):
    shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 2**16))
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


trees = st.recursive(
    leaves() | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=5,
).filter(lambda tree: tree is not None)


def like(tree, seed):
    """Another tree of the same structure, shapes and dtypes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


def flat(tree):
    """All leaves, one after the other, in float64."""
    arrays = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
    return np.concatenate([np.empty(0), *arrays])


@exact
@given(trees, st.integers(0, 100))
def test_inner_products_are_those_of_the_flat_vectors(tree, seed):
    a, b = like(tree, seed), like(tree, seed + 1)
    x, y = flat(a), flat(b)
    atol = 1e-5 * (1 + np.linalg.norm(x) * np.linalg.norm(y))
    np.testing.assert_allclose(tree_math.vdot(a, b), x @ y, atol=atol)
    np.testing.assert_allclose(tree_math.norm(a), np.linalg.norm(x), atol=atol)
    both = tree_math.vdots((a, b), (b, b))
    np.testing.assert_allclose(both, [x @ y, y @ y], atol=1e-5 * (1 + y @ y) + atol)
    np.testing.assert_allclose(
        flat(tree_math.add_scaled(a, -0.5, b)), x - 0.5 * y, atol=1e-5
    )


@exact
@given(trees, st.integers(0, 100), st.floats(0, 2), st.floats(0, 3))
def test_perturbations_are_those_of_the_flat_vectors(tree, seed, rho, alpha):
    grads, v = like(tree, seed), like(tree, seed + 1)
    v = tree_math.scale(tree_math.safe_inverse(tree_math.norm(v)), v)
    g, flat_v = flat(grads), flat(v)
    length = np.linalg.norm(g)
    u = g / length if length else g
    expected = rho * (
        u + alpha * np.sign(u @ flat_v) * (flat_v - (u @ flat_v) * u) * (length > 0)
    )
    # Where g and v are one up to rounding, what is left of v has no direction.
    atol = 1e-5 * (1 + rho * (1 + alpha))
    for step, epsilon in (
        (perturbation.eigen_sam(grads, v, rho, alpha), expected),
        (perturbation.sam(grads, rho), rho * u),
    ):
        assert jax.tree.structure(step.epsilon) == jax.tree.structure(grads)
        np.testing.assert_allclose(flat(step.epsilon), epsilon, atol=atol)
        np.testing.assert_allclose(step.norm, np.linalg.norm(epsilon), atol=5 * atol)


@pytest.mark.parametrize(
    "make",
    [
        sam,
        asam,
        eigen_sam,
        lambda: eigen_sam(tracker=trackers.power_iteration(2, 1)),
        pytest.param(
            lambda: eigen_sam(tracker=trackers.lanczos(2, 1)), marks=pytest.mark.slow
        ),
        pytest.param(
            lambda: eigen_sam(tracker=trackers.ritz(1)), marks=pytest.mark.slow
        ),
    ],
    ids=["sam", "asam", "secant", "power_iteration", "lanczos", "ritz"],
)
@few
@given(trees)
def test_two_steps_keep_structure_and_dtypes_and_stay_finite(make, params):
    tx = make()
    value_fn = lambda p: 1.5 * tree_math.vdot(p, p)  # H = 3
    start = state = tx.init(params)
    for _ in range(2):
        grads = jax.grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
    kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert kinds(state) == kinds(start)
    assert kinds(updates) == kinds(params)
    assert all(
        bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves((updates, state))
    )
    if flat(params).any() and make is sam:
        np.testing.assert_allclose(state.info.perturbation_norm, 0.05, rtol=1e-6)
