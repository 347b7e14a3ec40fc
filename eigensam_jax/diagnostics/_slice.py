"""The loss on a line or in a plane through the parameters."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from eigensam_jax import tree_math
from eigensam_jax._update import arguments, functions, programs, rounding, scalars
from eigensam_jax.eigen import _krylov
from eigensam_jax.tree_math import PyTree, ValueFn


class LossSlice(NamedTuple):
    """The loss on a line or in a plane, and where a path passes.

    Attributes:
      distances: the tᵢ along each direction, a tuple of one or two arrays.
      values: f(w + Σ tᵢ dᵢ), with an axis for each direction.
      path: the coordinates of a path, shape (points, directions), or None.
    """

    distances: tuple[jax.Array, ...]
    values: jax.Array
    path: jax.Array | None


def filter_normalized(key_or_seed: jax.Array | int, params: PyTree) -> PyTree:
    """A random direction of which each filter is as long as that of the parameters.

    Layers that can be rescaled without a change of the network are then moved in
    proportion, so that slices of different networks compare. A filter is the weights of
    one output, a slice along the last axis of a leaf, as Flax lays them out. Leaves of
    one axis or none, biases and scales, are not moved.

    Args:
      key_or_seed: of the random numbers: a key of `jax.random`, or an integer.
      params: w, a tree of real arrays.

    Returns:
      A tree like `params`, in float32 or wider.

    Raises:
      ValueError: for arguments that are none of the above.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import diagnostics
      >>> w = {"kernel": jnp.array([[3.0, 0.0], [4.0, 2.0]]), "bias": jnp.ones(2)}
      >>> direction = diagnostics.filter_normalized(0, w)
      >>> jnp.linalg.norm(direction["kernel"], axis=0).round(3)
      Array([5., 2.], dtype=float32)
      >>> direction["bias"]
      Array([0., 0.], dtype=float32)

    References:
      Li, Xu, Taylor, Studer and Goldstein, "Visualizing the Loss Landscape of Neural
      Nets", NeurIPS 2018.
    """
    valid = isinstance(key_or_seed, jax.Array | int | np.integer)
    what, remedy = "a key or an integer", ": give jax.random.key(0), or 0"
    arguments.require(valid, "key_or_seed", key_or_seed, what, remedy)
    arguments.check_params(params)
    key: Any = key_or_seed
    if isinstance(key, int | np.integer) or (
        key.ndim == 0 and jnp.issubdtype(key.dtype, jnp.integer)
    ):
        key = jax.random.key(key)
    zeros = tree_math.zeros_like(params)
    random = _krylov.random_vector(key, zeros)

    def rescaled(zero: jax.Array, x: jax.Array, w: jax.Array) -> jax.Array:
        if zero.ndim < 2:
            return zero
        return x * tree_math.safe_divide(_filter_norms(w), _filter_norms(x))

    return jax.tree.map(rescaled, zeros, random, tree_math.widen(params))


def _filter_norms(x: jax.Array) -> jax.Array:
    """The norm over all axes but the last, which keeps its sharding."""
    axes = tuple(range(x.ndim - 1))
    largest = jnp.max(jnp.abs(x), axes, keepdims=True, initial=0)
    # Squares of the entries themselves could over- or underflow.
    parts = x / jnp.where(largest > 0, largest, 1)
    squares = jnp.sum(parts * parts, axes, keepdims=True)
    return largest * scalars.safe_sqrt(squares)


def loss_slice(
    value_fn: ValueFn,
    params: PyTree,
    directions: Sequence[PyTree],
    distances: Sequence[ArrayLike],
    *,
    path: Sequence[PyTree] | None = None,
) -> LossSlice:
    """Loss f(w + Σ tᵢ dᵢ) on a grid along one or two directions dᵢ.

    One evaluation for each point of the grid. Outside `jit` on a CPU they are calls of
    one compiled function; elsewhere they are a loop inside the program.

    Args:
      value_fn: f, a function of the parameters alone that returns a real scalar.
      params: w, a tree of real arrays.
      directions: a list of one or two trees like `params`, such as those of
        `filter_normalized` or the eigenvector of `sharpness`. They are taken as they
        are, neither normalised nor made orthogonal.
      distances: a list of one or two arrays of one axis, the tᵢ of each direction.
      path: a list of trees like `params`, such as those saved during training. Their
        coordinates t are those of the nearest points w + Σ tᵢ dᵢ.

    Returns:
      A `LossSlice`, which `plotting.loss_slice` draws.

    Raises:
      ValueError: for arguments that are none of the above.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import diagnostics
      >>> f, w = (lambda w: jnp.sum(w**2)), jnp.array([1.0, 0.0])
      >>> x, y = jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0])
      >>> diagnostics.loss_slice(f, w, [x, y], [[-1, 0, 1], [0, 1]], path=[x + y]).path
      Array([[0., 1.]], dtype=float32)
      >>> diagnostics.loss_slice(f, w, [x], [[-1, 0, 1]]).values
      Array([0., 1., 4.], dtype=float32)
    """
    what, remedy = "a function of the parameters", ": call loss_slice(value_fn, params,"
    remedy += " directions, distances)"
    arguments.require(callable(value_fn), "value_fn", value_fn, what, remedy)
    arguments.check_params(params)
    directions = _checked_trees("directions", directions, params)
    if len(directions) > 2:
        raise ValueError(
            "directions must be a list of one or two trees like params, got "
            f"{len(directions)} trees: a picture has no more. Take several slices."
        )
    dtype = tree_math.accumulation_dtype(params)
    grid = _checked_distances(distances, len(directions), dtype)
    coordinates = None
    if path is not None:
        trees = _checked_trees("path", path, params)
        coordinates = _coordinates(trees, params, directions).astype(dtype)

    value = functions.scalar_valued("value_fn", value_fn)

    def at(params: PyTree, directions: list[PyTree], point: jax.Array) -> jax.Array:
        shift = tree_math.zeros_like(params)
        for distance, direction in zip(point, directions, strict=True):
            shift = tree_math.add_scaled(shift, distance, direction)
        return value(rounding.add(params, shift))

    points = jnp.stack(jnp.meshgrid(*grid, indexing="ij"), -1).reshape(-1, len(grid))
    host_loop, run = programs.host_loop_of(
        None, value_fn, at, params, directions, points[0]
    )
    if host_loop:
        values = jnp.stack([run(params, directions, point) for point in points])
    else:
        values = jax.lax.map(lambda point: run(params, directions, point), points)
    return LossSlice(grid, values.reshape([x.size for x in grid]), coordinates)


def _checked_trees(name: str, trees: Sequence[PyTree], params: PyTree) -> list[PyTree]:
    if not isinstance(trees, list | tuple) or not trees:
        is_empty = isinstance(trees, list | tuple)
        got = "an empty one" if is_empty else f"a {type(trees).__name__}"
        raise ValueError(f"{name} must be a list of trees like params, got {got}.")
    remedy = f"Give {name} as a list of such trees."
    return [
        arguments.like_params(f"{name}[{i}]", tree, params, remedy)
        for i, tree in enumerate(trees)
    ]


def _checked_distances(
    distances: Sequence[ArrayLike], count: int, dtype: jnp.dtype
) -> tuple[jax.Array, ...]:
    shapes = None
    if isinstance(distances, list | tuple):
        shapes = [np.shape(x) for x in distances]
    usable = shapes is not None and all(len(x) == 1 and x != (0,) for x in shapes)
    if not usable or len(distances) != count:
        got = f"a {type(distances).__name__}" if shapes is None else f"shapes {shapes}"
        example = ", ".join(["jnp.linspace(-1, 1, 51)"] * count)
        raise ValueError(
            "distances must be a list with an array of one axis for each of the "
            f"{count} directions, got {got}: give [{example}]."
        )
    return tuple(jnp.asarray(x, dtype) for x in distances)


def _coordinates(
    path: list[PyTree], params: PyTree, directions: list[PyTree]
) -> jax.Array:
    """The least-squares coordinates of `path`; the shortest, if several do as well."""
    lengths = [tree_math.norm(x) for x in directions]
    inverses = [tree_math.safe_inverse(x) for x in lengths]
    units = list(map(tree_math.scale, inverses, directions))

    def along(tree: PyTree) -> jax.Array:
        return jnp.stack([tree_math.vdot(unit, tree) for unit in units])

    gram = jnp.stack([along(unit) for unit in units])
    moved = jnp.stack([along(tree_math.add_scaled(x, -1, params)) for x in path])
    inverse = jnp.linalg.pinv(gram, hermitian=True) * jnp.stack(inverses)[None]
    return jnp.matmul(moved, inverse.astype(moved.dtype), precision="highest")
