import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eigensam_jax import perturbation, tree_math


def trees(seed, dtype=np.float64):
    """A gradient, parameters and a unit vector, as trees and as flat vectors."""
    rng = np.random.default_rng(seed)
    g, w, v = rng.normal(size=(3, 7))
    v /= np.linalg.norm(v)
    to_tree = lambda x: {
        "a": jnp.asarray(x[:4], dtype),
        "b": [jnp.asarray(x[4:], dtype)],
    }
    return (g, w, v), tuple(map(to_tree, (g, w, v)))


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("seed", range(3))
def test_sam_is_the_gradient_at_radius_rho(seed):
    (g, _, _), (grads, _, _) = trees(seed)
    result = perturbation.sam(grads, 0.3)
    np.testing.assert_allclose(flat(result.epsilon), 0.3 * g / np.linalg.norm(g))
    assert result.norm == 0.3
    np.testing.assert_allclose(result.grad_norm, np.linalg.norm(g))
    assert result.alignment is None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale_biases", [False, True])
def test_asam_is_the_scaled_gradient(scale_biases, seed):
    (g, w, _), _ = trees(seed)
    to_tree = lambda x: {"w": x[:4].reshape(2, 2), "b": x[4:6], "scalar": x[6]}
    grads, params = (jax.tree.map(jnp.asarray, to_tree(x)) for x in (g, w))
    result = perturbation.asam(grads, params, 0.3, 0.01, scale_biases=scale_biases)
    scale = np.abs(w) + 0.01
    if not scale_biases:
        scale[4:] = 1  # T = 1 on leaves of one axis or none
    expected = 0.3 * scale**2 * g / np.linalg.norm(scale * g)
    for name, x in to_tree(expected).items():
        np.testing.assert_allclose(result.epsilon[name], x)
    np.testing.assert_allclose(np.linalg.norm(expected / scale), 0.3)
    np.testing.assert_allclose(result.norm, np.linalg.norm(expected))
    if not scale_biases:
        default = perturbation.asam(grads, params, 0.3, 0.01)
        np.testing.assert_array_equal(default.norm, result.norm)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0, 3.0])
def test_eigen_sam_is_the_definition(alpha, seed):
    (g, _, v), (grads, _, eigenvector) = trees(seed)
    result = perturbation.eigen_sam(grads, eigenvector, 0.3, alpha)
    u = g / np.linalg.norm(g)
    across = v - (u @ v) * u
    expected = 0.3 * (u + alpha * np.sign(g @ v) * across)
    np.testing.assert_allclose(flat(result.epsilon), expected, rtol=1e-12)
    radius = np.linalg.norm(expected)
    np.testing.assert_allclose(result.norm, radius, rtol=1e-12)
    np.testing.assert_allclose(
        radius, 0.3 * np.sqrt(1 + alpha**2 * (1 - (u @ v) ** 2)), rtol=1e-12
    )
    np.testing.assert_allclose(result.projection, expected @ v, rtol=1e-11)
    np.testing.assert_allclose(result.alignment, abs(expected @ v) / radius, rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_sign_of_the_eigenvector_does_not_matter(seed):
    _, (grads, _, v) = trees(seed, np.float32)
    one = perturbation.eigen_sam(grads, v, 0.3, 0.7)
    other = perturbation.eigen_sam(grads, tree_math.scale(-1, v), 0.3, 0.7)
    other = other._replace(projection=-other.projection)  # on v: that alone turns
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("vector", "alpha"),
    [([0.0, 0.0], 1.0), ([0.0, 1.0], 1.0), ([0.6, 0.8], 0.0), ([1.0, 0.0], 1.0)],
    ids=["no estimate", "orthogonal", "alpha 0", "parallel"],
)
def test_where_eigen_sam_is_sam(vector, alpha):
    g = jnp.array([2.0, 0.0])
    result = perturbation.eigen_sam(g, jnp.array(vector), 0.5, alpha)
    np.testing.assert_array_equal(result.epsilon, perturbation.sam(g, 0.5).epsilon)
    assert result.norm == 0.5
    assert result.alignment == abs(vector[0])


PERTURBATIONS = {
    "sam": lambda g: perturbation.sam(g, 0.1),
    "asam": lambda g: perturbation.asam(g, jnp.ones_like(g), 0.1, 0.01),
    "eigen_sam": lambda g: perturbation.eigen_sam(g, jnp.ones_like(g) / 2, 0.1, 1.0),
}


@pytest.mark.parametrize("perturb", PERTURBATIONS.values(), ids=PERTURBATIONS)
@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, 1e38])
def test_a_gradient_without_direction_gives_no_perturbation(perturb, bad):
    grads = jnp.array([bad, 0.0, 0.0, bad], jnp.float32)
    result = jax.jit(perturb)(grads)
    np.testing.assert_array_equal(result.epsilon, np.zeros(4))
    assert result.norm == 0
    assert result.alignment in (None, 0)
    assert result.epsilon.dtype == jnp.float32


@pytest.mark.parametrize("perturb", PERTURBATIONS.values(), ids=PERTURBATIONS)
@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1e18, 1e20, 1e30])
def test_the_size_of_the_gradient_does_not_matter(perturb, factor):
    grads = jnp.array([0.3, -0.4, 0.0, 1.2], jnp.float32)
    expected, result = perturb(grads), jax.jit(perturb)(jnp.float32(factor) * grads)
    np.testing.assert_allclose(result.epsilon, expected.epsilon, rtol=1e-5)
    np.testing.assert_allclose(result.norm, expected.norm, rtol=1e-5)
    np.testing.assert_allclose(result.grad_norm, 1.3 * factor, rtol=1e-5)


@pytest.mark.parametrize("perturb", PERTURBATIONS.values(), ids=PERTURBATIONS)
def test_low_precision_gradients_give_float32(perturb):
    grads = jnp.array([3e-4, -4e-4, 0.0, 0.0], jnp.float16)  # squares vanish in float16
    result = perturb(grads)
    assert {x.dtype for x in jax.tree.leaves(result)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(result.norm, np.linalg.norm(result.epsilon), rtol=1e-6)
    assert result.norm > 0.05


def test_a_wider_rho_does_not_widen_the_result():
    grads = jnp.ones(4, jnp.float32)
    for perturb in (
        lambda rho: perturbation.sam(grads, rho),
        lambda rho: perturbation.asam(grads, grads, rho, 0.0),
        lambda rho: perturbation.eigen_sam(grads, grads / 2, rho, rho),
    ):
        dtypes = {x.dtype for x in jax.tree.leaves(perturb(jnp.float64(0.1)))}
        assert dtypes == {jnp.dtype("float32")}
