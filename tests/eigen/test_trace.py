from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import dense_hessian, flatten, network, symmetric

from eigensam_jax import eigen, hessian

BOTH = pytest.mark.parametrize("estimate", [eigen.trace, eigen.diagonal])


def product_with(matrix):
    return lambda v: jnp.matmul(matrix, v, precision="highest")


@jax.jit
def estimates_of(matrix, seed):
    """Trace, Hutchinson's trace and diagonal, each from 64 products."""
    matvec, like = product_with(matrix), matrix[0]
    return (
        eigen.trace(matvec, like, num_matvecs=64, seed=seed),
        eigen.trace(matvec, like, num_matvecs=64, seed=seed, rank=0),
        eigen.diagonal(matvec, like, num_matvecs=64, seed=seed),
    )


def test_errors_are_within_three_standard_errors_in_97_of_100_cases():
    """Spectra as those of networks, a few large eigenvalues and a bulk, and others."""
    rng = np.random.default_rng(0)
    inside, relative = [], []
    for seed in range(100):
        bulk = rng.choice([0.01, 0.1, 1]) * rng.normal(size=200 - seed % 10)
        spectrum = np.append(rng.uniform(5, 50, seed % 10), bulk)
        matrix, _ = symmetric(spectrum, seed)
        trace, plain, diagonal = estimates_of(jnp.asarray(matrix, jnp.float32), seed)
        errors = [x.value - spectrum.sum() for x in (trace, plain)]
        off = np.linalg.norm(diagonal.value - np.diag(matrix))
        pooled = np.linalg.norm(diagonal.standard_error)
        inside.append(
            [
                abs(errors[0]) <= 3 * trace.standard_error,
                abs(errors[1]) <= 3 * plain.standard_error,
                off <= 3 * pooled,
            ]
        )
        relative.append([*map(abs, errors), off, pooled])
    assert np.all(np.sum(inside, 0) >= 97), np.sum(inside, 0)
    few, hutchinson, off, pooled = np.median(relative, 0)
    assert few < 0.2 * hutchinson
    assert pooled < 1.2 * off  # the standard error is no exaggeration


@BOTH
@pytest.mark.parametrize("rank", [0, 2, 3])
def test_the_formula_on_the_vectors_that_were_asked_for(estimate, rank):
    matrix, _ = symmetric([-2.0, 0.1, 0.3, 1.0, 4.0, 9.0], 1)
    seen = []

    def matvec(v):
        seen.append(np.asarray(v))
        return matrix @ seen[-1]

    with jax.enable_x64(True):
        found = estimate(
            matvec, jnp.zeros(6), num_matvecs=9, rank=rank, seed=3, host_loop=True
        )
    assert len(seen) == 9
    vectors = np.stack(seen)
    basis, rest = vectors[rank : 2 * rank], vectors[2 * rank :]
    np.testing.assert_allclose(basis @ basis.T, np.eye(rank), atol=1e-12)
    within = basis.T @ basis @ matrix @ vectors[:rank].T
    np.testing.assert_allclose(within, matrix @ vectors[:rank].T, atol=1e-10)
    np.testing.assert_allclose(basis @ rest.T, 0, atol=1e-12)
    if rank == 0:
        np.testing.assert_array_equal(np.abs(rest), 1)
        signs = rest
    else:  # the z with random signs whose parts these are
        candidates = np.stack(np.meshgrid(*6 * [[-1.0, 1.0]], indexing="ij"), -1)
        candidates = candidates.reshape(-1, 6)
        parts = candidates - candidates @ basis.T @ basis
        nearest = np.linalg.norm(parts[:, None] - rest, axis=-1)
        np.testing.assert_allclose(nearest.min(0), 0, atol=1e-10)
        signs = candidates[nearest.argmin(0)]
    if estimate is eigen.trace:
        exact = np.trace(basis @ matrix @ basis.T)
        samples = np.sum(rest * (rest @ matrix), -1)
    else:
        exact = np.sum(basis * (basis @ matrix), 0)
        samples = signs * (rest @ matrix)
    error = samples.std(0, ddof=1) / np.sqrt(len(samples))
    np.testing.assert_allclose(found.value, exact + samples.mean(0), rtol=1e-10)
    np.testing.assert_allclose(found.standard_error, error, rtol=1e-9)


@BOTH
@pytest.mark.parametrize("seed", range(3))
def test_a_basis_that_spans_the_range_leaves_nothing_to_chance(estimate, seed):
    spectrum = np.append([-3.0, 0.5, 7.0], np.zeros(17))
    matrix, _ = symmetric(spectrum, seed)
    with jax.enable_x64(True):
        matvec = product_with(jnp.asarray(matrix))
        found = estimate(matvec, jnp.zeros(20), num_matvecs=14, seed=seed)
    expected = 4.5 if estimate is eigen.trace else np.diag(matrix)
    np.testing.assert_allclose(found.value, expected, atol=1e-10)
    assert np.all(np.asarray(found.standard_error) < 1e-10)


def test_a_network_of_several_leaves():
    params, loss = network()
    matvec = hessian.matvec(jax.grad(loss), params)
    dense = np.asarray(dense_hessian(loss, params))
    trace = jax.jit(partial(eigen.trace, matvec, seed=1))(params)
    diagonal = jax.jit(partial(eigen.diagonal, matvec, seed=1))(params)
    assert abs(trace.value - np.trace(dense)) < 3 * trace.standard_error
    assert trace.standard_error < 0.1 * np.trace(dense)
    for tree in diagonal:
        assert jax.tree.structure(tree) == jax.tree.structure(params)
    off = np.linalg.norm(flatten(diagonal.value) - np.diag(dense))
    assert off < 3 * np.linalg.norm(flatten(diagonal.standard_error))
    assert off < 0.3 * np.linalg.norm(np.diag(dense))


@BOTH
def test_loops_of_the_host_and_of_the_program_agree(estimate):
    """The host's is over a tree in one array, so it draws as that array does."""
    params, loss = network()
    flat, unravel = ravel_pytree(params)
    options = {"num_matvecs": 11, "seed": 2}
    matvec = hessian.matvec(jax.grad(loss), params)
    found = estimate(matvec, params, host_loop=True, **options)
    matvec = hessian.matvec(jax.grad(lambda w: loss(unravel(w))), flat)
    compiled = jax.jit(partial(estimate, matvec, **options))(flat)
    for a, b in zip(found, compiled, strict=True):
        is_tree = estimate is eigen.diagonal
        assert jax.tree.structure(a) == jax.tree.structure(params if is_tree else 0.0)
        np.testing.assert_allclose(flatten(a), b, rtol=2e-4, atol=1e-5)


@BOTH
def test_a_product_that_is_not_finite(estimate):
    found = estimate(lambda v: jnp.nan * v, jnp.zeros(4), num_matvecs=8)
    assert np.all(np.isnan(found.value))
    assert np.all(np.isnan(found.standard_error))


@BOTH
def test_bad_numbers(estimate):
    solve = partial(estimate, lambda v: v, jnp.zeros(4))
    for number in (0, 1, 2.5, True):
        with pytest.raises(ValueError, match=f"num_matvecs must be .* got {number}"):
            solve(num_matvecs=number)
    for rank in (-1, 4, 1.5):
        with pytest.raises(ValueError, match=f"rank must be .* 0 and 3 .* got {rank}"):
            solve(num_matvecs=8, rank=rank)
