"""Orthonormal bases on pytrees: what the Krylov methods of `eigen` are built of.

A basis is a tree like its vectors with one leading axis more, over the vectors q₀, q₁,
…; a row of zeros is no vector and adds nothing to any sum. Everything is done leaf by
leaf, so that leaves keep their sharding, and in float32 or wider.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from eigensam_jax import tree_math
from eigensam_jax.tree_math import PyTree

Carry = TypeVar("Carry")


class Tridiagonal(NamedTuple):
    """Orthonormal basis of a Krylov space, and the tridiagonal matrix of H in it.

    Attributes:
      basis: the vectors qᵢ, one more of them than products; zero where there is none.
      diagonal: ⟨qᵢ, Hqᵢ⟩, shape (num_matvecs,).
      off_diagonal: ⟨qᵢ₊₁, Hqᵢ⟩, shape (num_matvecs,); the last leads out of the space.
    """

    basis: PyTree
    diagonal: jax.Array
    off_diagonal: jax.Array


class Remainder(NamedTuple):
    """A vector taken apart: x = Σ cᵢ qᵢ + length · direction.

    Attributes:
      coefficients: the cᵢ, one for every row of the basis.
      length: the norm of what is beside the basis; 0 where that is but rounding.
      direction: a unit vector orthogonal to the basis, or 0 if `length` is.
    """

    coefficients: jax.Array
    length: jax.Array
    direction: PyTree


def while_loop(
    host_loop: bool,
    cond: Callable[[Carry], jax.Array],
    body: Callable[[Carry], Carry],
    carry: Carry,
) -> Carry:
    """`jax.lax.while_loop`, or with `host_loop` a loop of Python's."""
    if not host_loop:
        last: Carry = jax.lax.while_loop(cond, body, carry)
        return last
    while cond(carry):
        carry = body(carry)
    return carry


def compiled(
    host_loop: bool, function: Callable[..., Any], **options: Any
) -> Callable[..., Any]:
    """`function`, jitted if the loop around it is Python's and nothing else will do so.

    Other loops trace it; those of Python would run it operation by operation.
    """
    return jax.jit(function, **options) if host_loop else function


def empty_basis(like: PyTree, num_vectors: int) -> PyTree:
    """Zeros for `num_vectors` vectors like `like`, with its sharding."""
    nowhere = jnp.zeros(num_vectors, bool)
    return jax.tree.map(
        lambda x: jax.vmap(lambda here: jnp.where(here, x, 0))(nowhere),
        tree_math.widen(like),
    )


def get(basis: PyTree, index: jax.Array) -> PyTree:
    """The vector at `index`."""
    return jax.tree.map(lambda b: b[index], basis)


def put(basis: PyTree, index: jax.Array | int, vector: PyTree) -> PyTree:
    """`basis` with `vector` at `index`."""
    return jax.tree.map(lambda b, x: b.at[index].set(x), basis, vector)


def combine(coefficients: jax.Array, basis: PyTree) -> PyTree:
    """Sums of the vectors of `basis`, each times its coefficient.

    Coefficients of shape (vectors,) give one sum, of shape (sums, vectors) a basis.
    """
    return jax.tree.map(
        lambda b: jnp.tensordot(
            coefficients.astype(b.dtype), b, axes=1, precision="highest"
        ),
        basis,
    )


def remainder(vector: PyTree, basis: PyTree) -> Remainder:
    """Takes `vector` apart along `basis`, twice, so that what is left is orthogonal."""
    vector = jax.tree.map(lambda b, x: jnp.asarray(x, b.dtype), basis, vector)
    coefficients, rest = jnp.zeros(()), vector
    for _ in range(2):
        along = jax.vmap(tree_math.vdot, in_axes=(0, None))(basis, rest)
        rest = jax.tree.map(jnp.subtract, rest, combine(along, basis))
        coefficients = coefficients + along
    length = tree_math.norm(rest)
    # What rounding leaves of a vector inside the space is no new direction. (Of a
    # vector that is not finite, the length is not either, and stays so.)
    rounding = 10 * np.finfo(length.dtype).eps * tree_math.norm(vector)
    length = jnp.where((length <= rounding) & jnp.isfinite(length), 0, length)
    direction = tree_math.scale(tree_math.safe_inverse(length), rest)
    return Remainder(coefficients, length, direction)


def random_direction(key: jax.Array, basis: PyTree) -> PyTree:
    """A random unit vector orthogonal to `basis`, all directions equally likely."""
    leaves, treedef = jax.tree.flatten(basis)
    keys = jax.random.split(key, len(leaves))
    normal = [
        jax.random.normal(key, b.shape[1:], b.dtype)
        for key, b in zip(keys, leaves, strict=True)
    ]
    return remainder(jax.tree.unflatten(treedef, normal), basis).direction


def tridiagonal(v0: PyTree, num_matvecs: int) -> Tridiagonal:
    """The Krylov space of a unit vector before its first of `num_matvecs` products."""
    dtype = tree_math.accumulation_dtype(v0)
    basis = put(empty_basis(v0, num_matvecs + 1), 0, v0)
    return Tridiagonal(basis, *(jnp.zeros(num_matvecs, dtype) for _ in range(2)))


def extend(index: jax.Array | int, space: Tridiagonal, product: PyTree) -> Tridiagonal:
    """The space and its matrix after the product with the vector at `index`."""
    step = remainder(product, space.basis)
    return Tridiagonal(
        put(space.basis, index + 1, step.direction),
        space.diagonal.at[index].set(step.coefficients[index]),
        space.off_diagonal.at[index].set(step.length),
    )


def dense(diagonal: jax.Array, off_diagonal: jax.Array) -> jax.Array:
    """The symmetric tridiagonal matrix, less the last of `off_diagonal`."""
    beside = off_diagonal[:-1]
    return jnp.diag(diagonal) + jnp.diag(beside, 1) + jnp.diag(beside, -1)


def eigh(matrix: jax.Array, known: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, ascending, and eigenvectors of a matrix known in part.

    Rows and columns that are not `known` must be zero; they come out first, as
    eigenvalues below all others, and mix into no eigenvector of the known part.
    """
    bound = jnp.abs(matrix).sum(1).max()
    below = -2 * jnp.where(bound > 0, bound, 1)
    values, vectors = jnp.linalg.eigh(matrix + jnp.diag(jnp.where(known, 0, below)))
    return values, vectors
