import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import dense_hessian, flatten, network

from eigensam_jax import hessian, tree_math


def random_like(params, seed):
    keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params)))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    return jax.tree.map(
        lambda k, x: jax.random.normal(k, x.shape, x.dtype), keys, params
    )


@pytest.mark.parametrize("seed", range(3))
def test_product_is_that_of_the_dense_hessian(seed):
    with jax.enable_x64(True):
        params, loss = network(seed, jnp.float64)
        vector = random_like(params, seed)
        product = jax.jit(lambda p, v: hessian.hvp(loss, p, v))(params, vector)
        expected = dense_hessian(loss, params) @ flatten(vector)
        np.testing.assert_allclose(flatten(product), expected, rtol=1e-12, atol=1e-14)


def test_matvec_is_linear_in_a_gradient_function():
    params, loss = network()
    u, v = random_like(params, 1), random_like(params, 2)
    product = hessian.matvec(jax.grad(loss), params)
    chex.assert_trees_all_close(product(u), hessian.hvp(loss, params, u), rtol=1e-6)
    np.testing.assert_allclose(
        tree_math.vdot(u, product(v)), tree_math.vdot(v, product(u)), rtol=1e-4
    )


def test_the_product_of_bfloat16_parameters_is_float32():
    params, loss = network(dtype=jnp.bfloat16)
    vector = tree_math.widen(random_like(params, 0))
    product = hessian.hvp(loss, params, vector)
    chex.assert_trees_all_equal_shapes_and_dtypes(product, vector)
    wide = tree_math.widen(params)
    exact = hessian.hvp(lambda p: loss(p), wide, vector)
    error = tree_math.norm(tree_math.add_scaled(product, -1, exact))
    # bfloat16 keeps 8 bits, and the batch of the loss is rounded to it as well.
    assert error < 0.1 * tree_math.norm(exact)


def test_a_vector_of_another_structure_is_refused():
    params, loss = network()
    with pytest.raises(ValueError, match=r"structure|keys"):
        hessian.hvp(loss, params, {"hidden": jnp.ones(3)})
