"""The thick-restart Lanczos iteration of `eigen.top_eigenpairs`, product by product.

The basis holds the Ritz vectors kept at the last restart, and the Krylov space grown
from them since. When it is full, the best Ritz vectors are kept and the rest dropped.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from eigensam_jax import tree_math
from eigensam_jax.eigen import _krylov
from eigensam_jax.tree_math import PyTree

_CAREFUL = 20  # products before a start that was given is trusted


class Plan(NamedTuple):
    """The sizes of a search.

    Attributes:
      k: how many eigenpairs are wanted.
      size: how many vectors' products are known when the basis is full.
      keep: how many Ritz vectors a restart keeps.
      complete: whether a full basis spans everything.
      by_magnitude: whether those of largest magnitude are wanted.
      thorough: whether to look for further copies of the eigenvalues found.
    """

    k: int
    size: int
    keep: int
    complete: bool
    by_magnitude: bool
    thorough: bool


class Search(NamedTuple):
    """The state of a search.

    Attributes:
      basis: `size` + 1 orthonormal rows: `known` vectors, the next to multiply, zeros.
      projection: the matrix of H in the known ones, shape (size, size), zero elsewhere.
      known: the number of basis vectors whose products are known.
      products: the number of products so far.
      judge_from: the number of products from which on Ritz values are trusted.
      least: the rank of the last wanted Ritz value before the last fresh start.
      residuals: of the wanted Ritz pairs, by the recurrence, shape (k,).
      done: whether all are found, or a product was non-finite.
    """

    basis: PyTree
    projection: jax.Array
    known: jax.Array
    products: jax.Array
    judge_from: jax.Array
    least: jax.Array
    residuals: jax.Array
    done: jax.Array


def plan(k: int, dimension: int, by_magnitude: bool, thorough: bool) -> Plan:
    """The sizes of a search. A larger basis hardly saves products, at k = 1 least."""
    size = min(dimension, 2 * k + 8)
    keep = k + (size - k) // 2
    return Plan(k, size, keep, size == dimension, by_magnitude, thorough)


def start(plan: Plan, v0: PyTree, key: jax.Array) -> Search:
    """The search before its first product, from `v0` or, if that is zero, at random."""
    dtype = tree_math.accumulation_dtype(v0)
    anywhere = _krylov.random_vector(key, tree_math.zeros_like(v0))
    is_anywhere = tree_math.norm(v0) == 0
    first = tree_math.where(is_anywhere, anywhere, v0)
    # A given start may be near an unwanted eigenvector.
    careful = plan.size if plan.complete else max(plan.size, _CAREFUL)
    judge_from = jnp.where(is_anywhere, min(plan.k + 2, plan.size), careful)
    return Search(
        basis=_krylov.tridiagonal(first, plan.size).basis,
        projection=jnp.zeros((plan.size, plan.size), dtype),
        known=jnp.zeros((), jnp.int32),
        products=jnp.zeros((), jnp.int32),
        judge_from=judge_from.astype(jnp.int32),
        least=jnp.full((), np.finfo(dtype).min, dtype),
        residuals=jnp.zeros(plan.k, dtype),
        done=jnp.zeros((), bool),
    )


def advance(
    plan: Plan, search: Search, product: PyTree, tol: ArrayLike, key: jax.Array
) -> Search:
    index, known, count = search.known, search.known + 1, search.products + 1
    size = plan.size
    full = known == size
    step = _krylov.extend(search.basis, known, product)
    finite = jnp.isfinite(step.length)
    column = jnp.where(finite, step.coefficients[:size], jnp.nan)
    projection = search.projection.at[index].set(column).at[:, index].set(column)
    length = jnp.where(full & plan.complete, 0, step.length)
    values, rank, vectors = _ritz(plan, projection, known)
    # H y = θ y + length · y[index] · q, where q is the direction outside the basis.
    residuals = length * jnp.abs(vectors[index])
    converged, new, settled = _judge(plan, values, rank, residuals, tol, search.least)
    converged &= count >= search.judge_from
    done = ~finite | (converged & ~new & settled)
    fresh_start = converged & new
    restart = (full | fresh_start) & ~done
    kept = jnp.where(fresh_start, plan.k, plan.keep)
    kept = jnp.where(restart, kept, known)

    def restarted(basis: PyTree) -> PyTree:
        """The first `kept` Ritz vectors, and q unless there is to be a fresh start."""
        rows = jnp.arange(size, dtype=jnp.int32)[:, None] < kept
        rotation = jnp.pad(jnp.where(rows, vectors.T, 0), (0, 1))
        last = jnp.where(fresh_start, 0, jnp.ones((), rotation.dtype))
        return _krylov.combine(rotation.at[kept, known].set(last), basis)

    def refreshed(basis: PyTree) -> PyTree:
        zeros = tree_math.zeros_like(_krylov.get(basis, kept))
        vector = _krylov.random_vector(jax.random.fold_in(key, count), zeros)
        return _krylov.extend(basis, kept, vector).basis

    keep = lambda basis: basis
    basis = jax.lax.cond(restart, restarted, keep, step.basis)
    needs_direction = ((length == 0) | fresh_start) & ~done
    basis = jax.lax.cond(needs_direction, refreshed, keep, basis)
    is_kept = jnp.arange(size, dtype=jnp.int32) < kept
    diagonal = jnp.diag(jnp.where(is_kept, values, 0))
    return Search(
        basis=basis,
        projection=jnp.where(restart, diagonal, projection),
        known=kept,
        products=count,
        judge_from=jnp.where(fresh_start, count + size - plan.k, search.judge_from),
        least=jnp.where(fresh_start, rank[plan.k - 1], search.least),
        residuals=residuals[: plan.k],
        done=done,
    )


def wanted(plan: Plan, search: Search) -> tuple[PyTree, jax.Array, jax.Array]:
    """The `k` wanted Ritz vectors as a basis, their values and residuals."""
    values, _, vectors = _ritz(plan, search.projection, search.known)
    rows = jnp.pad(vectors[:, : plan.k].T, ((0, 0), (0, 1)))
    residuals = search.residuals
    values = jnp.where(jnp.isfinite(residuals), values[: plan.k], jnp.nan)
    return _krylov.combine(rows, search.basis), values, residuals


def _judge(
    plan: Plan,
    values: jax.Array,
    rank: jax.Array,
    residuals: jax.Array,
    tol: ArrayLike,
    least: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Whether the wanted pairs are converged, are new, and leave no better to come."""
    k, dtype = plan.k, values.dtype
    rounding = 10 * np.finfo(dtype).eps * jnp.abs(values).max()
    tol = jnp.asarray(tol, dtype)
    target = jnp.maximum(tol * jnp.abs(values[0]), rounding)
    converged = jnp.all(residuals[:k] <= target)
    if k == 1 or plan.complete or not plan.thorough:
        return converged, jnp.zeros((), bool), jnp.ones((), bool)
    # Copies of an eigenvalue are found by fresh starts, until one finds nothing new
    # and the best of the rest is known to be no better.
    new = rank[k - 1] > least + target
    gap = rank[k - 1] - rank[k]
    return converged, new, residuals[k] <= jnp.maximum(target, gap)


def _ritz(plan: Plan, projection: jax.Array, known: jax.Array) -> tuple[jax.Array, ...]:
    """Ritz values, ranks and vectors (columns), the wanted first, the unknown last."""
    index = jnp.arange(plan.size, dtype=jnp.int32)
    values, vectors = _krylov.eigh_known(projection, index < known)
    missing = index < plan.size - known
    lowest = np.finfo(values.dtype).min
    rank = jnp.abs(values) if plan.by_magnitude else values
    rank = jnp.where(missing, lowest, rank)
    order = jnp.argsort(rank, descending=True)
    return jnp.where(missing, 0, values)[order], rank[order], vectors[:, order]
