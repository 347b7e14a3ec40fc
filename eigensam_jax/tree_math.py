"""Inner products, norms and sums of pytrees, accumulated in float32 or wider.

A parameter tree is one long vector here: `vdot` and `norm` run over all leaves at once.
Every sum is an element-wise product followed by `jnp.sum` in the leaf's dtype or
float32, whichever is wider, so that a million bfloat16 ones have the squared norm
1,000,000 and no matrix unit rounds the factors.
"""

import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

PyTree = Any
Tree = TypeVar("Tree")

# The longest row that is summed in one go: the rounding errors of a plain float32 sum
# grow with its length.
_LONGEST_ROW = 2**16


def accumulation_dtype(tree: PyTree) -> jnp.dtype:
    """The dtype of sums over `tree`: the widest of its leaves', at least float32.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import tree_math
      >>> tree_math.accumulation_dtype({"w": jnp.ones(3, jnp.bfloat16)})
      dtype('float32')
    """
    dtypes = {jnp.result_type(x) for x in jax.tree.leaves(tree)}
    wide = [x for x in dtypes if jnp.issubdtype(x, jnp.floating)]
    return max([jnp.dtype(jnp.float32), *wide], key=lambda x: x.itemsize)


def widen(tree: PyTree) -> PyTree:
    """The same tree with every leaf in its own dtype or float32, if that is wider.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import tree_math
      >>> tree_math.widen(jnp.ones(2, jnp.float16)).dtype
      dtype('float32')
    """
    return jax.tree.map(lambda x: jnp.asarray(x, accumulation_dtype(x)), tree)


def cast_like(tree: PyTree, other: PyTree) -> PyTree:
    """`tree` with the dtypes of `other`, a tree of the same structure.

    As `optax.tree.cast_like`, of Python numbers too.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import tree_math
      >>> tree_math.cast_like(jnp.array([1.5, 2.5]), jnp.ones(2, jnp.bfloat16)).dtype
      dtype(bfloat16)
    """
    return jax.tree.map(lambda x, y: jnp.asarray(x, jnp.result_type(y)), tree, other)


def zeros_like(tree: PyTree) -> PyTree:
    """Zeros with the shapes of `tree`, in float32 or wider, sharded as it is.

    By a selection that never selects: under `jit`, an array that is not computed from a
    sharded one is not sharded. Of a `jax.ShapeDtypeStruct` too.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import tree_math
      >>> tree_math.zeros_like(jnp.array([jnp.inf, 1.0], jnp.bfloat16))
      Array([0., 0.], dtype=float32)
    """

    def zeros(x: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jnp.zeros(x.shape, accumulation_dtype(x), device=x.sharding)
        return jnp.where(False, widen(x), 0)

    return jax.tree.map(zeros, tree)


def vdot(a: PyTree, b: PyTree) -> jax.Array:
    """Inner product ⟨a, b⟩ = Σ aᵢ bᵢ over all leaves of two real trees.

    Args:
      a: a tree of real arrays.
      b: a tree with the structure and shapes of `a`.

    Returns:
      A scalar in the accumulation dtype; 0 for a tree without leaves.

    Raises:
      ValueError: if the structures or shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import tree_math
      >>> ones = {"w": jnp.ones(1_000_000, jnp.bfloat16), "b": jnp.ones(())}
      >>> float(tree_math.vdot(ones, ones))
      1000001.0
    """
    dtype = accumulation_dtype((a, b))
    products = jax.tree.map(lambda x, y: jnp.sum(_times(x, y)), widen(a), widen(b))
    sums = (x.astype(dtype) for x in jax.tree.leaves(products))
    return sum(sums, start=jnp.zeros((), dtype))


def vdots(*pairs: tuple[PyTree, PyTree]) -> tuple[jax.Array, ...]:
    """Inner products ⟨a, b⟩ of several pairs of real trees, in one pass over them.

    As `vdot` of each pair, but each leaf is read once, however many products it is in.
    Separate sums would be separate loops over memory, at least on a CPU. (A leaf of one
    axis, or whose last axis is longer than 65,536, takes a loop for each pair.)

    Args:
      *pairs: pairs (a, b) of trees; all trees have the same structure and shapes.

    Returns:
      A scalar for each pair, in the accumulation dtype of all of them.

    Raises:
      ValueError: if the structures or shapes of a pair differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import tree_math
      >>> a, b = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 4.0])}
      >>> [float(product) for product in tree_math.vdots((a, a), (a, b))]
      [5.0, 11.0]
    """
    return _vdots(pairs)


@jax.custom_jvp
def _vdots(pairs: tuple[tuple[PyTree, PyTree], ...]) -> tuple[jax.Array, ...]:
    dtype = accumulation_dtype(pairs)
    products = [jax.tree.map(_times, widen(a), widen(b)) for a, b in pairs]
    zeros = (jnp.zeros((), dtype),) * len(pairs)
    leaves = zip(*map(jax.tree.leaves, products), strict=True)
    sums = [
        [jnp.sum(x).astype(dtype) for x in _row_sums(of_leaf)] for of_leaf in leaves
    ]
    if not sums:
        return zeros
    # A sum for each pair would be a chain of additions as long as there are leaves,
    # and XLA would put it into every loop over a leaf that needs the total.
    stacked = tuple(jnp.stack(of_pair) for of_pair in zip(*sums, strict=True))
    return tuple(_reduce(stacked, zeros, [0]))


@_vdots.defjvp
def _vdots_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    """The reduction with many operands has no derivative of its own."""
    dtype = accumulation_dtype(primals[0])
    rates = [
        (vdot(da, b) + vdot(a, db)).astype(dtype)
        for (a, b), (da, db) in zip(primals[0], tangents[0], strict=True)
    ]
    return _vdots(*primals), tuple(rates)


def _times(x: jax.Array, y: jax.Array) -> jax.Array:
    """The product of two leaves, which must not be broadcast: that is no inner one."""
    if x.shape != y.shape:
        raise ValueError(
            "an inner product is of trees with the same shapes, got leaves of "
            f"{x.shape} and {y.shape}."
        )
    dtype = accumulation_dtype((x, y))
    return x.astype(dtype) * y.astype(dtype)


def _row_sums(leaves: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Sums over the trailing axes of arrays of one shape, all in one loop.

    One reduction with many operands is a plain loop, so its rows are kept short.
    """
    shape, dtype = leaves[0].shape, accumulation_dtype(leaves)
    axes = [i for i in range(len(shape)) if math.prod(shape[i:]) <= _LONGEST_ROW]
    if not axes:
        return leaves
    leaves = tuple(x.astype(dtype) for x in leaves)  # of one dtype they have to be
    return _reduce(leaves, (jnp.zeros((), dtype),) * len(leaves), axes)


def _reduce(
    arrays: tuple[jax.Array, ...], zeros: tuple[jax.Array, ...], axes: list[int]
) -> tuple[jax.Array, ...]:
    """The sums over `axes` of arrays of one shape and dtype, by one reduction."""
    return tuple(jax.lax.reduce(arrays, zeros, _add, axes))


def _add(x: tuple[jax.Array, ...], y: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The same function at each call, or JAX would compile each reduction anew."""
    return tuple(map(jnp.add, x, y))


def norm(tree: PyTree) -> jax.Array:
    """Euclidean norm ‖x‖ = √⟨x, x⟩ over all leaves, in the accumulation dtype.

    Right over the whole range of that dtype: where the squares over- or underflow, they
    are summed once more, rescaled. Elsewhere that costs nothing. The derivative is
    ⟨x/‖x‖, dx⟩, and 0 at x = 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import tree_math
      >>> float(tree_math.norm({"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}))
      5.0
    """
    return _norm(widen(tree))


@jax.custom_jvp
def _norm(tree: PyTree) -> jax.Array:
    dtype = accumulation_dtype(tree)
    exponents = np.finfo(dtype).maxexp
    low, high, step = (2.0 ** (exponents * x) for x in (-0.75, 0.75, 0.625))
    one = jnp.ones((), dtype)

    def attempt(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        divisor, *_ = carry
        # Divided: of a tree c that it knows, XLA would make (c·f)·(c·f) = (c·c)·(f·f).
        scaled = jax.tree.map(lambda x: x / divisor.astype(x.dtype), tree)
        squared = vdot(scaled, scaled)
        rescaled = jnp.where(squared < low, one / step, one)
        rescaled = jnp.where(squared > high, step * one, rescaled)
        following = jnp.where(divisor == 1, rescaled, divisor)
        return following, squared, following == divisor

    first = attempt((one,))
    if not isinstance(first[1], jax.core.Tracer):
        divisor, squared, _ = first if first[2] else attempt(first)
    else:
        # A loop, so that the sums over all leaves are in the program once.
        start = jax.tree.map(lambda x, y: _varying_as(y, x), first, (one, one, one > 1))
        divisor, squared, _ = jax.lax.while_loop(lambda c: ~c[2], attempt, start)
    return jnp.multiply(jnp.sqrt(squared), divisor)


def _varying_as(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x`, varying over the axes of `shard_map` that `like` varies over."""
    axes = tuple(jax.typeof(like).manual_axis_type.varying)
    result: jax.Array = jax.lax.pcast(x, axes, to="varying") if axes else x
    return result


@_norm.defjvp
def _norm_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (tree,), (rate,) = primals, tangents
    length = _norm(tree)
    return length, vdot(scale(safe_inverse(length), tree), rate)


def safe_inverse(x: jax.Array) -> jax.Array:
    """1/x where x is positive and finite, else 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import tree_math
      >>> [float(tree_math.safe_inverse(jnp.array(x))) for x in (4.0, 0.0, jnp.inf)]
      [0.25, 0.0, 0.0]
    """
    return safe_divide(1, x)


def safe_divide(x: ArrayLike, y: jax.Array) -> jax.Array:
    """x/y where y is positive and finite, else 0.

    What is to scale a tree is better divided than multiplied by an inverse: XLA puts a
    sum over all leaves, addition by addition, into the loop over each leaf that needs
    it, and takes minutes to compile the squares of that. A quotient or a root is
    computed once.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import tree_math
      >>> float(tree_math.safe_divide(1.0, jnp.array(4.0)))
      0.25
    """
    usable = (y > 0) & jnp.isfinite(y)
    return jnp.where(usable, x / jnp.where(usable, y, 1), 0)


def scale(factor: ArrayLike, tree: PyTree) -> PyTree:
    """Scaled tree factor · x, each leaf in its own dtype or float32 if that is wider.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import tree_math
      >>> tree_math.scale(2.0, {"b": jnp.array(1.5)})
      {'b': Array(3., dtype=float32)}
    """
    return jax.tree.map(lambda x: jnp.asarray(factor, x.dtype) * x, widen(tree))


def add_scaled(a: PyTree, factor: ArrayLike, b: PyTree) -> PyTree:
    """Sum a + factor · b, each leaf in float32 or wider.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import tree_math
      >>> tree_math.add_scaled(jnp.array([1.0, 2.0]), 3.0, jnp.array([1.0, 0.0]))
      Array([4., 2.], dtype=float32)
    """
    return jax.tree.map(_sum, widen(a), scale(factor, b))


def _sum(x: jax.Array, y: jax.Array) -> jax.Array:
    """X + y in the wider of their dtypes, also under strict promotion."""
    dtype = accumulation_dtype((x, y))
    return x.astype(dtype) + y.astype(dtype)


def where(condition: jax.Array, a: Tree, b: Tree) -> Tree:
    """All of `a` where the scalar `condition` holds, else all of `b`.

    A selection, not a weighted sum: an infinity in the tree not taken stays there.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import tree_math
      >>> float(tree_math.where(jnp.array(True), jnp.array(1.0), jnp.array(jnp.nan)))
      1.0
    """
    selected: Tree = jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)
    return selected
