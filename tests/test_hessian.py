import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from problems import (
    dense_hessian,
    dense_hessian_of_sines,
    flatten,
    network,
    sine_with_a_custom_slope,
    sines,
)

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


@functools.cache
def compiled_product(dtype, mode):
    """A loss, and its product from parameters and a vector, compiled once for all."""
    _, loss = network(dtype=dtype)
    return loss, jax.jit(lambda p, v: hessian.hvp(loss, p, v, hvp_mode=mode))


@each_mode
@pytest.mark.parametrize("seed", range(3))
def test_product_is_that_of_the_dense_hessian(seed, mode):
    # A difference with h = eps^⅓ is wrong by about h² and eps/h, both eps^⅔ = 4e-11.
    rtol = 1e-8 if mode == "finite_difference" else 1e-12
    with jax.enable_x64(True):
        params, _ = network(seed, jnp.float64)
        loss, product = compiled_product(jnp.float64, mode)
        vector = random_like(params, seed)
        expected = dense_hessian(loss, params) @ flatten(vector)
        actual = flatten(product(params, vector))
        assert np.linalg.norm(actual - expected) <= rtol * np.linalg.norm(expected)


@each_mode
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_product_in_low_precision_is_float32_and_near_the_dense_one(seed, dtype, mode):
    params, _ = network(seed, dtype)
    loss, compiled = compiled_product(dtype, mode)
    vector = tree_math.widen(random_like(params, seed))
    product = compiled(params, vector)
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
    product = hessian.matvec(jax.grad(loss), params, hvp_mode=mode)
    scaled = tree_math.scale(1 / factor, product(tree_math.scale(factor, vector)))
    # The direction, normalised, may round otherwise, and the difference with it.
    rtol = 1e-3 if mode == "finite_difference" else 1e-5
    assert relative_error(scaled, product(vector)) < rtol
    zero = product(tree_math.scale(0.0, vector))
    chex.assert_trees_all_equal(zero, tree_math.scale(0.0, vector))


@each_mode
def test_a_vector_of_another_structure_is_refused(mode):
    params, loss = network()
    with pytest.raises(ValueError, match=r"structure|keys"):
        hessian.hvp(loss, params, {"hidden": jnp.ones(3)}, hvp_mode=mode)


def test_another_mode_is_refused_by_name():
    with pytest.raises(ValueError, match=r"hvp_mode must be one of .*, got 'reverse'"):
        hessian.matvec(jax.grad(jnp.sum), jnp.ones(2), hvp_mode="reverse")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda y: y**2, r"{} must return a scalar, .* shape \(2,\): average"),
        (lambda y: (jnp.sum(y**2), y), "{} must return a scalar, got a tuple with"),
        (lambda y: None, "{} must return a scalar, got None: let it return the loss"),
        (lambda y: jnp.sum(jnp.ones(2)), "{} ignores its argument, so its gradient is"),
    ],
)
def test_a_loss_that_is_none_is_refused(wrong, message):
    w, batches = jnp.ones(2), jnp.ones((3, 2))
    with pytest.raises(ValueError, match=message.format("value_fn")):
        hessian.hvp(wrong, w, w)
    for given in (batches, [(x,) for x in batches]):
        product = hessian.mean_matvec(lambda w, x: wrong(w), w, given)
        with pytest.raises(ValueError, match=message.format("value_fn")):
            product(w)
    product = hessian.gauss_newton_matvec(lambda w: 2 * w, wrong, w)
    with pytest.raises(ValueError, match=message.format("loss_fn")):
        product(w)


def test_an_error_of_the_loss_says_what_it_was_called_with():
    w, batches = jnp.ones(2), jnp.ones((3, 2))
    with pytest.raises(TypeError) as raised:
        hessian.hvp(lambda w, x: jnp.sum(w * x), w, w)
    assert "value_fn was called with one argument" in raised.value.__notes__[0]
    with pytest.raises(TypeError) as raised:
        hessian.mean_matvec(lambda w: jnp.sum(w), w, batches)(w)
    note = "value_fn was called with the parameters and a batch."
    assert raised.value.__notes__[0] == note
    remedy = "value_fn=lambda p, batch: loss(p, batch).mean()"
    with pytest.raises(ValueError, match=re.escape(remedy)):
        hessian.mean_matvec(lambda w, x: w * x, w, batches)(w)


# --- data sets ------------------------------------------------------------------------


def regression(width=4, examples=24):
    """Parameters, loss(params, batch) and data of a small network without biases."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = [jax.random.normal(keys[0], (3, width)), jnp.ones((width, 1))]
    data = {
        "x": jax.random.normal(keys[1], (examples, 3)),
        "y": jax.random.normal(keys[2], (examples, 1)),
    }

    def loss(params, batch):
        output = jnp.tanh(batch["x"] @ params[0]) @ params[1]
        return jnp.mean((output - batch["y"]) ** 2)

    return params, loss, data


def rows(data, start, stop):
    return jax.tree.map(lambda x: x[start:stop], data)


@each_mode
def test_mean_over_batches_is_the_hessian_of_the_whole_set(mode):
    rtol = 1e-8 if mode == "finite_difference" else 1e-12
    with jax.enable_x64(True):
        params, loss, data = regression()
        matrix = dense_hessian(lambda p: loss(p, data), params)
        stacked = jax.tree.map(lambda x: x.reshape(6, 4, -1), data)
        host_data = jax.tree.map(np.asarray, data)
        ends = [(0, 10), (10, 20), (20, 24)]
        on_the_host = lambda: (rows(host_data, *e) for e in ends)
        scanned = jax.jit(hessian.mean_matvec(loss, params, stacked, hvp_mode=mode))
        looped = hessian.mean_matvec(loss, params, on_the_host, hvp_mode=mode)
        for seed in range(3):
            vector = random_like(params, seed)
            expected = matrix @ flatten(vector)
            for product in (scanned, looped):
                actual = product(vector)
                chex.assert_trees_all_equal_shapes_and_dtypes(actual, params)
                error = np.linalg.norm(flatten(actual) - expected)
                assert error <= rtol * np.linalg.norm(expected)


class Loader:
    """What can be iterated over again, as a loader of PyTorch can."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize("form", [list, Loader])
def test_batches_of_unequal_size_weigh_by_it(form):
    """A list of tuples of one length would pass for a tree of stacked arrays."""
    params, loss, data = regression()
    expected = hessian.hvp(lambda p: loss(p, data), params, random_like(params, 0))
    by_pair = lambda p, batch: loss(p, {"x": batch[0], "y": batch[1]})
    for ends in ([0, 12, 24], [0, 10, 20, 24]):
        pairs = [(data["x"][i:j], data["y"][i:j]) for i, j in itertools.pairwise(ends)]
        product = hessian.mean_matvec(by_pair, params, form(pairs))
        for _ in range(2):
            found = product(random_like(params, 0))
            chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"a list of .* loader, or a function"):
        hessian.mean_matvec(by_pair, params, iter(pairs))
    with pytest.raises(ValueError, match="stack batches of one size"):
        hessian.num_batches(pairs[:2])


def test_batches_of_scalars_weigh_alike():
    value_fn = lambda w, c: c * w**2
    product = hessian.mean_matvec(value_fn, jnp.array(1.0), lambda: [1.0, np.array(3)])
    np.testing.assert_allclose(product(jnp.array(1.0)), 4.0)


def test_the_scan_holds_the_activations_of_one_batch():
    params, loss, data = regression(width=512, examples=4096)
    vector = random_like(params, 0)
    stacked = jax.tree.map(lambda x: x.reshape(64, 64, -1), data)
    whole = hessian.matvec(jax.grad(lambda p: loss(p, data)), params)
    by_batch = hessian.mean_matvec(loss, params, stacked)
    temporary = lambda product: (
        jax.jit(product).lower(vector).compile().memory_analysis().temp_size_in_bytes
    )
    assert temporary(by_batch) < temporary(whole) / 8


def test_on_the_host_there_is_one_trace_per_shape_and_one_call_per_product():
    params, loss, data = regression()
    calls, traces = [], []

    def traced_loss(params, batch):
        traces.append(batch["x"].shape)
        return loss(params, batch)

    def batches():
        calls.append("called")
        return [rows(data, 0, 10), rows(data, 10, 20), rows(data, 20, 24)]

    product = hessian.mean_matvec(traced_loss, params, batches)
    for seed in range(3):
        product(random_like(params, seed))
    assert traces == [(10, 3), (4, 3)]
    assert len(calls) == 3


def test_bfloat16_products_are_summed_in_float32():
    value_fn = lambda w, c: jnp.sum(c * w**2) / 2
    weights = jnp.ones(2, jnp.bfloat16)
    for batches in (jnp.ones((1000, 1), jnp.bfloat16), lambda: 300 * [np.float32(1)]):
        product = hessian.mean_matvec(value_fn, weights, batches)(jnp.ones(2))
        assert product.dtype == jnp.float32
        np.testing.assert_allclose(product, jnp.ones(2), rtol=1e-6)


def test_products_at_other_parameters_compile_nothing(caplog):
    params, loss, data = regression()
    parts = [data, jax.tree.map(lambda x: x[:3], data)]  # the last one is smaller
    closure = {}

    def value_fn(params, batch):
        return closure["factor"] * loss(params, batch)

    products, compilations = [], []
    for factor, at in ((1, params), (1, optax.tree.scale(2, params)), (3, params)):
        closure["factor"] = factor
        caplog.clear()
        with jax.log_compiles():
            products.append(hessian.mean_matvec(value_fn, at, parts)(params))
        kinds = [x for x in caplog.messages if x.startswith("Compiling")]
        compilations.append(len(kinds))
    assert compilations[1] == 0 < compilations[2]  # the closure is another one there
    chex.assert_trees_all_close(
        products[2], optax.tree.scale(3, products[0]), rtol=1e-5
    )


def test_batches_that_make_no_mean_are_refused():
    params, loss, data = regression()
    refused = [data | {"y": data["y"][:5]}, {}, {"x": jnp.ones((0, 2))}, iter([data])]
    for batches in [*refused, {"x": jnp.array(1.0)}]:
        with pytest.raises(ValueError, match="batches must be a tree of arrays"):
            hessian.mean_matvec(loss, params, batches)
    used_up = iter([data])
    product = hessian.mean_matvec(loss, params, lambda: used_up)
    product(params)
    with pytest.raises(ValueError, match="at least one batch each time"):
        product(params)
    with pytest.raises(ValueError, match=r"can't be traced: .* host_loop=True"):
        jax.jit(product)(params)
    with pytest.raises(ValueError, match="hvp_mode must be one of"):
        hessian.mean_matvec(loss, params, lambda: [data], hvp_mode="reverse")


# --- Gauss–Newton ---------------------------------------------------------------------


def convex_loss(outputs):
    return optax.softmax_cross_entropy_with_integer_labels(
        outputs["logits"], jnp.array([0, 2])
    ).sum() + jnp.sum(outputs["height"] ** 2)


@functools.partial(jax.jit, static_argnums=0)
def gauss_newton_matrices(activation, inputs, params):
    """Ours, that of the definition, and the Hessian."""
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
    whole = dense_hessian(lambda p: convex_loss(predict(p)), params)
    return matrix, jacobian.T @ inner @ jacobian, whole


def unchanged(x):
    return x


@pytest.mark.parametrize("model", ["tanh", "linear"])
@pytest.mark.parametrize("seed", range(3))
def test_gauss_newton_is_jacobian_hessian_of_the_loss_jacobian(seed, model):
    activation = jnp.tanh if model == "tanh" else unchanged
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        inputs = rng.normal(size=(2, 3))
        params = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=3)}
        matrix, expected, whole = gauss_newton_matrices(activation, inputs, params)
        np.testing.assert_allclose(matrix, expected, rtol=1e-12, atol=1e-13)
        assert np.linalg.eigvalsh(matrix)[0] > -1e-12
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
def sine_with_a_slope_from_outside(x):
    return jnp.sin(x)


sine_with_a_slope_from_outside.defvjp(
    lambda x: (jnp.sin(x), x),
    lambda x, g: (g * jax.pure_callback(np.cos, x, x, vmap_method="sequential"),),
)


def check_modes(make_product, first_mode_that_works, expected, rtol):
    """Modes before the first that works raise JAX's error, which names the others."""
    for position, mode in enumerate(hessian.HVP_MODES):
        product = make_product(mode)
        if position < first_mode_that_works:
            with pytest.raises((TypeError, ValueError), match=r"JVP|forward-mode"):
                jax.jit(product)(V)
            with pytest.raises((TypeError, ValueError), match=r"JVP|forward-mode") as e:
                product(V)
            notes = " ".join(e.value.__notes__)
            assert "'reverse_over_reverse' needs no forward derivative" in notes
            assert "trackers.secant()" in notes
        else:
            loose = mode == "finite_difference"
            actual = jax.jit(product)(V)
            np.testing.assert_allclose(actual, expected, rtol=1e-3 if loose else rtol)


W, V = jnp.array([0.3, 1.2, -2.0]), jnp.array([1.0, -2.0, 0.5])


def test_the_mode_reaches_the_product_of_a_data_set():
    loss, batches = lambda w, x: x * sines(w), jnp.array([0.5, 1.5])
    matvec = hessian.mean_matvec(loss, W, batches, hvp_mode="reverse_over_reverse")
    np.testing.assert_allclose(matvec(V), dense_hessian_of_sines(W) @ V, rtol=1e-4)


@pytest.mark.parametrize(
    ("kernel", "first_mode_that_works"),
    [(sine_with_a_custom_slope, 1), (sine_with_a_slope_from_outside, 2)],
)
def test_kernels_that_forbid_a_second_derivative(kernel, first_mode_that_works):
    value_fn = lambda w: jnp.sum(w * kernel(w))
    expected = (2 * jnp.cos(W) - W * jnp.sin(W)) * V
    product = lambda mode: lambda v: hessian.hvp(value_fn, W, v, hvp_mode=mode)
    check_modes(product, first_mode_that_works, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "kernel", [sine_with_a_custom_slope, sine_with_a_slope_from_outside]
)
def test_gauss_newton_of_kernels_without_a_forward_derivative(kernel):
    loss = lambda y: jnp.sum(y**4)
    expected = 12 * jnp.sin(W) ** 2 * jnp.cos(W) ** 2 * V
    product = lambda mode: hessian.gauss_newton_matvec(kernel, loss, W, hvp_mode=mode)
    check_modes(product, 1, expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"hvp_mode must be one of .*, got 'jvp'"):
        hessian.gauss_newton_matvec(kernel, loss, W, hvp_mode="jvp")


@pytest.mark.parametrize("mode", hessian.HVP_MODES[1:])
def test_gauss_newton_modes_agree(mode):
    with jax.enable_x64(True):
        params = {"a": jnp.linspace(-1, 1, 12).reshape(3, 4), "b": jnp.ones(3)}
        inputs = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)))

        def predict(p):
            hidden = jnp.tanh(3 * inputs @ p["a"])
            return {"logits": hidden[:, :3] + p["b"], "height": hidden[:, 3]}

        def product(mode):
            matrix = hessian.gauss_newton_matvec
            return jax.jit(matrix(predict, convex_loss, params, hvp_mode=mode))(params)

        rtol = 1e-8 if mode == "finite_difference" else 1e-12
        assert relative_error(product(mode), product(hessian.HVP_MODES[0])) < rtol


def test_a_loss_that_is_no_scalar_gets_no_note():
    f, w = (lambda w, x: (jnp.sum(w * x), 0)), jnp.ones(3)
    matvec = hessian.mean_matvec(f, w, jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="value_fn must return a scalar") as error:
        matvec(w)
    assert "trackers" not in " ".join(getattr(error.value, "__notes__", ()))


def test_errors_that_are_no_missing_derivative_get_no_note():
    with pytest.raises(TypeError) as error:
        hessian.hvp(lambda w: jnp.sum(w, no_such_argument=1), W, V)
    assert "hvp_mode" not in " ".join(error.value.__notes__)  # JAX adds its own
