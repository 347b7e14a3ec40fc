import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import dense_hessian, flatten, network

from eigensam_jax import hessian, sde, tree_math
from eigensam_jax.sde import _expansion


def dense_third_derivative(value_fn, params):
    """∇³f as an array with three axes over the raveled parameters."""
    flat, unravel = ravel_pytree(params)
    return jax.jacfwd(jax.hessian(lambda x: value_fn(unravel(x))))(flat)


def random_like(params, seed):
    flat, unravel = ravel_pytree(params)
    return unravel(jax.random.normal(jax.random.key(seed), flat.shape, flat.dtype))


def test_contractions_are_those_of_the_dense_tensor():
    @jax.jit
    def contracted(params, a, b):
        loss = lambda p: network(0, jnp.float64)[1](p, 2)
        pairs = ((a, a), (a, b))
        third = [sde.third_derivative(loss, params, *pair) for pair in pairs]
        expanded = [
            sde.expanded_gradient(loss, params, a, order) for order in (1, 2, 3)
        ]
        return third, expanded

    @jax.jit
    def dense(params):
        loss = lambda p: network(0, jnp.float64)[1](p, 2)
        gradient = ravel_pytree(jax.grad(loss)(params))[0]
        return (
            gradient,
            dense_hessian(loss, params),
            dense_third_derivative(loss, params),
        )

    with jax.enable_x64(True):
        for seed in range(3):
            params, _ = network(seed, jnp.float64)
            a, b = random_like(params, 1), random_like(params, 2)
            gradient, matrix, tensor = (np.asarray(x) for x in dense(params))
            assert abs(tensor).max() > 0.01  # there is something to see
            x, y = flatten(a), flatten(b)
            third, expanded = contracted(params, a, b)
            expected = [tensor @ x @ x, tensor @ x @ y]
            for ours, theirs in zip(third, expected, strict=True):
                np.testing.assert_allclose(flatten(ours), theirs, rtol=0, atol=1e-10)
                chex.assert_trees_all_equal_shapes_and_dtypes(ours, params)
            sums = np.cumsum([gradient, matrix @ x, tensor @ x @ x / 2], axis=0)
            for ours, theirs in zip(expanded, sums, strict=True):
                np.testing.assert_allclose(flatten(ours), theirs, rtol=0, atol=1e-10)


def test_the_perturbation_is_held_fixed():
    """Else the gradient would also be that of ε."""
    loss = lambda w: jnp.sum(jnp.sin(w))
    w = jnp.array([0.3, -0.2])
    epsilon = lambda w: 0.1 * w
    ours = jax.jit(lambda w: sde.expanded_gradient(loss, w, epsilon(w), 3))(w)
    step = 0.1 * w
    expected = jnp.cos(w) - step * jnp.sin(w) - step**2 / 2 * jnp.cos(w)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_derivatives_are_made_in_the_dtype_of_the_parameters(dtype):
    w, epsilon = jnp.array([1.0, 2.0], dtype), jnp.array([0.5, 0.25])
    seen = []

    def loss(p):
        seen.append(p.dtype.type)
        return jnp.sum(p**3).astype(jnp.float32)

    ours = sde.expanded_gradient(loss, w, epsilon, 3)
    assert {*seen} == {jnp.dtype(dtype).type}
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, 3 * (jnp.array([1.5, 2.25])) ** 2, rtol=0.02)


def test_the_mean_over_batches_keeps_the_sum_alone():
    """Temporary memory is that of one batch, however many there are."""

    def temporary(count):
        def mean(w, batches):
            gradient = jax.grad(lambda w, x: jnp.sum(jnp.tanh(x @ w) ** 2))
            return _expansion.batch_mean(lambda x: gradient(w, x), batches)

        shapes = (
            jax.ShapeDtypeStruct((64, 64), "float32"),
            jax.ShapeDtypeStruct((count, 32, 64), "float32"),
        )
        compiled = jax.jit(mean).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(100) <= 1.1 * temporary(4)


def test_the_mean_is_of_every_leaf():
    batches = {"x": jnp.arange(4.0), "y": jnp.ones((4, 2))}
    mean = jax.jit(
        lambda b: _expansion.batch_mean(
            lambda batch: (batch["x"], tree_math.scale(2, batch["y"])), b
        )
    )(batches)
    np.testing.assert_allclose(mean[0], 1.5)
    np.testing.assert_allclose(mean[1], [2, 2])


def test_the_mean_of_narrow_numbers_is_summed_in_float32():
    ones = jnp.ones(1000, jnp.bfloat16)  # whose sum in bfloat16 is 256
    mean = _expansion.batch_mean(lambda x: x, ones)
    assert mean.dtype == jnp.float32
    assert mean == 1


@pytest.mark.parametrize("order", [0, 4])
def test_an_order_that_there_is_not_is_refused(order):
    w = jnp.ones(())
    with pytest.raises(ValueError, match=f"order must be 1, 2 or 3, got {order}"):
        sde.expanded_gradient(jnp.square, w, w, order)


@pytest.mark.parametrize(
    "batches",
    [
        jnp.zeros(()),
        jnp.zeros((0, 3)),
        {"x": jnp.zeros((2, 3)), "y": jnp.zeros(3)},
        {},
        iter([jnp.zeros(2)]),
    ],
)
def test_batches_without_a_common_axis_are_refused(batches):
    with pytest.raises(ValueError, match="stack batches of one size"):
        hessian.num_batches(batches)
