"""Inner products, norms and sums of pytrees, accumulated in float32 or wider.

A parameter tree is one long vector here: `vdot` and `norm` run over all leaves. Each
sum is an element-wise product followed by `jnp.sum` in float32 or the leaf's dtype if
wider: a million bfloat16 ones have the squared norm 1,000,000. Inner products of trees
that differ in structure or shapes raise a ValueError.

Example:
  >>> import jax.numpy as jnp
  >>> from eigensam_jax import tree_math
  >>> x = {"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0, jnp.bfloat16)}
  >>> float(tree_math.norm(x)), tree_math.accumulation_dtype(x)
  (5.0, dtype('float32'))
  >>> y = tree_math.add_scaled(x, -1, tree_math.scale(2, x))  # x − 2x
  >>> y["b"], tree_math.cast_like(y, x)["b"].dtype
  (Array(-4., dtype=float32), dtype(bfloat16))
  >>> [float(product) for product in tree_math.vdots((x, x), (x, y))]
  [25.0, -25.0]
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from eigensam_jax._update import scalars

PyTree = Any
ValueFn = Callable[[PyTree], jax.Array]  # a loss
GradFn = Callable[[PyTree], PyTree]  # its gradient
Tree = TypeVar("Tree")

# The longest row summed in one go: rounding errors of a float32 sum grow with length.
_LONGEST_ROW = 2**16


def accumulation_dtype(tree: PyTree) -> jnp.dtype:
    """The dtype of sums over `tree`: the widest of its leaves', at least float32."""
    dtypes = {_dtype(x) for x in jax.tree.leaves(tree)}
    if any(jnp.issubdtype(x, jnp.complexfloating) for x in dtypes):
        raise ValueError("trees must hold real arrays, got complex ones: split them.")
    wide = [x for x in dtypes if jnp.issubdtype(x, jnp.floating)]
    return max([jnp.dtype(jnp.float32), *wide], key=lambda x: x.itemsize)


def widen(tree: PyTree) -> PyTree:
    """The same tree with every leaf in float32, or its own dtype if wider."""
    return jax.tree.map(lambda x: jnp.asarray(x, accumulation_dtype(x)), tree)


def cast_like(tree: PyTree, other: PyTree) -> PyTree:
    """`tree` with the dtypes of `other`, as `optax.tree.cast_like`, also of numbers."""
    return jax.tree.map(lambda x, y: jnp.asarray(x, _dtype(y)), tree, other)


def _dtype(x: ArrayLike | jax.ShapeDtypeStruct) -> jnp.dtype:
    # Of a shape `jnp.result_type` would not keep a float64 without `jax_enable_x64`.
    return x.dtype if isinstance(x, jax.ShapeDtypeStruct) else jnp.result_type(x)


def zeros_like(tree: PyTree) -> PyTree:
    """Zeros like `tree`, in float32 or wider, sharded as it is, also under `jit`."""

    def zeros(x: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
        if isinstance(x, jax.ShapeDtypeStruct):
            x = jnp.zeros(x.shape, x.dtype, device=x.sharding)
        # A selection from x keeps its sharding under `jit`.
        return jnp.where(False, widen(x), 0)

    return jax.tree.map(zeros, tree)


def vdot(a: PyTree, b: PyTree) -> jax.Array:
    """Inner product ⟨a, b⟩ = Σ aᵢ bᵢ over all leaves; 0 for trees without leaves."""
    dtype = accumulation_dtype((a, b))
    products = jax.tree.map(lambda x, y: jnp.sum(_times(x, y)), widen(a), widen(b))
    sums = (x.astype(dtype) for x in jax.tree.leaves(products))
    return sum(sums, start=jnp.zeros((), dtype))


def vdots(*pairs: tuple[PyTree, PyTree]) -> tuple[jax.Array, ...]:
    """Inner products ⟨a, b⟩ of pairs of trees of one structure, each leaf read once."""
    # Except leaves of one axis or with a long last axis, which take a loop per pair.
    return _vdots(pairs)


@jax.custom_jvp
def _vdots(pairs: tuple[tuple[PyTree, PyTree], ...]) -> tuple[jax.Array, ...]:
    dtype = accumulation_dtype(pairs)
    products = [jax.tree.map(_times, widen(a), widen(b)) for a, b in pairs]
    leaves = zip(*map(jax.tree.leaves, products), strict=True)
    sums = [
        [jnp.sum(x).astype(dtype) for x in _row_sums(of_leaf)] for of_leaf in leaves
    ]
    if not sums:
        return (jnp.zeros((), dtype),) * len(pairs)
    # One reduction: XLA would repeat a chain of additions over leaves in every loop
    # over a leaf that needs the total.
    return _reduce([jnp.stack(of_pair) for of_pair in zip(*sums, strict=True)], [0])


@_vdots.defjvp
def _vdots_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    """A reduction with many operands has no derivative of its own."""
    dtype = accumulation_dtype(primals[0])
    rates = [
        (vdot(da, b) + vdot(a, db)).astype(dtype)
        for (a, b), (da, db) in zip(primals[0], tangents[0], strict=True)
    ]
    return _vdots(*primals), tuple(rates)


def _times(x: jax.Array, y: jax.Array) -> jax.Array:
    shape = getattr(y, "shape", f"a {type(y).__name__}")
    if x.shape != shape:
        raise ValueError(
            "an inner product needs trees of the same shapes, got leaves of "
            f"{x.shape} and {shape}: give two trees like the parameters."
        )
    dtype = accumulation_dtype((x, y))
    return x.astype(dtype) * y.astype(dtype)


def _row_sums(leaves: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """Sums over the trailing axes of arrays of one shape, in one loop of short rows."""
    shape, dtype = leaves[0].shape, accumulation_dtype(leaves)
    axes = [i for i in range(len(shape)) if math.prod(shape[i:]) <= _LONGEST_ROW]
    if not axes:
        return leaves
    return _reduce([x.astype(dtype) for x in leaves], axes)


def _reduce(arrays: Sequence[jax.Array], axes: list[int]) -> tuple[jax.Array, ...]:
    zeros = (jnp.zeros((), arrays[0].dtype),) * len(arrays)
    return tuple(jax.lax.reduce(tuple(arrays), zeros, _add, axes))


def _add(x: tuple[jax.Array, ...], y: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The same function at each call, or JAX would compile each reduction anew."""
    return tuple(map(jnp.add, x, y))


def norm(tree: PyTree) -> jax.Array:
    """Euclidean norm ‖x‖ = √⟨x, x⟩ over all leaves, in the accumulation dtype.

    Squares that over- or underflow are rescaled and summed again. Its derivative is 0
    at 0.
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
        # A quotient: XLA would turn a product with a constant k into (c·c)·(k·k).
        scaled = jax.tree.map(lambda x: x.astype(dtype) / divisor, tree)
        squared = vdot(scaled, scaled)
        rescaled = jnp.where(squared < low, one / step, one)
        rescaled = jnp.where(squared > high, step * one, rescaled)
        following = jnp.where(divisor == 1, rescaled, divisor)
        return following, squared, following == divisor

    first = attempt((one,))
    if not isinstance(first[1], jax.core.Tracer):
        divisor, squared, _ = first if first[2] else attempt(first)
    else:
        # A loop, so that the program contains the sums over all leaves once.
        start = map(
            scalars.varying, (one, one, one > 1), map(scalars.varies_over, first)
        )
        divisor, squared, _ = jax.lax.while_loop(lambda c: ~c[2], attempt, tuple(start))
    return jnp.multiply(jnp.sqrt(squared), divisor)


@_norm.defjvp
def _norm_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (tree,), (rate,) = primals, tangents
    length = _norm(tree)
    return length, vdot(scale(safe_inverse(length), tree), rate)


def unit(tree: Tree) -> tuple[Tree, jax.Array]:
    """x/‖x‖, or zero for zero, in float32 or wider; and ‖x‖."""
    length = norm(tree)
    return scale(safe_inverse(length), tree), length


def safe_inverse(x: jax.Array) -> jax.Array:
    """1/x where x is positive, normal and finite, else 0."""
    return safe_divide(1, x)


def safe_divide(x: ArrayLike, y: jax.Array) -> jax.Array:
    """x/y where y is positive, normal and finite, else 0."""
    # To scale a tree, prefer a quotient to a product with an inverse: XLA would repeat
    # the sum over all leaves in the loop over each leaf, and take minutes to compile.
    # The inverse of a number below the smallest normal one can be infinite.
    tiny = float(jnp.finfo(y.dtype).tiny)  # type: ignore[no-untyped-call]
    usable = (y >= tiny) & jnp.isfinite(y)
    return jnp.where(usable, x / jnp.where(usable, y, 1), 0)


def scale(factor: ArrayLike, tree: PyTree) -> PyTree:
    """Scaled tree factor · x, each leaf in float32 or wider."""

    def scaled(x: jax.Array) -> jax.Array:
        # A factor may be out of the range of a leaf that is narrower.
        both = (x, factor) if isinstance(factor, jax.Array) else x
        dtype = accumulation_dtype(both)
        return (jnp.asarray(factor, dtype) * x.astype(dtype)).astype(x.dtype)

    return jax.tree.map(scaled, widen(tree))


def add_scaled(a: PyTree, factor: ArrayLike, b: PyTree) -> PyTree:
    """Sum a + factor · b, each leaf in float32 or wider."""
    return jax.tree.map(_sum, widen(a), scale(factor, b))


def _sum(x: jax.Array, y: jax.Array) -> jax.Array:
    """The sum in the wider of their dtypes, also under strict promotion."""
    dtype = accumulation_dtype((x, y))
    return x.astype(dtype) + y.astype(dtype)


def where(condition: jax.Array, a: Tree, b: Tree) -> Tree:
    """All of `a` where the scalar `condition` holds, else all of `b`: a selection."""
    selected: Tree = jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)
    return selected
