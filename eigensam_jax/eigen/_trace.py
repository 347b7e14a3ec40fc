"""The trace and the diagonal of a matrix from its products with random vectors."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eigensam_jax import tree_math
from eigensam_jax._update import arguments, programs
from eigensam_jax.eigen import _krylov, _raveled
from eigensam_jax.hessian import Matvec
from eigensam_jax.tree_math import PyTree

Sample = Callable[[PyTree, PyTree, PyTree], PyTree]


class Estimate(NamedTuple):
    """The mean of random samples, and how far it may be off.

    Attributes:
      value: the mean.
      standard_error: its standard deviation, estimated from the samples.
    """

    value: PyTree
    standard_error: PyTree


def trace(
    matvec: Matvec,
    like: PyTree,
    *,
    num_matvecs: int = 64,
    rank: int | None = None,
    seed: int = 0,
    host_loop: bool = False,
) -> Estimate:
    """Stochastic estimate of the trace of H, by Hutch++.

        tr H ≈ Σⱼ ⟨qⱼ, H qⱼ⟩ + mean over z of ⟨Pz, H Pz⟩

    The q are an orthonormal basis of H applied to `rank` random vectors, P projects
    onto what is orthogonal to them, and each z has random entries ±1. The basis takes
    up the large eigenvalues exactly, so that only the rest is sampled: with few of them
    the error falls much faster than that of Hutchinson's estimator, which is `rank=0`.

    Cost: `num_matvecs` products, and the memory of `rank` + 8 vectors.

    Args:
      matvec, like: as in `top_eigenpairs`.
      num_matvecs: products in all, at least 2. Two for each vector of the basis, and
        one for each z.
      rank: vectors of the basis. None for a third of the products; 0 for Hutchinson's
        estimator, with the least memory.
      seed, host_loop: as in `top_eigenpairs`.

    Returns:
      An `Estimate` of two scalars; the standard error is over the z. It is 0, up to
      rounding, where the basis spans all of H. NaN where a product is not finite.

    Raises:
      ValueError: for a `num_matvecs` less than 2, and a `rank` that leaves fewer than
        two products for the z.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import eigen
      >>> spectrum = jnp.array([1.0, 2.0, 30.0])
      >>> print(f"{eigen.trace(lambda v: spectrum * v, spectrum).value:.3f}")
      33.000

    References:
      Hutchinson, "A stochastic estimator of the trace of the influence matrix for
      Laplacian smoothing splines", 1989; Meyer, Musco, Musco, Woodruff, "Hutch++:
      Optimal Stochastic Trace Estimation", 2021.
    """
    raveled = _raveled.raveled(host_loop, like)
    return _estimated(_inner, matvec, raveled, num_matvecs, rank, seed, host_loop)


def diagonal(
    matvec: Matvec,
    like: PyTree,
    *,
    num_matvecs: int = 64,
    rank: int | None = None,
    seed: int = 0,
    host_loop: bool = False,
) -> Estimate:
    """Stochastic estimate of the diagonal of H, entry by entry.

        diag H ≈ Σⱼ (H qⱼ) ⊙ qⱼ + mean over z of z ⊙ (H Pz)

    with the q, z and P of `trace`. The error of an entry is that of the other entries
    in its row of H P: one probe of a dense matrix says little.

    Cost: that of `trace`, and three vectors more, two of them the result.

    Args:
      matvec, like, num_matvecs, rank, seed, host_loop: as in `trace`.

    Returns:
      An `Estimate` of two trees like `like`.

    Raises:
      ValueError: as `trace`.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import eigen
      >>> spectrum = jnp.array([1.0, 2.0, 30.0])
      >>> print(eigen.diagonal(lambda v: spectrum * v, spectrum).value.round(2))
      [ 1.  2. 30.]

    References:
      Bekas, Kokiopoulou, Saad, "An estimator for the diagonal of a matrix", 2007;
      Baston and Nakatsukasa, "Stochastic diagonal estimation: probabilistic bounds and
      an improved algorithm", 2022.
    """
    raveled = _raveled.raveled(host_loop, like)
    found = _estimated(_entries, matvec, raveled, num_matvecs, rank, seed, host_loop)
    return Estimate(*map(raveled.unravel, found))


def _inner(z: PyTree, y: PyTree, product: PyTree) -> jax.Array:
    return tree_math.vdot(y, product)


def _entries(z: PyTree, y: PyTree, product: PyTree) -> PyTree:
    return jax.tree.map(jnp.multiply, z, product)


def _estimated(
    sample: Sample,
    matvec: Matvec,
    raveled: _raveled.Raveled,
    num_matvecs: int,
    rank: int | None,
    seed: int,
    host_loop: bool,
) -> Estimate:
    """Σⱼ sample(q, q, Hq) + the mean over z of sample(z, Pz, HPz)."""
    arguments.check_positive_int("num_matvecs", num_matvecs, "products")
    remedy = ": one z has no standard error"
    arguments.require(num_matvecs > 1, "num_matvecs", num_matvecs, "at least 2", remedy)
    matvec, like = raveled.product(matvec), raveled.zero
    most = (num_matvecs - 2) // 2
    if rank is None:
        dimension = sum(jnp.size(x) for x in jax.tree.leaves(like))
        rank = min((num_matvecs - 2) // 3, dimension)
    what = f"a whole number between 0 and {most} for {num_matvecs} products"
    remedy = ": each vector of the basis takes two, and two are left for the z"
    valid = isinstance(rank, int | np.integer) and 0 <= rank <= most
    arguments.require(valid, "rank", rank, what, remedy)
    num_probes, key = num_matvecs - 2 * rank, jax.random.key(seed)
    compiled = partial(programs.jitted, host_loop)
    get, extend = compiled(_krylov.get), compiled(_extended, donate_argnums=0)
    normal, probe = compiled(_normal), compiled(_probe)
    added = compiled(_added, static_argnums=0)
    averaged = compiled(_averaged, static_argnums=0)

    def grow(i: jax.Array, basis: PyTree) -> PyTree:
        return extend(basis, i, matvec(normal(key, num_probes + i, like)))

    def take(i: jax.Array, total: PyTree) -> PyTree:
        q = get(basis, i)
        return added(sample, total, q, matvec(q))

    def take_rest(i: jax.Array, known: tuple[PyTree, PyTree]) -> Any:
        z, y = probe(basis, key, i, like)
        return averaged(sample, i, *known, z, y, matvec(y))

    basis, exact = None, sample(like, like, like)
    known = exact, exact
    if rank:
        basis = _krylov.basis_of(like, rank)
        basis = programs.repeat(host_loop, rank, grow, basis)
        exact = programs.repeat(host_loop, rank, take, exact)
    mean, square = programs.repeat(host_loop, num_probes, take_rest, known)
    share = 1 / (num_probes * (num_probes - 1))
    error = jax.tree.map(lambda s: jnp.sqrt(share * s), square)
    return Estimate(tree_math.add_scaled(exact, 1, mean), error)


def _normal(key: jax.Array, i: jax.Array, like: PyTree) -> PyTree:
    return _krylov.random_vector(jax.random.fold_in(key, i), like)


def _probe(
    basis: PyTree | None, key: jax.Array, i: jax.Array, like: PyTree
) -> tuple[PyTree, PyTree]:
    """A vector z of random signs, and its part Pz orthogonal to the basis."""
    sign = lambda x: jnp.where(x < 0, -1, 1).astype(x.dtype)
    z = jax.tree.map(sign, _normal(key, i, like))
    return z, z if basis is None else _krylov.rejected(basis, z)


def _extended(basis: PyTree, i: jax.Array, vector: PyTree) -> PyTree:
    return _krylov.extend(basis, i, vector).basis


def _added(sample: Sample, total: PyTree, q: PyTree, product: PyTree) -> PyTree:
    return tree_math.add_scaled(total, 1, sample(q, q, product))


def _averaged(
    sample: Sample, i: jax.Array, mean: PyTree, square: PyTree, *probed: PyTree
) -> tuple[PyTree, PyTree]:
    """The mean, and the sum of squared differences from it, with one sample more."""
    new = sample(*probed)
    step = tree_math.add_scaled(new, -1, mean)
    count = (i + 1).astype(tree_math.accumulation_dtype(new))
    mean = tree_math.add_scaled(mean, 1 / count, step)
    rest = tree_math.add_scaled(new, -1, mean)
    return mean, jax.tree.map(lambda s, a, b: s + a * b, square, step, rest)
