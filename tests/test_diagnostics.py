import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze
from jax.flatten_util import ravel_pytree
from problems import SPECTRA, dense_hessian, flatten, network, quadratic, symmetric

from eigensam_jax import diagnostics, eigen, hessian, sam, sharpness, tree_math

# --- sharpness ------------------------------------------------------------------------


@pytest.mark.parametrize("host_loop", [False, True], ids=["compiled", "host loop"])
def test_sharpness_of_a_quadratic_is_the_largest_eigenvalue(host_loop):
    def measure(matrix):
        value_fn, to_tree = quadratic(matrix, jnp.float32)
        return sharpness(value_fn, to_tree(jnp.zeros(5)), host_loop=host_loop)

    concave, zero = [-4.0, -3.0, -2.0, -1.0, -0.5], [0.0, 0.0, 0.0, 0.0, 0.0]
    measure = measure if host_loop else jax.jit(measure)
    for seed in range(3):
        for spectrum in (*SPECTRA.values(), concave, zero):
            matrix, basis = symmetric(spectrum, seed)
            top = measure(matrix)
            np.testing.assert_allclose(top.eigenvalue, max(spectrum), rtol=1e-5)
            v = flatten(top.eigenvector)
            np.testing.assert_allclose(np.linalg.norm(v), 1, rtol=1e-5)
            at_the_top = np.isclose(spectrum, max(spectrum))  # one or several
            inside = np.linalg.norm(basis[:, at_the_top].T @ v)
            np.testing.assert_allclose(inside, 1, atol=1e-4)
            assert {x.dtype for x in jax.tree.leaves(top)} == {jnp.dtype("float32")}


def test_sharpness_of_a_network_is_that_of_the_dense_hessian():
    def measure(seed, tol):
        params, loss = network(seed, jnp.float64)
        top = sharpness(loss, params, tol=tol)
        return top, hessian.hvp(loss, params, top.eigenvector)

    with jax.enable_x64(True):
        measure = jax.jit(measure)
        for seed in range(3):
            params, loss = network(seed, jnp.float64)
            values, vectors = np.linalg.eigh(dense_hessian(loss, params))
            gap = values[-1] - values[-2]
            for tol in (1e-3, 1e-8):
                top, product = measure(seed, tol)
                chex.assert_trees_all_equal_shapes_and_dtypes(top.eigenvector, params)
                assert top.residual <= tol * top.eigenvalue
                rest = tree_math.add_scaled(product, -top.eigenvalue, top.eigenvector)
                np.testing.assert_allclose(
                    top.residual, tree_math.norm(rest), rtol=1e-6, atol=1e-14
                )
                # Kato and Temple's bound on λ, Davis and Kahan's on v.
                off = values[-1] - top.eigenvalue
                assert -1e-12 <= off <= top.residual**2 / (gap - top.residual) + 1e-12
                cosine = min(abs(flatten(top.eigenvector) @ vectors[:, -1]), 1)
                sine = np.sqrt(1 - cosine**2)
                assert sine <= top.residual / (gap - top.residual) + 1e-7


@pytest.mark.parametrize("mode", hessian.HVP_MODES[1:])
def test_sharpness_in_each_mode_of_the_product(mode):
    params, loss = network()
    top = sharpness(loss, params, hvp_mode=mode)
    largest = np.linalg.eigvalsh(dense_hessian(loss, params))[-1]
    rtol = 1e-3 if mode == "finite_difference" else 1e-5
    np.testing.assert_allclose(top.eigenvalue, largest, rtol=rtol)
    assert top.residual < 1e-3 * top.eigenvalue


def test_the_residual_says_so_when_the_products_run_out():
    params, loss = network()
    top = sharpness(loss, params, tol=1e-6, max_matvecs=3)
    assert top.residual > 1e-3 * top.eigenvalue
    product = hessian.hvp(loss, params, top.eigenvector)
    rest = tree_math.add_scaled(product, -top.eigenvalue, top.eigenvector)
    np.testing.assert_allclose(top.residual, tree_math.norm(rest), rtol=1e-3)


def test_sharpness_starts_where_it_is_told_to():
    params, loss = network()
    values, vectors = np.linalg.eigh(dense_hessian(loss, params))
    v0 = ravel_pytree(params)[1](jnp.asarray(vectors[:, -1]))
    top = sharpness(loss, params, max_matvecs=3, v0=v0)
    np.testing.assert_allclose(top.eigenvalue, values[-1], rtol=1e-5)


def test_sharpness_of_bfloat16_parameters_is_float32():
    params, loss = network(dtype=jnp.bfloat16)
    top = sharpness(loss, params, tol=0.02, max_matvecs=40)
    assert {x.dtype for x in jax.tree.leaves(top)} == {jnp.dtype("float32")}
    wide = tree_math.widen(params)
    largest = np.linalg.eigvalsh(dense_hessian(loss, wide))[-1]
    np.testing.assert_allclose(top.eigenvalue, largest, rtol=0.02)


def test_sharpness_of_a_data_set_that_stays_on_the_host():
    params, loss = network()
    whole = lambda p: sum(loss(p, i) for i in range(5)) / 5
    matvec = hessian.mean_matvec(loss, params, lambda: range(5))
    top = eigen.top_eigenpairs(matvec, params, k=2, host_loop=True)
    values = np.linalg.eigvalsh(dense_hessian(whole, params))
    np.testing.assert_allclose(top.eigenvalue, values[:-3:-1], rtol=1e-4)


def test_sharpness_refuses_what_it_cannot_use():
    params, loss = network()
    with pytest.raises(ValueError, match="hvp_mode must be one of"):
        sharpness(loss, params, hvp_mode="reverse")
    with pytest.raises(ValueError, match="value_fn must return a scalar"):
        sharpness(lambda p: p["hidden"]["b"], params)
    with pytest.raises(ValueError, match=r"params\['w'\] must be real floating-point"):
        sharpness(loss, {"w": jnp.ones(2, jnp.int32)})
    with pytest.raises(ValueError, match="v0 must be a tree like params"):
        sharpness(loss, params, v0=params["out"])
    with pytest.raises(ValueError, match="value_fn must be a function of the param"):
        sharpness(params, loss)


# --- alignment ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_alignment_is_the_absolute_cosine(dtype):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        a, b = ([jnp.asarray(rng.normal(size=n), dtype) for n in (5, 3)] for _ in "ab")
        x, y = (flatten(t).astype(np.float64) for t in (a, b))
        expected = abs(x @ y) / (np.linalg.norm(x) * np.linalg.norm(y))
        for c in (1, -1e6, 1e-12):
            scaled = jax.tree.map(lambda x, c=c: x.astype(jnp.float32) * c, a)
            actual = jax.jit(diagnostics.alignment)(scaled, b)
            np.testing.assert_allclose(actual, expected, rtol=1e-5)
            assert 0.999999 < diagnostics.alignment(scaled, a) <= 1
        zeros = jax.tree.map(jnp.zeros_like, a)
        assert diagnostics.alignment(a, zeros) == 0
        assert diagnostics.alignment(zeros, a) == 0


# --- the gradient that is handed in ---------------------------------------------------


def checked():
    """A link that checks what reaches it, where `sam` would be."""

    def update(updates, state, params, *, value_fn, **_):
        diagnostics.check_gradient(updates, params, value_fn=value_fn)
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def step(before, params, grads, value_fn):
    tx = optax.chain(before, checked(), sam(), optax.sgd(0.1))
    return tx.update(grads, tx.init(params), params, value_fn=value_fn)


def kernels_alone(params):
    return jax.tree.map(lambda w: w.ndim > 1, params)


@pytest.mark.parametrize(
    ("before", "cause"),
    [
        (optax.clip_by_global_norm(0.01), r"times 0\.0\d+: .* before this one clips"),
        (optax.scale(128), r"times 128: the loss was scaled"),
        (optax.scale(8), r"times 8: .* a mean over devices or micro-batches is a sum"),
        (optax.add_decayed_weights(0.01), r"plus 0\.01 times params: weight decay"),
        (
            optax.add_decayed_weights(0.01, kernels_alone),
            r"plus 0\.01 times params: weight decay",
        ),
        (optax.sgd(0.1), r"times -0\.1: .*first in the chain"),
        (optax.adam(0.1), "not parallel to it: .* or a link before this one"),
        (optax.clip(0.01), r"not parallel to it: .*clips element-wise"),
        (optax.set_to_zero(), "They are zero"),
    ],
)
def test_a_link_before_is_found_out(before, cause):
    params, loss = network()
    params["hidden"]["b"] += 0.3
    grads = jax.grad(loss)(params)
    step(optax.identity(), params, grads, loss)
    with pytest.raises(ValueError, match=f"not the gradient of value_fn.*{cause}"):
        step(before, params, grads, loss)


@pytest.mark.parametrize("seed", range(3))
def test_another_batch_or_dropout_mask_is_found_out(seed):
    params, loss = network(seed)

    def dropout_loss(params, key):
        kept = jax.random.bernoulli(key, 0.8, params["out"]["w"].shape)
        return loss(params | {"out": {"w": params["out"]["w"] * kept / 0.8}})

    keys = jax.random.split(jax.random.key(seed))
    for f, mine, other in ((loss, 0, 1), (dropout_loss, *keys)):
        value_fn = lambda p, f=f, mine=mine: f(p, mine)
        step(optax.identity(), params, jax.grad(f)(params, mine), value_fn)
        with pytest.raises(ValueError, match="from another batch, dropout mask or"):
            step(optax.identity(), params, jax.grad(f)(params, other), value_fn)


def test_a_penalty_or_a_scale_in_the_loss_alone_is_found_out():
    params, loss = network()
    grads = jax.grad(loss)(params)
    with_penalty = lambda p: loss(p) + 0.005 * tree_math.vdot(p, p)
    with pytest.raises(ValueError, match=r"They lack 0\.01 times params: value_fn has"):
        step(optax.identity(), params, grads, with_penalty)
    with pytest.raises(ValueError, match=r"gradient times 0\.001: the loss was scaled"):
        step(optax.identity(), params, grads, lambda p: 1000 * loss(p))


def test_the_message_has_the_numbers_and_the_leaf():
    params, loss = network()
    grads = jax.grad(loss)(params)
    other = jax.tree.map(jnp.copy, grads)
    other["out"]["w"] = -2 * other["out"]["w"]
    with pytest.raises(ValueError, match="updates are not") as error:
        diagnostics.check_gradient(other, params, value_fn=loss)
    number = r"(-?[\d.]+(?:e-?\d+)?)"
    pattern = f"difference {number}, cosine {number}, ratio of norms {number}; .* is "
    found = re.search(pattern + r"updates\['out'\]\['w'\]\. ", str(error.value))
    u, g = flatten(other), flatten(grads)
    size, expected = np.linalg.norm(u), np.linalg.norm(g)
    numbers = [np.linalg.norm(u - g) / expected, u @ g / size / expected]
    np.testing.assert_allclose(
        [float(x) for x in found.groups()], [*numbers, size / expected], rtol=0.01
    )


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-5), ("bfloat16", 0.05)])
@pytest.mark.parametrize("seed", range(3))
def test_a_gradient_compiled_otherwise_passes(seed, dtype, rtol):
    params, loss = network(seed, jnp.dtype(dtype))
    grads = jax.jit(jax.grad(loss))(params)
    difference = diagnostics.check_gradient(grads, params, value_fn=loss, rtol=rtol)
    assert isinstance(difference, float)
    diagnostics.check_gradient(freeze(grads), params, value_fn=loss, rtol=rtol)
    with pytest.raises(ValueError, match="another batch"):
        diagnostics.check_gradient(
            grads, params, value_fn=lambda p: loss(p, 1), rtol=rtol
        )


def test_the_relative_difference_comes_back():
    params, loss = network()
    grads = jax.grad(loss)(params)
    assert diagnostics.check_gradient(grads, params, value_fn=loss) == 0
    off = tree_math.scale(1.0005, grads)
    difference = diagnostics.check_gradient(off, params, value_fn=loss)
    np.testing.assert_allclose(difference, 0.0005, rtol=1e-2)
    with pytest.raises(ValueError, match=r"relative difference 0\.0005, cosine 1"):
        diagnostics.check_gradient(off, params, value_fn=loss, rtol=1e-4)
    doubled = lambda p: tree_math.scale(2.0, jax.grad(loss)(p))  # as in `update`
    twice = doubled(params)
    kwargs = {"value_fn": loss, "grad_fn": doubled}
    assert diagnostics.check_gradient(twice, params, **kwargs) == 0
    with pytest.raises(ValueError, match="gradient of grad_fn at params"):
        diagnostics.check_gradient(grads, params, **kwargs)


def test_gradients_that_are_zero_or_not_finite():
    w, zero = jnp.ones(3), jnp.zeros(3)
    flat = lambda w: 0 * jnp.sum(w)
    assert diagnostics.check_gradient(zero, w, value_fn=flat) == 0
    with pytest.raises(ValueError, match=r"difference inf, cosine 0.*use the param"):
        diagnostics.check_gradient(jnp.arange(3.0), w, value_fn=flat)
    with pytest.raises(ValueError, match=r"plus 0\.1 times params"):
        diagnostics.check_gradient(0.1 * w, w, value_fn=flat)
    with pytest.raises(ValueError, match="The updates are not finite"):
        diagnostics.check_gradient(w.at[1].set(jnp.inf), w, value_fn=jnp.sum)
    with pytest.raises(ValueError, match="The gradient itself is not finite"):
        diagnostics.check_gradient(w, w, value_fn=lambda w: jnp.sum(jnp.log(w - 1)))


def test_misuse_of_the_check():
    params, loss = network()
    with pytest.raises(ValueError, match="needs value_fn or grad_fn"):
        diagnostics.check_gradient(params, params)
    with pytest.raises(ValueError, match="updates must be a tree like params"):
        diagnostics.check_gradient(params["out"], params, value_fn=loss)
    with pytest.raises(ValueError, match="rtol must be a finite number"):
        diagnostics.check_gradient(params, params, value_fn=loss, rtol=-1)
    check = lambda p: diagnostics.check_gradient(p, params, value_fn=loss)
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(check)(params)
