"""Orthonormal bases on pytrees, for the Krylov methods of `eigen`.

A basis is a tree like its vectors with a leading axis over the vectors q₀, q₁, …; a row
of zeros is no vector. All is done leaf by leaf, so that leaves keep their sharding.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from eigensam_jax import tree_math
from eigensam_jax._update import programs
from eigensam_jax.hessian import Matvec
from eigensam_jax.tree_math import PyTree

Carry = TypeVar("Carry")
_WRITTEN_OUT = ContextVar("written_out", default=False)


class Tridiagonal(NamedTuple):
    """Orthonormal basis of a Krylov space, and the tridiagonal matrix of H in it.

    Attributes:
      basis: the vectors qᵢ, one more than products; zero where there is none.
      diagonal: ⟨qᵢ, Hqᵢ⟩, shape (num_matvecs,).
      off_diagonal: ⟨qᵢ₊₁, Hqᵢ⟩, shape (num_matvecs,); the last leads out of the space.
    """

    basis: PyTree
    diagonal: jax.Array
    off_diagonal: jax.Array


class Extension(NamedTuple):
    """A vector decomposed in a basis, x = Σ cᵢ qᵢ + length · q, and the basis with q.

    Attributes:
      basis: the basis with q, a unit vector, or zero where `length` is.
      coefficients: the cᵢ, one per row of the basis; 0 for the row of q.
      length: the norm of the part outside the basis; 0 where that is rounding error.
    """

    basis: PyTree
    coefficients: jax.Array
    length: jax.Array


@contextlib.contextmanager
def written_out() -> Iterator[None]:
    """Unrolls loops of products traced here: XLA's cost analysis counts a body once."""
    token = _WRITTEN_OUT.set(True)
    try:
        yield
    finally:
        _WRITTEN_OUT.reset(token)


def repeat_products(
    num: int,
    body: Callable[[Any, Carry], Carry],
    carry: Carry,
    unroll: bool,
    matvec: Matvec,
    v: PyTree,
) -> Carry:
    """A loop of `num` products, unrolled as `power_iteration` says."""
    if unroll and not programs.is_traced(v):
        for i in range(num):
            carry = body(i, carry)
        return carry
    is_slow = jax.default_backend() == "cpu" and unroll
    write_out = is_slow and "conv_general_dilated" in str(jax.make_jaxpr(matvec)(v))
    write_out |= _WRITTEN_OUT.get()
    last: Carry = jax.lax.fori_loop(0, num, body, carry, unroll=write_out or None)
    return last


def basis_of(vector: PyTree, num_vectors: int) -> PyTree:
    """`num_vectors` rows, sharded as `vector`: that one first, then zeros."""
    is_first = jnp.arange(num_vectors, dtype=jnp.int32) == 0
    return jax.tree.map(
        lambda x: jax.vmap(lambda here: jnp.where(here, x, 0))(is_first), vector
    )


def get(basis: PyTree, index: jax.Array | int) -> PyTree:
    take = jax.lax.dynamic_index_in_dim  # indexing checks bounds
    return jax.tree.map(lambda b: take(b, index, keepdims=False), basis)


def put(basis: PyTree, index: jax.Array | int, vector: PyTree) -> PyTree:
    update = jax.lax.dynamic_update_index_in_dim
    return jax.tree.map(lambda b, x: update(b, x, index, 0), basis, vector)


def combine(coefficients: jax.Array, basis: PyTree) -> PyTree:
    """The linear combination of the vectors of `basis`; for a matrix, one per row."""
    return jax.tree.map(
        lambda b: jnp.tensordot(
            coefficients.astype(b.dtype), b, axes=1, precision="highest"
        ),
        basis,
    )


def extend(basis: PyTree, index: jax.Array | int, vector: PyTree) -> Extension:
    """Orthogonalises `vector` against `basis`, twice, and writes it at `index`."""
    vector = tree_math.cast_like(vector, basis)
    scaled, norm = tree_math.unit(vector)
    eps = rounding(basis)
    num_vectors = jax.tree.leaves(basis)[0].shape[0]
    is_new = jnp.arange(num_vectors, dtype=jnp.int32) == index

    def orthogonalise(_: int, step: Extension) -> Extension:
        products = _inner_products(step.basis, get(step.basis, index))
        along = jnp.where(is_new, 0, products)
        # ‖x‖² − Σ⟨qᵢ,x⟩²; at first it may be mere rounding, which only scales.
        square = products[index] - jnp.sum(along**2)
        rest = jnp.sqrt(jnp.maximum(square, eps))
        length = step.length * rest
        # Two lengths at their lower bounds make eps: the vector is in the space.
        scale = jnp.where(length <= 10 * eps, 0, 1 / rest)
        row = combine(scale * jnp.where(is_new, 1, -along), step.basis)
        coefficients = step.coefficients + step.length * along
        return Extension(put(step.basis, index, row), coefficients, length)

    zeros, one = jnp.zeros(num_vectors, norm.dtype), jnp.ones((), norm.dtype)
    # The row at `index` is the workspace: one product subtracts and normalises.
    start = Extension(put(basis, index, scaled), zeros, one)
    if programs.is_traced(start):
        basis, coefficients, length = jax.lax.fori_loop(0, 2, orthogonalise, start)
    else:
        basis, coefficients, length = orthogonalise(1, orthogonalise(0, start))
    # A non-finite norm stays visible.
    is_inside = (length <= 10 * eps) & jnp.isfinite(norm)
    length = jnp.where(is_inside, 0, norm * length)
    return Extension(basis, norm * coefficients, length)


def _inner_products(basis: PyTree, vector: PyTree) -> jax.Array:
    dtype = tree_math.accumulation_dtype(vector)
    row = lambda b, x: jax.vmap(lambda q: jnp.sum(q * x))(b).astype(dtype)
    # Stacked: XLA would repeat a chain of additions in the loop over each leaf.
    return jnp.sum(jnp.stack(jax.tree.leaves(jax.tree.map(row, basis, vector))), axis=0)


def rounding(tree: PyTree) -> float:
    """The relative rounding error of the leaves that are least precise."""
    leaves = jax.tree.leaves(tree)
    return max((float(np.finfo(x.dtype).eps) for x in leaves), default=0.0)


def rejected(basis: PyTree, vector: PyTree) -> PyTree:
    """The part of `vector` orthogonal to an orthonormal `basis`."""
    inside = combine(_inner_products(basis, vector), basis)
    return tree_math.add_scaled(vector, -1, inside)


def random_vector(key: jax.Array, like: PyTree) -> PyTree:
    """A normal random vector, added to the zeros `like` to be sharded as they are."""
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.tree.unflatten(treedef, [*jax.random.split(key, len(leaves))])
    return jax.tree.map(
        lambda x, key: x + jax.random.normal(key, x.shape, x.dtype), like, keys
    )


def tridiagonal(v0: PyTree, num_matvecs: int) -> Tridiagonal:
    """The Krylov space of `v0` before the first of `num_matvecs` products."""
    unit, norm = tree_math.unit(v0)
    zeros = (jnp.zeros(num_matvecs, norm.dtype) for _ in range(2))
    return Tridiagonal(basis_of(unit, num_matvecs + 1), *zeros)


def grow(index: jax.Array | int, space: Tridiagonal, product: PyTree) -> Tridiagonal:
    """The space after the product with the vector at `index`."""
    step = extend(space.basis, index + 1, product)
    return Tridiagonal(
        step.basis,
        space.diagonal.at[index].set(step.coefficients[index]),
        space.off_diagonal.at[index].set(step.length),
    )


def dense(diagonal: jax.Array, off_diagonal: jax.Array) -> jax.Array:
    beside = off_diagonal[:-1]
    return jnp.diag(diagonal) + jnp.diag(beside, 1) + jnp.diag(beside, -1)


def eigh_known(matrix: jax.Array, known: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`eigh` of a matrix that is zero outside `known`, the known eigenpairs last."""
    bound = jax.lax.stop_gradient(jnp.abs(matrix).sum(1).max())
    below = -2 * jnp.where(bound > 0, bound, 1)
    return eigh(matrix + jnp.diag(jnp.where(known, 0, below)))


@jax.custom_jvp
def eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ascending eigenvalues, and eigenvectors (columns), with finite derivatives."""
    values, vectors = jnp.linalg.eigh(matrix)
    return values, vectors


@eigh.defjvp
def _eigh_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    values, vectors = eigh(*primals)
    with jax.default_matmul_precision("highest"):
        inside = vectors.T @ (tangents[0] + tangents[0].T) @ vectors / 2
        gaps = values[None, :] - values[:, None]
        rounding = 10 * np.finfo(values.dtype).eps * jnp.abs(values).max()
        distinct = jnp.abs(gaps) > rounding
        # 0 where eigenvalues agree, whose vectors have no derivative.
        factors = jnp.where(distinct, 1 / jnp.where(distinct, gaps, 1), 0)
        moved = vectors @ (factors * inside)
    return (values, vectors), (jnp.diagonal(inside), moved)
