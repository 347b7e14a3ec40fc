"""Perturbed weights in narrow dtypes: exact in the mean, and in SAM's gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eigensam_jax
from eigensam_jax import trackers
from eigensam_jax._update import rounding

NARROW = [jnp.bfloat16, jnp.float16]


def spacing(x, dtype):
    """The distance between the two numbers of `dtype` around x, in float64."""
    x = np.abs(np.asarray(x, np.float64))
    power = 2.0 ** np.floor(np.log2(np.maximum(x, float(jnp.finfo(dtype).tiny))))
    return power * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", NARROW)
def test_the_mean_over_steps_is_the_exact_sum(dtype, seed):
    rng = np.random.default_rng(seed)
    w = jnp.asarray(rng.normal(size=500), dtype)
    epsilon = jnp.asarray(1e-3 * rng.normal(size=500), jnp.float32)
    num = 4000
    rounded = jax.vmap(lambda count: rounding.add(w, epsilon, count))(jnp.arange(num))
    assert rounded.dtype == dtype
    exact = np.asarray(w, np.float64) + np.asarray(epsilon, np.float64)
    rounded = np.asarray(rounded, np.float64)
    assert (np.abs(rounded - exact) < spacing(exact, dtype)).all()  # a neighbour
    standard_error = spacing(exact, dtype) / 2 / np.sqrt(num)
    assert (np.abs(rounded.mean(0) - exact) < 5 * standard_error + 1e-7).all()


def test_the_mean_over_the_steps_of_a_link_is_the_exact_sum():
    """Of fixed weights in bfloat16: each step rounds w + ε, and v, in its own way."""
    w, g = jnp.array([1.0, 1.5], jnp.bfloat16), jnp.array([0.6, -0.8])
    v, rho, num = jnp.array([0.6005, 0.7996]), 0.005, 4000

    def keep(state, *_):
        return state._replace(eigenvector=[v])

    tracker = trackers.Tracker(
        lambda params: trackers.EigenpairState(
            [jnp.zeros(2)], jnp.float32(0), jnp.float32(0)
        ),
        keep,
        keep,
        None,
        1,
    )
    tx = eigensam_jax.eigen_sam(rho, 0.0, tracker, eigenvector_dtype=jnp.bfloat16)

    def step(state, _):
        perturbed, state = tx.update(g, state, w, grad_fn=lambda p: p)
        return state, (perturbed, state.tracker.eigenvector)

    _, seen = jax.lax.scan(step, tx.init(w), length=num)
    for found, exact in zip(seen, (w + rho * g, v), strict=True):
        found, exact = np.asarray(found, np.float64), np.asarray(exact, np.float64)
        error = 5 * spacing(exact, jnp.bfloat16) / 2 / np.sqrt(num)
        assert (abs(found.mean(0) - exact) < error).all()
        assert (found.std(0) > 0).all()


@pytest.mark.parametrize("share", [0.3, 1 / 300, 1 / 10_000])
@pytest.mark.parametrize("dtype", NARROW)
def test_no_small_change_is_lost_in_one_direction(dtype, share):
    """Of a share of the spacing, up and down; float16 leaves 12 bits for the noise."""
    share = max(share, 1e-3) if dtype == jnp.float16 else share
    num = 2**20
    for sign in (1, -1):
        epsilon = sign * share * float(jnp.finfo(dtype).eps) / 2
        w = jnp.asarray(1.5, dtype)
        count = jnp.arange(num)
        moved = jax.vmap(lambda i: rounding.add(w, epsilon, i))(count)  # noqa: B023
        moved = np.asarray(moved, np.float64) - 1.5
        expected = sign * share * float(jnp.finfo(dtype).eps) / 2
        error = 5 * np.sqrt(share / 2 / num) * float(jnp.finfo(dtype).eps)
        coarse = float(jnp.finfo(dtype).eps) * 2.0 ** (jnp.finfo(dtype).nmant - 23)
        assert abs(moved.mean() - expected) < error + coarse


@pytest.mark.parametrize("dtype", NARROW)
def test_without_a_perturbation_every_number_stays_what_it_is(dtype):
    w = jax.lax.bitcast_convert_type(jnp.arange(2**16, dtype=jnp.uint16), dtype)
    wide = np.abs(np.asarray(w, np.float32))
    flushed = (wide > 0) & (wide < np.finfo(np.float32).smallest_normal)  # by XLA
    w = w[~np.isnan(wide) & ~flushed]
    zero = jnp.zeros(w.shape, jnp.float32)
    assert len(w) > 60_000
    add = jax.jit(rounding.add)
    for count in range(3):
        same = add(w, zero, jnp.int32(count))
        np.testing.assert_array_equal(np.asarray(same), np.asarray(w))  # infinities too


@pytest.mark.parametrize("dtype", NARROW)
def test_nothing_finite_becomes_infinite(dtype):
    largest = jnp.finfo(dtype).max
    epsilon = jnp.float32(largest) * jnp.float32(jnp.finfo(dtype).eps) / 8
    rounded = jax.vmap(lambda count: rounding.add(largest, epsilon, count))
    np.testing.assert_array_equal(rounded(jnp.arange(1000)), largest)


def test_wide_dtypes_are_rounded_to_the_nearest():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        w = {name: rng.normal(size=100).astype(name) for name in ("float32", "float64")}
        epsilon = {name: 1e-3 * x for name, x in w.items()}
        rounded = rounding.add(jax.tree.map(jnp.asarray, w), epsilon)
        for name, x in rounded.items():
            assert x.dtype == name
            np.testing.assert_array_equal(np.asarray(x), w[name] + epsilon[name])


@pytest.mark.parametrize("seed", range(3))
def test_sam_in_bfloat16_is_nearer_to_float64_than_by_rounding_to_the_nearest(seed):
    """Of least squares the change of the gradient is known: AᵀAε/n."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(64, 50_000)) / np.sqrt(50_000)
    w = jnp.asarray(0.03 * rng.normal(size=50_000), jnp.bfloat16)
    targets = rng.normal(size=64)
    # What is computed from the weights is exact enough, so that rounding them is all.
    grad = lambda w: inputs.T @ (inputs @ np.asarray(w, np.float64) - targets)
    g = grad(w)
    rho = 0.01
    exact = inputs.T @ (inputs @ (rho * g / np.linalg.norm(g)))

    def error(change):
        return np.linalg.norm(change - exact) / np.linalg.norm(exact)

    epsilon = jnp.asarray(rho * g / np.linalg.norm(g), w.dtype)
    to_the_nearest = error(grad(w + epsilon) - g)

    def value_fn(w):
        out = jnp.asarray(inputs) @ w.astype(jnp.float32) - jnp.asarray(targets)
        return 0.5 * jnp.sum(out**2)

    tx = eigensam_jax.sam(rho)
    value_fn_grad = lambda w: jax.grad(value_fn)(w.astype(jnp.float32))
    after, state = tx.update(
        value_fn_grad(w), tx.init(w), w, grad_fn=value_fn_grad, value_fn=value_fn
    )
    np.testing.assert_allclose(
        float(optax.tree.get(state, "perturbation_norm")), rho, rtol=1e-5
    )
    dithered = error(np.asarray(after, np.float64) - np.asarray(value_fn_grad(w)))
    assert dithered < 0.2
    assert to_the_nearest > 2 * dithered
