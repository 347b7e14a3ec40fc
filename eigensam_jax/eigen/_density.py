"""The spectral density of a matrix, from its products with random vectors."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from eigensam_jax import tree_math
from eigensam_jax._update import arguments, programs
from eigensam_jax.eigen import _krylov, _raveled
from eigensam_jax.hessian import Matvec
from eigensam_jax.tree_math import PyTree


class SpectralDensity(NamedTuple):
    """Weighted points that stand for the eigenvalues, one row per random vector.

    Attributes:
      nodes: the points, shape (num_samples, num_matvecs).
      weights: the share of the eigenvalues at each; they sum to 1.
    """

    nodes: jax.Array
    weights: jax.Array


def spectral_density(
    matvec: Matvec,
    like: PyTree,
    *,
    num_matvecs: int = 32,
    num_samples: int = 8,
    seed: int = 0,
    host_loop: bool = False,
) -> SpectralDensity:
    """Stochastic Lanczos quadrature: the distribution of the eigenvalues λᵢ of H.

        (1/n) Σᵢ f(λᵢ) = E ⟨v, f(H) v⟩ ≈ Σ weights · f(nodes)

    For each sample of v, a uniformly random direction, m Lanczos steps give the m nodes
    and weights of Gauss quadrature, exact for polynomials f of degree up to 2m − 1. The
    outermost nodes are close to the outermost eigenvalues. The standard deviation is
    about √(2 · variance of f(λ) / (n · num_samples)) in n dimensions: small for large
    networks. Cost: m · `num_samples` products, the memory of m + 5 vectors, 4m² vector
    operations per sample.

    Args:
      matvec, like: as in `top_eigenpairs`.
      num_matvecs: m, products per random vector, at least 1.
      num_samples: the number of random vectors, at least 1.
      seed, host_loop: as in `top_eigenpairs`.

    Returns:
      A `SpectralDensity`. Once a Krylov space is exhausted, the remaining nodes have
      weight 0. A non-finite product makes its sample NaN.

    Example:
      >>> import eigensam_jax, jax.numpy as jnp
      >>> matvec, like = lambda v: jnp.array([-1.0, 1.0, 1.0, 5.0]) * v, jnp.zeros(4)
      >>> density = eigensam_jax.eigen.spectral_density(matvec, like, num_matvecs=3)
      >>> density.nodes.mean(0).round(3) + 0.0  # of weights 0.25, 0.5, 0.25 in the mean
      Array([-1.,  1.,  5.], dtype=float32)

    References:
      Golub and Welsch, "Calculation of Gauss quadrature rules", 1969; Ubaru, Chen and
      Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", 2017;
      Ghorbani, Krishnan and Xiao, "An investigation into neural net optimization via
      Hessian eigenvalue density", ICML 2019.
    """
    arguments.check_positive_int("num_matvecs", num_matvecs, "products per sample")
    arguments.check_positive_int("num_samples", num_samples, "random vectors")
    key, raveled = jax.random.key(seed), _raveled.raveled(host_loop, like)
    matvec, like = raveled.product(matvec), raveled.zero
    start = programs.jitted(host_loop, _random_start, static_argnums=2)
    get = programs.jitted(host_loop, _krylov.get)
    grow = programs.jitted(host_loop, _krylov.grow, donate_argnums=1)

    def product(i: jax.Array, space: _krylov.Tridiagonal) -> _krylov.Tridiagonal:
        grown: _krylov.Tridiagonal = grow(i, space, matvec(get(space.basis, i)))
        return grown

    def sample(i: jax.Array, density: SpectralDensity) -> SpectralDensity:
        space = start(jax.random.fold_in(key, i), like, num_matvecs)
        space = programs.repeat(host_loop, num_matvecs, product, space)
        matrix = _krylov.dense(space.diagonal, space.off_diagonal)
        values, vectors = _krylov.eigh(matrix)
        shares = vectors[0] ** 2
        shares /= shares.sum() * num_samples
        return SpectralDensity(
            density.nodes.at[i].set(values), density.weights.at[i].set(shares)
        )

    dtype = tree_math.accumulation_dtype(like)
    empty = [jnp.zeros((num_samples, num_matvecs), dtype) for _ in range(2)]
    return programs.repeat(host_loop, num_samples, sample, SpectralDensity(*empty))


def _random_start(
    key: jax.Array, like: PyTree, num_matvecs: int
) -> _krylov.Tridiagonal:
    return _krylov.tridiagonal(_krylov.random_vector(key, like), num_matvecs)


def smooth_density(
    density: SpectralDensity, grid: ArrayLike, width: float | jax.Array
) -> jax.Array:
    """The density as a curve, φ(t) = Σ weights · N(t; nodes, width²).

    φ is the share of the eigenvalues per unit of t; its integral is 1.

    Args:
      density: what `spectral_density` returned.
      grid: the points t, of any shape.
      width: standard deviation of the Gaussians N, above 0 and wider than grid steps.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import eigen
      >>> density = eigen.spectral_density(lambda v: 2 * v, jnp.zeros(4))
      >>> grid = jnp.linspace(0, 4, 1000)
      >>> print(f"{jnp.trapezoid(eigen.smooth_density(density, grid, 0.1), grid):.4f}")
      1.0000
    """
    arguments.check_scalar("width", width, schedule=False)
    if not isinstance(width, jax.core.Tracer) and float(width) == 0:
        raise ValueError(
            "width must be above 0, got 0: the curve would be infinite at every node. "
            "Take about a hundredth of the range of the eigenvalues."
        )
    dtype = density.nodes.dtype
    points, width = jnp.asarray(grid, dtype)[..., None], jnp.asarray(width, dtype)
    row = (1,) * (points.ndim - 1) + (-1,)
    nodes, weights = (x.reshape(row) for x in density)
    heights = jnp.exp(-(((points - nodes) / width) ** 2) / 2)
    return jnp.sum(weights * heights, -1) / (width * math.sqrt(2 * math.pi))
