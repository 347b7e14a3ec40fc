from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import SPECTRA, dense_hessian, network, symmetric

from eigensam_jax import eigen, hessian


@partial(jax.jit, static_argnames=("num_matvecs", "num_samples"))
def density_of(matrix, seed, *, num_matvecs, num_samples):
    """The compiled loop, on a matrix that is an argument."""
    return eigen.spectral_density(
        lambda v: jnp.matmul(matrix, v, precision="highest"),
        jnp.zeros(len(matrix), matrix.dtype),
        num_matvecs=num_matvecs,
        num_samples=num_samples,
        seed=seed,
    )


def moments(density, degrees):
    """Σ weights · nodesʲ of each sample, whose weights are made to sum to 1."""
    nodes, weights = map(np.asarray, density)
    powers = nodes[..., None] ** np.arange(degrees)
    return len(nodes) * (weights[..., None] * powers).sum(1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_matvecs", [1, 4, 7])
def test_quadrature_is_exact_to_degree_2m_minus_1(num_matvecs, seed):
    spectrum = np.random.default_rng(seed).uniform(-2, 2, 30)
    matrix, _ = symmetric(spectrum, seed)
    seen = []

    def matvec(v):
        seen.append(np.asarray(v))
        return matrix @ seen[-1]

    with jax.enable_x64(True):
        density = eigen.spectral_density(
            matvec,
            jnp.zeros(30),
            num_matvecs=num_matvecs,
            num_samples=2,
            seed=seed,
            host_loop=True,
        )
        compiled = density_of(
            jnp.asarray(matrix), seed, num_matvecs=num_matvecs, num_samples=2
        )
    assert len(seen) == 2 * num_matvecs
    starts = seen[::num_matvecs]
    np.testing.assert_allclose(np.linalg.norm(starts, axis=1), 1, rtol=1e-12)
    for v, row in zip(starts, moments(density, 2 * num_matvecs + 1), strict=True):
        exact = [
            v @ np.linalg.matrix_power(matrix, degree) @ v for degree in range(len(row))
        ]
        np.testing.assert_allclose(row[:-1], exact[:-1], rtol=1e-9, atol=1e-11)
        assert abs(row[-1] - exact[-1]) > 1e-4  # and no further
    for x, y in zip(density, compiled, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("seed", range(3))
def test_the_mean_over_samples_is_that_of_the_eigenvalues(seed):
    rng = np.random.default_rng(seed)
    spectrum = np.append(rng.uniform(-1, 1, 55), [2, 3, 4, 5, 6])
    n, samples = len(spectrum), 200
    matrix = jnp.asarray(symmetric(spectrum, seed)[0], jnp.float32)
    density = density_of(matrix, seed, num_matvecs=10, num_samples=samples)
    of_samples = moments(density, 6)
    np.testing.assert_allclose(of_samples[:, 0], 1, rtol=1e-5)
    np.testing.assert_allclose(density.weights.sum(), 1, rtol=1e-5)
    for degree in range(1, 6):
        f = spectrum**degree
        deviation = np.sqrt(2 * f.var() / (n + 2))  # of ⟨v, f(H) v⟩, v on the sphere
        standard_error = deviation / np.sqrt(samples)
        values = of_samples[:, degree]
        np.testing.assert_allclose(values.mean(), f.mean(), atol=4 * standard_error)
        np.testing.assert_allclose(values.std(ddof=1), deviation, rtol=0.5)


def test_as_many_products_as_dimensions_find_all_eigenvalues_of_a_networks_hessian():
    params, loss = network()
    values = np.linalg.eigvalsh(dense_hessian(loss, params))
    density = jax.jit(
        lambda p: eigen.spectral_density(
            hessian.matvec(jax.grad(loss), p), p, num_matvecs=48, num_samples=1
        )
    )(params)
    assert density.nodes.shape == density.weights.shape == (1, 48)
    # Where many are close to zero the Krylov space is exhausted before.
    np.testing.assert_allclose(density.nodes[0, -10:], values[-10:], atol=1e-5)
    np.testing.assert_allclose(density.nodes[0, :5], values[:5], atol=1e-5)
    mean = (density.nodes * density.weights).sum()
    np.testing.assert_allclose(
        mean, values.mean(), atol=4 * values.std() * (2 / 50) ** 0.5
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [1, 1e-6, 0])
def test_an_exhausted_space(scale, seed):
    spectrum = scale * np.array(SPECTRA["degenerate"])
    matrix = jnp.asarray(symmetric(spectrum, seed)[0], jnp.float32)
    nodes, weights = density_of(matrix, seed, num_matvecs=8, num_samples=3)
    near = np.isclose(nodes[..., None], spectrum, rtol=1e-4, atol=1e-6 * scale).any(-1)
    np.testing.assert_allclose(np.where(near, weights, 0).sum(1), 1 / 3, rtol=1e-5)


def test_a_tree_with_leaves_of_all_kinds():
    like = {
        "half": jnp.zeros((3, 4), jnp.bfloat16),
        "none": jnp.zeros((0, 2)),
        "scalar": jnp.zeros(()),
    }
    density = jax.jit(
        lambda x: eigen.spectral_density(
            lambda v: jax.tree.map(lambda leaf: 3 * leaf, v), x, num_matvecs=2
        )
    )(like)
    assert density.nodes.shape == (8, 2)
    assert density.nodes.dtype == density.weights.dtype == jnp.float32
    np.testing.assert_allclose((density.nodes * density.weights).sum(), 3, rtol=1e-5)


def test_a_product_that_is_not_finite_shows():
    nodes, weights = density_of(
        jnp.full((5, 5), jnp.nan), 0, num_matvecs=3, num_samples=2
    )
    assert jnp.isnan(nodes).all()
    assert jnp.isnan(weights).all()


def test_the_curve_is_a_sum_of_gaussians_and_integrates_to_one():
    density = eigen.SpectralDensity(
        jnp.array([[0.0, 1.0], [0.5, 4.0]]), jnp.array([[0.1, 0.4], [0.2, 0.3]])
    )
    grid = np.linspace(-2, 6, 801)
    curve = eigen.smooth_density(density, grid, 0.2)
    expected = sum(
        weight * np.exp(-((grid - node) ** 2) / 0.08) / np.sqrt(0.08 * np.pi)
        for node, weight in zip(
            density.nodes.ravel(), density.weights.ravel(), strict=True
        )
    )
    np.testing.assert_allclose(curve, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.trapezoid(curve, grid), 1, rtol=1e-5)
    table = eigen.smooth_density(density, grid.reshape(9, 89), 0.2)
    np.testing.assert_array_equal(table.ravel(), curve)


@pytest.mark.parametrize("number", [0, 1.5, True])
def test_a_bad_number(number):
    for name in ("num_matvecs", "num_samples"):
        with pytest.raises(ValueError, match=f"{name} .* got {number}"):
            eigen.spectral_density(lambda v: v, jnp.ones(2), **{name: number})


@pytest.mark.parametrize("width", [0, -1.0, float("nan")])
def test_a_bad_width(width):
    density = eigen.SpectralDensity(jnp.zeros((1, 1)), jnp.ones((1, 1)))
    with pytest.raises(ValueError, match=f"width must be .* got {width}"):
        eigen.smooth_density(density, jnp.zeros(3), width)


def test_a_space_is_exhausted_where_some_leaves_are_narrower():
    """Six eigenvalues are six nodes: what float32 leaves over is no direction."""
    with jax.enable_x64(True):
        spectra = {"a": jnp.arange(6, dtype=jnp.float32), "b": jnp.ones(3)}
        matvec = lambda v: jax.tree.map(jnp.multiply, spectra, v)
        density = eigen.spectral_density(matvec, spectra, num_matvecs=9)
        assert (np.sum(density.weights > 1e-9, axis=1) == 6).all()
