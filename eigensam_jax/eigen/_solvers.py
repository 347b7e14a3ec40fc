"""Power, Lanczos and thick-restart Lanczos iterations."""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from eigensam_jax import tree_math
from eigensam_jax._update import arguments, programs
from eigensam_jax.eigen import _krylov, _raveled, _thick_restart
from eigensam_jax.hessian import Matvec
from eigensam_jax.tree_math import PyTree


class Eigenpair(NamedTuple):
    """An approximate eigenpair and its error.

    Attributes:
      eigenvector: unit vector, a tree of arrays in float32 or wider.
      eigenvalue: the Rayleigh quotient λ = ⟨v, Hv⟩, a scalar.
      residual: ‖Hv − λv‖, a scalar; some eigenvalue of H lies within it of λ.
    """

    eigenvector: PyTree
    eigenvalue: jax.Array
    residual: jax.Array


def power_iteration(
    matvec: Matvec, v0: PyTree, num_matvecs: int, *, unroll: bool = False
) -> Eigenpair:
    """Power iteration v ← Hv/‖Hv‖: the eigenvalue of H of largest magnitude.

    Each iteration makes one product and multiplies the angle to the eigenvector by
    about |λ₂/λ₁|. `eigenvalue`, which may be negative, and `residual` are those of v,
    the input of the last product; `eigenvector` is Hv/‖Hv‖, one iteration further.

    Args:
      matvec: the product with a symmetric matrix, from a tree to a tree like it.
      v0: the start, a tree of real arrays of any norm. Zero stays zero.
      num_matvecs: the number of products, at least 1.
      unroll: True unrolls the loop on a CPU if a product has convolutions, which XLA
        runs many times slower in a loop there. Outside `jit` it makes a Python loop,
        which is not compiled again at each call.

    Returns:
      An `Eigenpair`. If Hv = 0 the iteration stays at v, with λ = 0. A non-finite
      product makes λ or the residual non-finite and leaves v unchanged.

    Example:
      >>> import eigensam_jax, jax.numpy as jnp
      >>> matvec = lambda v: jnp.array([-1.0, 2.0, 4.0]) * v
      >>> pair = eigensam_jax.eigen.power_iteration(matvec, jnp.ones(3), 20)
      >>> float(pair.eigenvalue), pair.eigenvector.round(5)
      (4.0, Array([0., 0., 1.], dtype=float32))

    References:
      Golub and Van Loan, "Matrix Computations", 4th edition, 2013: section 8.2; for
      `lanczos`, chapter 10.
    """
    arguments.check_positive_int("num_matvecs", num_matvecs, "matrix-vector products")
    v0, _ = tree_math.unit(v0)
    zero = jnp.zeros((), tree_math.accumulation_dtype(v0))

    def body(_: int, step: tuple[PyTree, PyTree, jax.Array]) -> tuple[PyTree, ...]:
        v = step[1]
        product = tree_math.cast_like(matvec(v), v)
        length = tree_math.norm(product)
        inverse = tree_math.safe_inverse(length)
        moved = tree_math.scale(inverse, product)
        return v, tree_math.where(inverse > 0, moved, v), length

    before, after, length = _krylov.repeat_products(
        num_matvecs, body, (v0, v0, zero), unroll, matvec, v0
    )
    # Hv = length · after, so λ = length · cosine.
    cosine = tree_math.vdot(before, after)
    sine = tree_math.norm(tree_math.add_scaled(after, -cosine, before))
    return Eigenpair(after, length * cosine, length * sine)


def lanczos(
    matvec: Matvec, v0: PyTree, num_matvecs: int, *, unroll: bool = False
) -> Eigenpair:
    """Lanczos iteration: the algebraically largest eigenvalue of H.

    Maximises the Rayleigh quotient ⟨y, Hy⟩ over the Krylov space of v0, Hv0, …, H^(m−1)
    v0, which contains the result of m − 1 power iterations. `eigenvalue` and `residual`
    are those of y. `eigenvector` is (H − μ)y, normalised, with μ the smaller of 0 and
    the smallest Ritz value: one shifted power iteration further, for no further
    product. The method holds m + 3 vectors and does 4m² vector operations. Use it for a
    few dozen products at most.

    Args:
      matvec, v0: as in `power_iteration`.
      num_matvecs: m, the number of products, at least 1. Those after the Krylov space
        is exhausted change nothing.
      unroll: as in `power_iteration`.

    Returns:
      An `Eigenpair`, its residual from the last coefficient of the recurrence.

    Example:
      >>> import eigensam_jax, jax.numpy as jnp
      >>> matvec = lambda v: jnp.array([-5.0, 1.0, 2.0]) * v
      >>> print(f"{eigensam_jax.eigen.lanczos(matvec, jnp.ones(3), 3).eigenvalue:.4f}")
      2.0000
    """
    arguments.check_positive_int("num_matvecs", num_matvecs, "matrix-vector products")
    v0 = tree_math.widen(v0)
    basis, diagonal, off_diagonal = _krylov.repeat_products(
        num_matvecs,
        lambda i, s: _krylov.grow(i, s, matvec(_krylov.get(s.basis, i))),
        _krylov.tridiagonal(v0, num_matvecs),
        unroll,
        matvec,
        v0,
    )
    # After a zero the space was exhausted: no basis vector follows.
    known = jnp.cumsum(off_diagonal[:-1] == 0) == 0
    known = jnp.append(jnp.ones((), bool), known)
    diagonal = jnp.where(known, diagonal, 0)
    values, vectors = _krylov.eigh_known(_krylov.dense(diagonal, off_diagonal), known)
    bottom, top, weights = jnp.minimum(values[0], 0), values[-1], vectors[:, -1]
    # H y = λ y + beyond · q, with q the last basis vector.
    beyond = off_diagonal[-1] * weights[-1]
    beyond_shifted = beyond * tree_math.safe_inverse(top - bottom)
    weights = jnp.append(weights, beyond_shifted) / jnp.hypot(1, beyond_shifted)
    return Eigenpair(_krylov.combine(weights, basis), top, jnp.abs(beyond))


def top_eigenpairs(
    matvec: Matvec,
    like: PyTree,
    k: int,
    *,
    which: Literal["algebraic", "magnitude"] = "algebraic",
    tol: ArrayLike = 1e-4,
    max_matvecs: int = 1000,
    v0: PyTree | None = None,
    seed: int = 0,
    thorough: bool = False,
    host_loop: bool = False,
) -> Eigenpair:
    """Thick-restart Lanczos iteration: the k largest eigenvalues of H, to a tolerance.

    Stops when ‖Hvᵢ − λᵢvᵢ‖ ≤ `tol`·|λ₁| for all k pairs, as far as rounding allows, or
    when the next product would exceed `max_matvecs`. A Krylov space contains one vector
    of a multiple eigenvalue. When it is exhausted, the search continues from a random
    vector orthogonal to it; with `thorough`, also after convergence, until nothing new
    is found.

    Cost: at least k + 2 products; from a `v0`, which may be near an unwanted
    eigenvector, at least max(20, m), m = 2k + 8; with `thorough` at least m + k, about
    twice that for k > 1. Memory: that of 2m + k + 2 vectors.

    Args:
      matvec: the product with a symmetric matrix, from a tree to a tree like it.
      like: a tree like the vectors, such as the parameters, or its
        `jax.ShapeDtypeStruct`.
      k: the number of eigenpairs, from 1 to the number of parameters.
      which: "algebraic" for the largest eigenvalues, "magnitude" for the largest |λᵢ|.
      tol: tolerance of the residual relative to |λ₁|. An eigenvalue is then within it
        of a true one, mostly within about its square.
      max_matvecs: the most products, at least k, or 2k with `thorough`.
      v0: the start, a tree like `like`; None or zeros for a random vector.
      seed: seed of the random vectors, other ones with `host_loop`.
      thorough: whether to find all copies of multiple eigenvalues, and to measure each
        residual by a product. The default residual, of the Lanczos recurrence, is too
        small below 1e-5·|λ₁| in float32: give True with a smaller `tol`.
      host_loop: False loops inside the compiled program. True loops in Python and
        cannot be jitted: for a `matvec` that reads data on the host, or a jitted one
        with convolutions on a CPU, which XLA runs many times slower in a loop.

    Returns:
      An `Eigenpair` with a leading axis of length k, in descending order of λᵢ or |λᵢ|.
      Its eigenvectors are orthonormal. A non-finite product ends the search with NaN in
      all.

    Example:
      >>> import eigensam_jax, jax.numpy as jnp
      >>> matvec = lambda v: jnp.array([-9.0, 0.0, 1.0, 2.0, 2.0]) * v
      >>> pairs = eigensam_jax.eigen.top_eigenpairs(matvec, jnp.zeros(5), 3)
      >>> pairs.eigenvalue.round(4), pairs.eigenvector.shape
      (Array([2., 2., 1.], dtype=float32), (3, 5))

    References:
      Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue
      problems", SIAM Journal on Matrix Analysis and Applications, 2000.
    """
    raveled = _raveled.raveled(host_loop, like)
    dimension = sum(jnp.size(x) for x in jax.tree.leaves(raveled.zero))
    arguments.check_positive_int("k", k, "eigenpairs")
    what = f"at most {dimension}, the number of parameters in like"
    remedy = ": ask for fewer eigenpairs"
    arguments.require(k <= dimension, "k", k, what, remedy)
    arguments.check_choice("which", which, ("algebraic", "magnitude"))
    arguments.check_scalar("tol", tol, schedule=False)
    arguments.check_positive_int("max_matvecs", max_matvecs, "matrix-vector products")
    num_checks = k if thorough else 0
    what = f"at least {k + num_checks} for k = {k}"
    remedy = ": allow more products or ask for fewer eigenpairs"
    valid = max_matvecs >= k + num_checks
    arguments.require(valid, "max_matvecs", max_matvecs, what, remedy)
    plan = _thick_restart.plan(k, dimension, which == "magnitude", thorough)
    key = jax.random.key(seed)
    first = raveled.zero
    if v0 is not None:
        remedy = "Start from a tree like `like`."
        first = raveled.ravel(arguments.like_params("v0", v0, like, remedy))
    product = raveled.product(matvec)
    compiled = partial(programs.jitted, host_loop)
    get, measured = compiled(_krylov.get), compiled(_measured)
    start = compiled(_thick_restart.start, static_argnums=0)
    advance = compiled(_thick_restart.advance, static_argnums=0, donate_argnums=1)
    wanted = compiled(_thick_restart.wanted, static_argnums=0)

    def next_product(search: _thick_restart.Search) -> _thick_restart.Search:
        v = get(search.basis, search.known)
        advanced: _thick_restart.Search = advance(plan, search, product(v), tol, key)
        return advanced

    search = programs.while_loop(
        host_loop,
        lambda s: ~s.done & (s.products < max_matvecs - num_checks),
        next_product,
        start(plan, first, key),
    )
    pairs = Eigenpair(*wanted(plan, search))
    if not thorough:
        return pairs._replace(eigenvector=raveled.unravel(pairs.eigenvector))

    def next_check(i: jax.Array, pairs: Eigenpair) -> Eigenpair:
        v = get(pairs.eigenvector, i)
        checked: Eigenpair = measured(i, pairs, v, product(v))
        return checked

    pairs = programs.repeat(host_loop, k, next_check, pairs)
    rank = jnp.abs(pairs.eigenvalue) if plan.by_magnitude else pairs.eigenvalue
    order = jnp.argsort(rank, descending=True)
    vectors, values, residuals = jax.tree.map(lambda x: x[order], pairs)
    return Eigenpair(raveled.unravel(vectors), values, residuals)


def _measured(i: jax.Array, pairs: Eigenpair, v: PyTree, product: PyTree) -> Eigenpair:
    vectors, values, residuals = pairs
    value = tree_math.vdot(v, product)
    residual = tree_math.norm(tree_math.add_scaled(product, -value, v))
    return Eigenpair(vectors, values.at[i].set(value), residuals.at[i].set(residual))
