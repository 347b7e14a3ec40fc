"""Eigen-solvers that see a matrix only through its products with vectors."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eigensam_jax import arguments, tree_math
from eigensam_jax.hessian import Matvec
from eigensam_jax.tree_math import PyTree


class Eigenpair(NamedTuple):
    """An approximate eigenvector, with an eigenvalue and how far both are off.

    Attributes:
      eigenvector: unit vector, a tree of arrays in float32 or wider.
      eigenvalue: the Rayleigh quotient λ = ⟨v, Hv⟩, a scalar.
      residual: ‖Hv − λv‖, a scalar; some eigenvalue lies within it of λ.
    """

    eigenvector: PyTree
    eigenvalue: jax.Array
    residual: jax.Array


def power_iteration(
    matvec: Matvec, v0: PyTree, num_iters: int, *, unroll: bool = False
) -> Eigenpair:
    """Power iteration v ← Hv/‖Hv‖: the eigenvalue of H that is largest in magnitude.

    Each iteration makes one product and multiplies the angle to the eigenvector by
    about |λ₂/λ₁|. A negative eigenvalue of the largest magnitude is found as such, with
    its sign: look at `eigenvalue` before taking the result for the top of the spectrum.

    `eigenvalue` and `residual` belong to v′, the input of the last product, and
    `eigenvector` is that product, normalised: one step better than they say, for no
    further product. (Where v′ is an eigenvector, so is the result.)

    Args:
      matvec: the product with a symmetric matrix, from a tree to a tree like it.
      v0: where to start, a tree of real arrays; need not have norm 1. Zero stays zero.
      num_iters: the number of products, at least 1.
      unroll: whether to write the loop out. A longer program, but on XLA's CPU
        backend convolutions inside a loop run many times slower than outside.

    Returns:
      An `Eigenpair`. Where Hv = 0 the iteration stays at v, with λ = 0. A product that
      is not finite makes λ or the residual so, and is otherwise skipped.

    Raises:
      ValueError: if `num_iters` is less than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import eigen
      >>> spectrum = jnp.array([-1.0, 2.0, 4.0])
      >>> pair = eigen.power_iteration(lambda v: spectrum * v, jnp.ones(3), 20)
      >>> float(pair.eigenvalue), pair.eigenvector.round(5)
      (4.0, Array([0., 0., 1.], dtype=float32))

    References:
      Golub and Van Loan, "Matrix Computations", 4th edition, section 8.2, 2013.
    """
    arguments.check_positive_int("num_iters", num_iters, "matrix-vector products")
    v0 = tree_math.scale(tree_math.safe_inverse(tree_math.norm(v0)), v0)
    zero = jnp.zeros((), tree_math.accumulation_dtype(v0))

    def body(_: int, pair: Eigenpair) -> Eigenpair:
        v = pair.eigenvector
        product = jax.tree.map(lambda x, p: p.astype(x.dtype), v, matvec(v))
        eigenvalue = tree_math.vdot(v, product)
        residual = tree_math.norm(tree_math.add_scaled(product, -eigenvalue, v))
        inverse = tree_math.safe_inverse(tree_math.norm(product))
        moved = tree_math.scale(inverse, product)
        return Eigenpair(tree_math.where(inverse > 0, moved, v), eigenvalue, residual)

    start = Eigenpair(v0, zero, zero)
    pair: Eigenpair = jax.lax.fori_loop(
        0, num_iters, body, start, unroll=unroll or None
    )
    return pair


def lanczos(
    matvec: Matvec, v0: PyTree, num_matvecs: int, *, unroll: bool = False
) -> Eigenpair:
    """Lanczos iteration: the algebraically largest eigenvalue of H.

    The best that `num_matvecs` products can do from `v0`: the Rayleigh quotient
    ⟨v, Hv⟩ is maximised over the Krylov space of v0, Hv0, …, H^(m−1) v0, which contains
    what power iteration finds after m − 1 products. A negative eigenvalue, however
    large its magnitude, is not taken for the top.

    `eigenvalue` and `residual` belong to that maximiser y. The recurrence knows Hy too,
    so that `eigenvector` is one step of a shifted power iteration better, for no
    further product: H y shifted by the smallest Ritz value, if that is negative, so
    that negative eigenvalues do not grow.

    Orthogonalisation is full and done twice, so that rounding makes no spurious copies
    of eigenvalues. That holds `num_matvecs` + 3 vectors and costs 4 · `num_matvecs`²
    vector operations, meant for a few to a few dozen products.

    Args:
      matvec: the product with a symmetric matrix, from a tree to a tree like it.
      v0: where to start, a tree of real arrays; need not have norm 1. Zero stays zero.
      num_matvecs: m, the number of products, at least 1. Where the Krylov space is
        exhausted before, the rest of them change nothing.
      unroll: as in `power_iteration`.

    Returns:
      An `Eigenpair`: the top Ritz vector, its Ritz value, and ‖Hv − λv‖ from the last
      coefficient of the recurrence, without a product more.

    Raises:
      ValueError: if `num_matvecs` is less than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import eigen
      >>> spectrum = jnp.array([-5.0, 1.0, 2.0])
      >>> pair = eigen.lanczos(lambda v: spectrum * v, jnp.ones(3), 3)
      >>> print(f"{pair.eigenvalue:.4f}", jnp.abs(pair.eigenvector).round(3))
      2.0000 [0. 0. 1.]

    References:
      Lanczos, "An iteration method for the solution of the eigenvalue problem of linear
      differential and integral operators", 1950; Golub and Van Loan, "Matrix
      Computations", 4th edition, chapter 10, 2013.
    """
    arguments.check_positive_int("num_matvecs", num_matvecs, "matrix-vector products")
    dtype = tree_math.accumulation_dtype(v0)
    v0 = tree_math.scale(tree_math.safe_inverse(tree_math.norm(v0)), v0)
    basis = jax.tree.map(
        lambda x: jnp.zeros((num_matvecs + 1, *x.shape), x.dtype).at[0].set(x), v0
    )

    def body(i: int, carry: _Krylov) -> _Krylov:
        basis, diagonal, off_diagonal = carry
        v = jax.tree.map(lambda b: b[i], basis)
        product = jax.tree.map(lambda x, p: p.astype(x.dtype), v, matvec(v))
        rest = _orthogonalise(_orthogonalise(product, basis), basis)
        length = tree_math.norm(rest)
        # What rounding leaves of a product inside the space is no new direction. (Of
        # a product that is not finite, the length is not either, and stays so.)
        rounding = 10 * np.finfo(dtype).eps * tree_math.norm(product)
        length = jnp.where((length <= rounding) & jnp.isfinite(length), 0, length)
        new = tree_math.scale(tree_math.safe_inverse(length), rest)
        basis = jax.tree.map(lambda b, x: b.at[i + 1].set(x), basis, new)
        return _Krylov(
            basis,
            diagonal.at[i].set(tree_math.vdot(v, product)),
            off_diagonal.at[i].set(length),
        )

    start = _Krylov(basis, jnp.zeros(num_matvecs, dtype), jnp.zeros(num_matvecs, dtype))
    basis, diagonal, off_diagonal = jax.lax.fori_loop(
        0, num_matvecs, body, start, unroll=unroll or None
    )
    values, weights = _spectrum_of_tridiagonal(diagonal, off_diagonal)
    bottom, top = jnp.minimum(values[0], 0), values[1]
    # H y = λ y + beyond · q, with q the basis vector that the last product led to.
    beyond = off_diagonal[-1] * weights[-1]
    beyond_shifted = beyond * tree_math.safe_inverse(top - bottom)
    weights = jnp.append(weights, beyond_shifted) / jnp.hypot(1, beyond_shifted)
    return Eigenpair(_combine(weights, basis), top, jnp.abs(beyond))


class _Krylov(NamedTuple):
    """Orthonormal basis of a Krylov space, and the tridiagonal matrix of H in it.

    Attributes:
      basis: a tree with a leading axis over the vectors qᵢ, zero where there is none.
      diagonal: ⟨qᵢ, Hqᵢ⟩, shape (num_matvecs,).
      off_diagonal: ⟨qᵢ₊₁, Hqᵢ⟩, shape (num_matvecs,); the last leads out of the space.
    """

    basis: PyTree
    diagonal: jax.Array
    off_diagonal: jax.Array


def _orthogonalise(vector: PyTree, basis: PyTree) -> PyTree:
    """`vector` less its parts along the vectors of `basis`."""
    coefficients = jax.vmap(lambda q: tree_math.vdot(q, vector))(basis)
    return jax.tree.map(jnp.subtract, vector, _combine(coefficients, basis))


def _combine(coefficients: jax.Array, basis: PyTree) -> PyTree:
    """The sum of the vectors of `basis`, each times its coefficient."""
    return jax.tree.map(
        lambda b: jnp.tensordot(
            coefficients.astype(b.dtype), b, axes=1, precision="highest"
        ),
        basis,
    )


def _spectrum_of_tridiagonal(
    diagonal: jax.Array, off_diagonal: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest eigenvalue, and the eigenvector of the largest.

    A zero in `off_diagonal` says that the space was exhausted: what comes after belongs
    to no basis vector, and is moved below the rest of the spectrum.
    """
    known = jnp.cumprod(jnp.append(1, off_diagonal[:-1] > 0)) > 0
    below = -jnp.abs(diagonal).max() - 2 * off_diagonal.max() - 1
    matrix = jnp.diag(jnp.where(known, diagonal, below))
    matrix += jnp.diag(off_diagonal[:-1], 1) + jnp.diag(off_diagonal[:-1], -1)
    values, vectors = jnp.linalg.eigh(matrix)
    return values[jnp.array([0, -1])], vectors[:, -1]
