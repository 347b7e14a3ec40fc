"""The spectral density of a matrix from its products with random vectors."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from eigensam_jax import tree_math
from eigensam_jax._update import arguments, programs
from eigensam_jax.eigen import _krylov
from eigensam_jax.hessian import Matvec
from eigensam_jax.tree_math import PyTree


class SpectralDensity(NamedTuple):
    """Weighted points in place of the eigenvalues: a row for each random vector.

    Attributes:
      nodes: where they are, shape (num_samples, num_matvecs).
      weights: the share of the eigenvalues that each stands for; all add up to 1.
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
    """Stochastic Lanczos quadrature: how the eigenvalues λᵢ of H are spread.

        (1/n) Σᵢ f(λᵢ) = E ⟨v, f(H) v⟩ ≈ Σ weights · f(nodes)

    where v is a uniformly random direction. For each of `num_samples` of them, m
    Lanczos steps give the m nodes and weights of Gauss quadrature, exact for every
    polynomial f of degree at most 2m − 1. The mean over samples has a standard
    deviation of about √(2 · (mean of f² − (mean of f)²) / (n · num_samples)) in n
    dimensions: little for a large network. The outermost nodes are close to the
    outermost eigenvalues, inner ones stand for many.

    Cost: m · `num_samples` products, m + 1 vectors, 4m² vector operations a sample.

    Args:
      matvec, like: as in `top_eigenpairs`.
      num_matvecs: m, products per random vector, at least 1.
      num_samples: how many random vectors, at least 1.
      seed, host_loop: as in `top_eigenpairs`.

    Returns:
      A `SpectralDensity`. Where a Krylov space is exhausted, the nodes that are left
      have weight 0. A non-finite product makes the sample's nodes and weights NaN.

    Raises:
      ValueError: if `num_matvecs` or `num_samples` is less than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import eigen
      >>> spectrum = jnp.array([-1.0, 1.0, 1.0, 5.0])
      >>> density = eigen.spectral_density(
      ...     lambda v: spectrum * v, spectrum, num_matvecs=3, num_samples=1000
      ... )
      >>> density.nodes.mean(0).round(3) + 0.0
      Array([-1.,  1.,  5.], dtype=float32)
      >>> density.weights.sum(0).round(1)
      Array([0.2, 0.5, 0.3], dtype=float32)

    References:
      Golub and Welsch, "Calculation of Gauss quadrature rules", 1969; Ubaru, Chen and
      Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", 2017;
      Ghorbani, Krishnan and Xiao, "An investigation into neural net optimization via
      Hessian eigenvalue density", ICML 2019.
    """
    arguments.check_positive_int("num_matvecs", num_matvecs, "products per sample")
    arguments.check_positive_int("num_samples", num_samples, "random vectors")
    key, like = jax.random.key(seed), tree_math.zeros_like(like)
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
    """The density as a curve: a Gaussian of that width at every node.

        φ(t) = Σ weights · exp(−(t − nodes)² / (2 width²)) / (width · √(2π))

    Args:
      density: what `spectral_density` returned.
      grid: the t at which to evaluate φ, of any shape.
      width: standard deviation of the Gaussians, above 0 and wider than grid steps.

    Returns:
      φ on the grid: the share of the eigenvalues per unit of t, with the integral 1.

    Raises:
      ValueError: if `width` is a number that is not positive and finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import eigen
      >>> spectrum = jnp.array([-1.0, 1.0, 1.0, 5.0])
      >>> density = eigen.spectral_density(lambda v: spectrum * v, spectrum)
      >>> grid = jnp.linspace(-3, 7, 1000)
      >>> curve = eigen.smooth_density(density, grid, 0.1)
      >>> print(f"{jnp.trapezoid(curve, grid):.4f}")
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
