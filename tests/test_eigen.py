import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import SPECTRA, dense_hessian, flatten, network, symmetric

from eigensam_jax import eigen, hessian, tree_math


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_converges_to_the_eigenpair_of_largest_magnitude(spectrum, seed):
    matrix, basis = symmetric(spectrum, seed)
    matrix = jnp.asarray(matrix, jnp.float32)
    v0 = jax.random.normal(jax.random.key(seed), (5,))
    pair = eigen.power_iteration(lambda v: matrix @ v, v0, 60)
    top = np.asarray(spectrum) == max(spectrum, key=abs)
    np.testing.assert_allclose(pair.eigenvalue, np.max(spectrum), rtol=1e-5)
    in_eigenspace = np.linalg.norm(basis[:, top].T @ np.asarray(pair.eigenvector))
    np.testing.assert_allclose(in_eigenspace, 1, atol=1e-5)
    assert pair.residual < 1e-4


def test_finds_a_negative_eigenvalue_with_its_sign():
    spectrum = jnp.array([-5.0, 1.0, 2.0])
    pair = eigen.power_iteration(lambda v: spectrum * v, jnp.ones(3), 50)
    np.testing.assert_allclose(pair.eigenvalue, -5, rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_iters", [1, 2, 5])
def test_value_and_residual_belong_to_the_input_of_the_last_product(num_iters, seed):
    with jax.enable_x64(True):
        matrix, _ = symmetric(SPECTRA["indefinite"], seed)
        matvec = lambda v: jnp.asarray(matrix) @ v
        start = np.random.default_rng(seed).normal(size=5)
        pair = eigen.power_iteration(matvec, jnp.asarray(start), num_iters)
        v = start / np.linalg.norm(start)
        for _ in range(num_iters - 1):
            v = matrix @ v / np.linalg.norm(matrix @ v)
        np.testing.assert_allclose(pair.eigenvalue, v @ matrix @ v, rtol=1e-12)
        residual = np.linalg.norm(matrix @ v - pair.eigenvalue * v)
        np.testing.assert_allclose(pair.residual, residual, rtol=1e-12)
        last = matrix @ v / np.linalg.norm(matrix @ v)
        np.testing.assert_allclose(pair.eigenvector, last, rtol=1e-12)


def test_agrees_with_eigh_of_a_networks_hessian():
    params, loss = network()
    values, vectors = np.linalg.eigh(dense_hessian(loss, params))
    assert values[-1] > 1.1 * np.abs(values[:-1]).max()  # a gap to converge by
    product = hessian.matvec(jax.grad(loss), params)
    pair = jax.jit(lambda v: eigen.power_iteration(product, v, 300))(params)
    assert abs(flatten(pair.eigenvector) @ vectors[:, -1]) >= 1 - 1e-5
    np.testing.assert_allclose(pair.eigenvalue, values[-1], rtol=1e-5)
    assert pair.residual < 1e-3 * values[-1]


def test_unrolled_is_the_same_and_makes_no_loop():
    matrix = jnp.asarray(symmetric(SPECTRA["indefinite"], 0)[0], jnp.float32)

    def run(v, unroll):
        return eigen.power_iteration(lambda v: matrix @ v, v, 4, unroll=unroll)

    loop, straight = (run(jnp.ones(5), unroll) for unroll in (False, True))
    np.testing.assert_allclose(loop.eigenvector, straight.eigenvector, rtol=1e-6)
    text = jax.jit(run, static_argnums=1).lower(jnp.ones(5), True).as_text()
    assert "while" not in text
    assert "while" in jax.jit(run, static_argnums=1).lower(jnp.ones(5), False).as_text()


def test_a_zero_matrix_leaves_the_vector_where_it_is():
    pair = eigen.power_iteration(lambda v: 0 * v, jnp.array([3.0, 4.0]), 3)
    np.testing.assert_allclose(pair.eigenvector, [0.6, 0.8], rtol=1e-6)
    assert pair.eigenvalue == 0
    assert pair.residual == 0


def test_a_product_that_is_not_finite_shows_in_the_eigenvalue_alone():
    pair = eigen.power_iteration(lambda v: v * jnp.nan, jnp.array([3.0, 4.0]), 3)
    np.testing.assert_allclose(pair.eigenvector, [0.6, 0.8], rtol=1e-6)
    assert jnp.isnan(pair.eigenvalue)


def test_a_zero_start_stays_finite():
    pair = eigen.power_iteration(lambda v: 2 * v, jnp.zeros(3), 2)
    assert tree_math.norm(pair.eigenvector) == 0
    assert pair.eigenvalue == 0


@pytest.mark.parametrize("num_iters", [0, -1, 2.5, True])
def test_bad_num_iters(num_iters):
    with pytest.raises(ValueError, match=f"num_iters .* got {num_iters}"):
        eigen.power_iteration(lambda v: v, jnp.ones(2), num_iters)
