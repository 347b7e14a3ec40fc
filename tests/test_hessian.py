import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from problems import dense_hessian, flatten, network

from eigensam_jax import hessian, tree_math


def random_like(params, seed):
    keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params)))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    return jax.tree.map(
        lambda k, x: jax.random.normal(k, x.shape, x.dtype), keys, params
    )


each_mode = pytest.mark.parametrize("mode", hessian.HVP_MODES)


def relative_error(tree, expected):
    error = tree_math.norm(tree_math.add_scaled(tree, -1, expected))
    return error / tree_math.norm(expected)


@each_mode
@pytest.mark.parametrize("seed", range(3))
def test_product_is_that_of_the_dense_hessian(seed, mode):
    # A difference with h = eps^⅓ is wrong by about h² and eps/h, both eps^⅔ = 4e-11.
    rtol = 1e-8 if mode == "finite_difference" else 1e-12
    with jax.enable_x64(True):
        params, loss = network(seed, jnp.float64)
        vector = random_like(params, seed)
        product = jax.jit(lambda p, v: hessian.hvp(loss, p, v, mode=mode))
        expected = dense_hessian(loss, params) @ flatten(vector)
        actual = flatten(product(params, vector))
        assert np.linalg.norm(actual - expected) <= rtol * np.linalg.norm(expected)


@each_mode
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_product_in_low_precision_is_float32_and_near_the_dense_one(seed, dtype, mode):
    params, loss = network(seed, dtype)
    vector = tree_math.widen(random_like(params, seed))
    product = hessian.hvp(loss, params, vector, mode=mode)
    chex.assert_trees_all_equal_shapes_and_dtypes(product, vector)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        expected = np.asarray(dense_hessian(loss, wide) @ flatten(vector))
    error = np.linalg.norm(flatten(product) - expected) / np.linalg.norm(expected)
    # Two differentiations round a few times; a difference rounds by eps^⅔.
    exponent = 2 / 3 if mode == "finite_difference" else 1
    assert error < 5 * float(jnp.finfo(dtype).eps) ** exponent


@each_mode
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_length_of_the_vector_changes_the_product_by_a_factor_alone(factor, mode):
    params, loss = network()
    vector = random_like(params, 0)
    product = hessian.matvec(jax.grad(loss), params, mode=mode)
    scaled = tree_math.scale(1 / factor, product(tree_math.scale(factor, vector)))
    # The direction, normalised, may round otherwise, and the difference with it.
    rtol = 1e-3 if mode == "finite_difference" else 1e-5
    assert relative_error(scaled, product(vector)) < rtol
    zero = product(tree_math.scale(0.0, vector))
    chex.assert_trees_all_equal(zero, tree_math.scale(0.0, vector))


def test_matvec_is_linear_in_a_gradient_function():
    params, loss = network()
    u, v = random_like(params, 1), random_like(params, 2)
    product = hessian.matvec(jax.grad(loss), params)
    chex.assert_trees_all_close(product(u), hessian.hvp(loss, params, u), rtol=1e-6)
    np.testing.assert_allclose(
        tree_math.vdot(u, product(v)), tree_math.vdot(v, product(u)), rtol=1e-4
    )


@each_mode
def test_a_vector_of_another_structure_is_refused(mode):
    params, loss = network()
    with pytest.raises(ValueError, match=r"structure|keys"):
        hessian.hvp(loss, params, {"hidden": jnp.ones(3)}, mode=mode)


def test_another_mode_is_refused_by_name():
    with pytest.raises(ValueError, match=r"mode must be one of .*, got 'reverse'"):
        hessian.matvec(jax.grad(jnp.sum), jnp.ones(2), mode="reverse")


# --- Gauss–Newton ---------------------------------------------------------------------


def convex_loss(outputs):
    return optax.softmax_cross_entropy_with_integer_labels(
        outputs["logits"], jnp.array([0, 2])
    ).sum() + jnp.sum(outputs["height"] ** 2)


@pytest.mark.parametrize("model", ["tanh", "linear"])
@pytest.mark.parametrize("seed", range(3))
def test_gauss_newton_is_jacobian_hessian_of_the_loss_jacobian(seed, model):
    activation = jnp.tanh if model == "tanh" else lambda x: x
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        inputs = jnp.asarray(rng.normal(size=(2, 3)))
        params = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=3)}
        flat, unravel = ravel_pytree(params)

        def predict(p):
            hidden = activation(3 * inputs @ p["a"])
            return {"logits": hidden[:, :3] + p["b"], "height": hidden[:, 3]}

        product = hessian.gauss_newton_matvec(predict, convex_loss, params)
        matrix = jax.vmap(lambda v: ravel_pytree(product(unravel(v)))[0])(
            jnp.eye(flat.size)
        )
        outputs, unravel_outputs = ravel_pytree(predict(params))
        jacobian = jax.jacobian(lambda w: ravel_pytree(predict(unravel(w)))[0])(flat)
        inner = jax.hessian(lambda y: convex_loss(unravel_outputs(y)))(outputs)
        expected = jacobian.T @ inner @ jacobian
        np.testing.assert_allclose(matrix, expected, rtol=1e-12, atol=1e-13)
        assert np.linalg.eigvalsh(matrix)[0] > -1e-12

        whole = dense_hessian(lambda p: convex_loss(predict(p)), params)
        if model == "linear":
            np.testing.assert_allclose(matrix, whole, rtol=1e-12, atol=1e-13)
        else:  # it is no Hessian in disguise
            assert np.linalg.eigvalsh(whole)[0] < -1e-3


def test_gauss_newton_of_bfloat16_parameters_is_float32():
    weights = jnp.array([1.0, 2.0], jnp.bfloat16)
    product = hessian.gauss_newton_matvec(jnp.square, jnp.sum, weights)(jnp.ones(2))
    np.testing.assert_array_equal(product, jnp.zeros(2))  # the loss is linear
    assert product.dtype == jnp.float32


# --- kernels that allow one mode only -------------------------------------------------


@jax.custom_vjp
def slope_of_sine(x):
    return jnp.cos(x)


slope_of_sine.defvjp(lambda x: (jnp.cos(x), x), lambda x, g: (-jnp.sin(x) * g,))


@jax.custom_vjp
def sine_with_a_custom_slope(x):
    return jnp.sin(x)


sine_with_a_custom_slope.defvjp(
    lambda x: (jnp.sin(x), x), lambda x, g: (slope_of_sine(x) * g,)
)


@jax.custom_vjp
def sine_with_a_slope_from_outside(x):
    return jnp.sin(x)


sine_with_a_slope_from_outside.defvjp(
    lambda x: (jnp.sin(x), x),
    lambda x, g: (g * jax.pure_callback(np.cos, x, x, vmap_method="sequential"),),
)


@pytest.mark.parametrize(
    ("kernel", "first_mode_that_works"),
    [(sine_with_a_custom_slope, 1), (sine_with_a_slope_from_outside, 2)],
)
def test_kernels_that_forbid_a_second_derivative(kernel, first_mode_that_works):
    w, v = jnp.array([0.3, 1.2, -2.0]), jnp.array([1.0, -2.0, 0.5])
    value_fn = lambda w: jnp.sum(w * kernel(w))
    expected = (2 * jnp.cos(w) - w * jnp.sin(w)) * v
    for position, mode in enumerate(hessian.HVP_MODES):
        product = jax.jit(lambda v, mode=mode: hessian.hvp(value_fn, w, v, mode=mode))
        if position < first_mode_that_works:
            with pytest.raises((TypeError, ValueError), match=r"JVP|forward-mode"):
                product(v)
        else:
            rtol = 1e-3 if mode == "finite_difference" else 1e-5
            np.testing.assert_allclose(product(v), expected, rtol=rtol)
