"""Eigen-solvers that see a matrix only through its products with vectors."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

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
