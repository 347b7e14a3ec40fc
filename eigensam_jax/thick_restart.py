"""The thick-restart Lanczos iteration of `eigen.top_eigenpairs`, product by product.

The basis holds Ritz vectors that were kept, and the Krylov space that has grown from
them since. When it is full, the best Ritz vectors are kept again and the rest given up.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from eigensam_jax import krylov, tree_math
from eigensam_jax.tree_math import PyTree


class Plan(NamedTuple):
    """What is fixed before the search.

    Attributes:
      k: how many eigenpairs are wanted.
      size: how many vectors' products are known when the basis is full.
      keep: how many Ritz vectors a restart keeps.
      complete: whether a full basis spans everything.
      by_magnitude: whether the largest in magnitude are wanted, or the largest.
    """

    k: int
    size: int
    keep: int
    complete: bool
    by_magnitude: bool

    @property
    def looks_again(self) -> bool:
        """Whether copies of eigenvalues could be missed; of one, no copy is wanted."""
        return self.k > 1 and not self.complete


class Search(NamedTuple):
    """Where a search is.

    Attributes:
      basis: orthonormal vectors, first `known` of them whose products are known, then
        the next to be multiplied, then zeros; `size` + 1 in all.
      projection: the matrix of H in those known, shape (size, size), zero elsewhere.
      known: how many they are.
      products: how many so far.
      judge_from: the number of products from which on the Ritz values are believed.
      least: the rank of the last wanted Ritz value before the last fresh start.
      done: whether all is found, or a product was not finite.
    """

    basis: PyTree
    projection: jax.Array
    known: jax.Array
    products: jax.Array
    judge_from: jax.Array
    least: jax.Array
    done: jax.Array


class _Ritz(NamedTuple):
    """Ritz pairs, the wanted ones first; zeros at the end for what is not known.

    Attributes:
      values: shape (size,).
      rank: what they are ordered by, −∞ for what is not known.
      vectors: coefficients in the basis, a column each.
    """

    values: jax.Array
    rank: jax.Array
    vectors: jax.Array


def plan(k: int, dimension: int, by_magnitude: bool) -> Plan:
    """The sizes of a search: at least 20 vectors, as in ARPACK."""
    size = min(dimension, max(20, 2 * k + 10))
    keep = k + (size - k) // 2
    return Plan(k, size, keep, size == dimension, by_magnitude)


def start(plan: Plan, v0: PyTree, key: jax.Array) -> Search:
    """The search before its first product, from `v0` or, if zero, at random."""
    dtype = tree_math.accumulation_dtype(v0)
    basis = krylov.empty_basis(v0, plan.size + 1)
    first = tree_math.scale(tree_math.safe_inverse(tree_math.norm(v0)), v0)
    anywhere = krylov.random_direction(key, basis)
    first = tree_math.where(tree_math.norm(first) == 0, anywhere, first)
    return Search(
        basis=krylov.put(basis, 0, first),
        projection=jnp.zeros((plan.size, plan.size), dtype),
        known=jnp.zeros((), jnp.int32),
        products=jnp.zeros((), jnp.int32),
        judge_from=jnp.full((), plan.size, jnp.int32),
        least=jnp.full((), -jnp.inf if plan.looks_again else jnp.inf, dtype),
        done=jnp.zeros((), bool),
    )


def advance(
    plan: Plan, search: Search, product: PyTree, tol: ArrayLike, key: jax.Array
) -> Search:
    """The search after the product with the next vector of its basis."""
    index, known, count = search.known, search.known + 1, search.products + 1
    full = known == plan.size
    step = krylov.remainder(product, search.basis)
    finite = jnp.isfinite(step.length)
    column = jnp.where(finite, step.coefficients[: plan.size], jnp.nan)
    projection = search.projection.at[index].set(column).at[:, index].set(column)
    length = jnp.where(full & plan.complete, 0, step.length)
    ritz = _ritz(plan, projection, known)
    # H y = θ y + length · y[index] · q, where q is the direction beside the basis.
    residuals = length * jnp.abs(ritz.vectors[index])
    converged, new, settled = _judge(plan, ritz, residuals, tol, search.least)
    converged &= count >= search.judge_from
    done = ~finite | (converged & ~new & settled)
    fresh_start = converged & new
    restart = (full | fresh_start) & ~done
    kept = jnp.where(fresh_start, plan.k, plan.keep)
    kept = jnp.where(restart, kept, known)

    def restarted(basis: PyTree) -> PyTree:
        """The first `kept` Ritz vectors, and q unless there is to be a fresh start."""
        rows = jnp.arange(plan.size)[:, None] < kept
        rotation = jnp.pad(jnp.where(rows, ritz.vectors.T, 0), (0, 1))
        rotation = rotation.at[kept, known].set(jnp.where(fresh_start, 0, 1))
        return krylov.combine(rotation, basis)

    def refreshed(basis: PyTree) -> PyTree:
        direction = krylov.random_direction(jax.random.fold_in(key, count), basis)
        return krylov.put(basis, kept, direction)

    keep = lambda basis: basis
    basis = krylov.put(search.basis, known, step.direction)
    basis = jax.lax.cond(restart, restarted, keep, basis)
    needs_direction = ((length == 0) | fresh_start) & ~done
    basis = jax.lax.cond(needs_direction, refreshed, keep, basis)
    diagonal = jnp.diag(jnp.where(jnp.arange(plan.size) < kept, ritz.values, 0))
    return Search(
        basis=basis,
        projection=jnp.where(restart, diagonal, projection),
        known=kept,
        products=count,
        judge_from=jnp.where(
            fresh_start, count + plan.size - plan.k, search.judge_from
        ),
        least=jnp.where(fresh_start, ritz.rank[plan.k - 1], search.least),
        done=done,
    )


def eigenvectors(plan: Plan, search: Search) -> PyTree:
    """The `k` wanted Ritz vectors, as a basis."""
    vectors = _ritz(plan, search.projection, search.known).vectors
    return krylov.combine(
        jnp.pad(vectors[:, : plan.k].T, ((0, 0), (0, 1))), search.basis
    )


def rank_of(values: jax.Array, by_magnitude: bool) -> jax.Array:
    """What decides which eigenvalues are wanted most."""
    return jnp.abs(values) if by_magnitude else values


def _judge(
    plan: Plan, ritz: _Ritz, residuals: jax.Array, tol: ArrayLike, least: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Whether the wanted pairs are converged, are new, and leave no better to come.

    A Krylov space has an eigenvalue once, however often it is one of H. Therefore the
    search starts afresh beside what it found, and stops when that has brought nothing
    new and the best of the rest is known well enough to be no better.
    """
    k, eps = plan.k, np.finfo(ritz.values.dtype).eps
    rounding = 10 * eps * jnp.abs(ritz.values).max()
    target = jnp.maximum(tol * jnp.abs(ritz.values[0]), rounding)
    converged = jnp.all(residuals[:k] <= target)
    new = ritz.rank[k - 1] > least + target
    settled = jnp.ones((), bool)
    if plan.looks_again:
        gap = ritz.rank[k - 1] - ritz.rank[k]
        settled = residuals[k] <= jnp.maximum(target, gap)
    return converged, new, settled


def _ritz(plan: Plan, projection: jax.Array, known: jax.Array) -> _Ritz:
    index = jnp.arange(plan.size)
    values, vectors = krylov.eigh(projection, index < known)
    missing = index < plan.size - known
    rank = jnp.where(missing, -jnp.inf, rank_of(values, plan.by_magnitude))
    order = jnp.argsort(rank, descending=True)
    return _Ritz(jnp.where(missing, 0, values)[order], rank[order], vectors[:, order])
