from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import SPECTRA, dense_hessian, flatten, network, symmetric

from eigensam_jax import eigen, hessian, tree_math
from eigensam_jax.eigen import _krylov


@partial(jax.jit, static_argnames=("solve", "num_matvecs"))
def solved(solve, matrix, v0, num_matvecs):
    """Compiled once for all matrices of one size."""
    return solve(lambda v: matrix @ v, v0, num_matvecs)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_converges_to_the_eigenpair_of_largest_magnitude(spectrum, seed):
    matrix, basis = symmetric(spectrum, seed)
    matrix = jnp.asarray(matrix, jnp.float32)
    v0 = jax.random.normal(jax.random.key(seed), (5,))
    pair = solved(eigen.power_iteration, matrix, v0, 60)
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
@pytest.mark.parametrize("num_matvecs", [1, 2, 5])
def test_value_and_residual_belong_to_the_input_of_the_last_product(num_matvecs, seed):
    with jax.enable_x64(True):
        matrix, _ = symmetric(SPECTRA["indefinite"], seed)
        start = np.random.default_rng(seed).normal(size=5)
        pair = solved(eigen.power_iteration, matrix, start, num_matvecs)
        v = start / np.linalg.norm(start)
        for _ in range(num_matvecs - 1):
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


@pytest.mark.parametrize("solve", [eigen.power_iteration, eigen.lanczos])
def test_only_products_with_convolutions_are_unrolled_and_come_out_the_same(solve):
    kernel = jnp.array([1.0, 3.0, 1.0])  # symmetric, and so is the convolution

    def run(v, unroll, product):
        return solve(lambda v: product(v), v, 4, unroll=unroll)

    convolve = lambda v: jnp.convolve(v, kernel, mode="same")
    loop, straight = (run(jnp.ones(5), unroll, convolve) for unroll in (False, True))
    np.testing.assert_allclose(loop.eigenvector, straight.eigenvector, rtol=1e-6)
    np.testing.assert_allclose(loop.eigenvalue, straight.eigenvalue, rtol=1e-6)

    def convolutions_and_loops(unroll, product):
        step = jax.jit(run, static_argnums=(1, 2))
        text = step.lower(jnp.ones(5), unroll, product).compile().as_text()
        return text.count(" convolution("), text.count(" while(")

    # Loops of their own: each norm, for numbers of all sizes, and orthogonalisation.
    in_product, outside = (2, 1) if solve is eigen.lanczos else (1, 2)
    assert convolutions_and_loops(True, convolve) == (4, 4 * in_product + outside)
    assert convolutions_and_loops(False, convolve) == (1, 1 + in_product + outside)
    dense = lambda v: 2 * v
    assert convolutions_and_loops(True, dense) == (0, 1 + in_product + outside)


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


@pytest.mark.parametrize("number", [0, -1, 2.5, True])
def test_a_bad_number_of_products(number):
    with pytest.raises(ValueError, match=f"num_matvecs .* got {number}"):
        eigen.power_iteration(lambda v: v, jnp.ones(2), number)
    with pytest.raises(ValueError, match=f"num_matvecs .* got {number}"):
        eigen.lanczos(lambda v: v, jnp.ones(2), number)


# --- Lanczos --------------------------------------------------------------------------


def random_symmetric(seed, size=60):
    """A random symmetric matrix, often indefinite, with a few large eigenvalues."""
    rng = np.random.default_rng(seed)
    spectrum = rng.normal(size=size) * np.where(rng.random(size) < 0.1, 6, 1)
    return symmetric(spectrum, seed)[0], rng.normal(size=size)


def rayleigh_quotient(matrix, v):
    v = np.asarray(v, np.float64)
    return v @ matrix @ v / (v @ v)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_matvecs", [1, 2, 5, 12])
def test_lanczos_is_the_maximum_over_the_krylov_space(num_matvecs, seed):
    with jax.enable_x64(True):
        matrix, start = random_symmetric(seed)
        pair = solved(eigen.lanczos, matrix, start, num_matvecs)
        basis = start[:, None] / np.linalg.norm(start)
        for _ in range(num_matvecs - 1):
            product = matrix @ basis[:, -1:]
            basis, _ = np.linalg.qr(np.hstack([basis, product]))
        values, vectors = np.linalg.eigh(basis.T @ matrix @ basis)
        y = basis @ vectors[:, -1]
        np.testing.assert_allclose(pair.eigenvalue, values[-1], rtol=1e-8)
        residual = np.linalg.norm(matrix @ y - values[-1] * y)
        np.testing.assert_allclose(pair.residual, residual, rtol=1e-6)
        step = matrix @ y - min(values[0], 0) * y
        if values[-1] == values[0] < 0:  # nothing is known of the rest of the spectrum
            step = y
        step /= np.linalg.norm(step)
        np.testing.assert_allclose(abs(step @ pair.eigenvector), 1, rtol=1e-8)
        np.testing.assert_allclose(np.linalg.norm(pair.eigenvector), 1, rtol=1e-8)


def test_lanczos_beats_power_iteration_for_the_same_products():

    @jax.jit
    def both(matrix, v0):
        matvec = lambda v: jnp.matmul(matrix, v, precision="highest")
        solvers = (eigen.lanczos, eigen.power_iteration)
        return [solve(matvec, v0, 5).eigenvector for solve in solvers]

    wins = 0
    for seed in range(100):
        matrix, start = random_symmetric(seed)
        ours, theirs = both(*(jnp.asarray(x, jnp.float32) for x in (matrix, start)))
        wins += rayleigh_quotient(matrix, ours) > rayleigh_quotient(matrix, theirs)
    assert wins >= 95


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("sign", [1, -1])
def test_lanczos_finds_the_top_of_any_spectrum(sign, spectrum, seed):
    matrix, basis = symmetric(np.multiply(sign, spectrum), seed)
    matrix = jnp.asarray(matrix, jnp.float32)
    v0 = jax.random.normal(jax.random.key(seed), (5,))
    pair = solved(eigen.lanczos, matrix, v0, 8)  # more than there are dimensions
    top = np.max(np.multiply(sign, spectrum))
    np.testing.assert_allclose(pair.eigenvalue, top, rtol=1e-5, atol=1e-5)
    in_eigenspace = basis[:, np.multiply(sign, spectrum) == top].T @ pair.eigenvector
    np.testing.assert_allclose(np.linalg.norm(in_eigenspace), 1, atol=1e-5)
    assert pair.residual < 1e-4


def test_lanczos_agrees_with_eigh_of_a_networks_hessian():
    params, loss = network()
    values, vectors = np.linalg.eigh(dense_hessian(loss, params))
    product = hessian.matvec(jax.grad(loss), params)
    pair = jax.jit(lambda v: eigen.lanczos(product, v, 25))(params)
    assert abs(flatten(pair.eigenvector) @ vectors[:, -1]) >= 1 - 1e-5
    np.testing.assert_allclose(pair.eigenvalue, values[-1], rtol=1e-5)
    v = flatten(pair.eigenvector)
    error = np.linalg.norm(dense_hessian(loss, params) @ v - pair.eigenvalue * v)
    assert error < 1e-3 * values[-1]


@pytest.mark.parametrize("unroll", [False, True])
def test_lanczos_on_degenerate_input(unroll):
    ones = jnp.ones(4)
    zero = eigen.lanczos(lambda v: 0 * v, ones, 3, unroll=unroll)
    np.testing.assert_allclose(zero.eigenvector, ones / 2, rtol=1e-6)
    assert zero.eigenvalue == 0
    negative = eigen.lanczos(lambda v: -2 * v, ones, 3, unroll=unroll)
    np.testing.assert_allclose(negative.eigenvector, ones / 2, rtol=1e-6)
    np.testing.assert_allclose(negative.eigenvalue, -2, rtol=1e-6)
    nowhere = eigen.lanczos(lambda v: 2 * v, 0 * ones, 3, unroll=unroll)
    np.testing.assert_array_equal(nowhere.eigenvector, 0 * ones)
    bad = eigen.lanczos(lambda v: v * jnp.nan, ones, 3, unroll=unroll)
    assert jnp.isnan(bad.eigenvalue)


# --- derivatives and shapes -----------------------------------------------------------


def top_of(solve, num_matvecs):
    """Eigenvalue and a function of the eigenvector, from a matrix and a start."""
    fixed = jnp.arange(1.0, 6.0)

    def value(matrix, start):
        pair = solve(lambda v: (matrix + matrix.T) / 2 @ v, start, num_matvecs)
        return pair.eigenvalue + (fixed @ pair.eigenvector) ** 2 + pair.residual

    return value


def check_derivatives(forward, reverse, *args):
    """Of a function, against central differences in a random direction."""
    direction = [
        np.random.default_rng(i).normal(size=x.shape) for i, x in enumerate(args)
    ]
    step = 1e-6
    moved = lambda h: [x + h * d for x, d in zip(args, direction, strict=True)]
    value = lambda h: forward(moved(h), direction)[0]
    expected = (value(step) - value(-step)) / (2 * step)
    slope = forward(list(args), direction)[1]
    np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-5)
    pairs = zip(reverse(*args), direction, strict=True)
    backward = sum(np.sum(g * d) for g, d in pairs)
    np.testing.assert_allclose(backward, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solve", [eigen.power_iteration, eigen.lanczos])
def test_derivatives_agree_with_finite_differences(solve):
    function = top_of(solve, 3)
    forward = jax.jit(lambda args, moves: jax.jvp(function, args, moves))
    reverse = jax.jit(jax.grad(function, argnums=(0, 1)))
    with jax.enable_x64(True):
        for seed in range(3):
            matrix, _ = symmetric(SPECTRA["indefinite"], seed)
            start = np.random.default_rng(seed).normal(size=5)
            args = jnp.asarray(matrix), jnp.asarray(start)
            check_derivatives(forward, reverse, *args)


@pytest.mark.parametrize("spectrum", ["indefinite", "degenerate"])
def test_the_eigenvalue_of_an_exhausted_space_has_its_derivative(spectrum):
    """By Hellmann and Feynman yyᵀ, with rows of the small matrix that are all alike."""
    with jax.enable_x64(True):
        matrix, _ = symmetric(SPECTRA[spectrum], 0)
        start = jnp.asarray(np.random.default_rng(0).normal(size=5))
        run = lambda m: eigen.lanczos(lambda v: (m + m.T) / 2 @ v, start, 8)
        value, pair = jax.jit(jax.grad(lambda m: run(m).eigenvalue)), jax.jit(run)
        y = pair(jnp.asarray(matrix)).eigenvector
        expected = np.outer(y, y)
        np.testing.assert_allclose(value(jnp.asarray(matrix)), expected, atol=1e-6)


@pytest.mark.parametrize("solve", [eigen.power_iteration, eigen.lanczos])
def test_derivatives_are_finite_where_there_is_nothing_to_differentiate(solve):
    run = lambda scale, start: solve(lambda v: scale * v, start, 3)
    slopes = jax.jit(jax.jacrev(run, argnums=(0, 1)))
    for start in (jnp.zeros(3), jnp.ones(3)):
        for scale in (jnp.array(0.0), jnp.array(2.0)):
            found = jax.tree.leaves(slopes(scale, start))
            assert all(jnp.isfinite(x).all() for x in found)


def test_eigh_has_finite_derivatives_at_equal_eigenvalues():
    matrix = jnp.diag(jnp.array([1.0, 1.0, 3.0]))
    change = jnp.zeros((3, 3)).at[2, 2].set(1.0)
    (_, vectors), (values_dot, vectors_dot) = jax.jvp(
        _krylov.eigh, (matrix,), (change,)
    )
    np.testing.assert_allclose(values_dot, [0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(vectors_dot, 0 * vectors, atol=1e-6)


def test_a_product_whose_norm_is_infinite_is_not_taken_for_zero():
    pair = eigen.lanczos(lambda v: v * jnp.inf, jnp.ones(4), 3)
    assert not jnp.isfinite(pair.eigenvalue)
    step = _krylov.extend(jnp.eye(3, 4), 2, jnp.array([0.0, jnp.inf, 0.0, 1.0]))
    assert not jnp.isfinite(step.length)
