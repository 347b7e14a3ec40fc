"""Means over devices, where the caller maps over them: `pmap`, `shard_map`, `vmap`.

Under `jit` with sharded arrays none of this is needed: there the loss is that of the
whole batch, and what is computed from it the same on all devices.
"""

from collections.abc import Hashable
from typing import TypeVar

import jax
import jax.numpy as jnp

AxisName = Hashable | tuple[Hashable, ...] | None
Axes = tuple[Hashable, ...]
Tree = TypeVar("Tree")


def axes(axis_name: AxisName) -> Axes:
    """The names as a tuple; an empty one for None."""
    if axis_name is None:
        return ()
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def check_bound(axes: Axes) -> None:
    """Refuses names that nothing around the call maps over.

    Raises:
      ValueError: if there is one.
    """
    for name in axes:
        try:
            jax.lax.axis_size(name)
        except NameError as error:
            raise ValueError(
                f"axis_name {name!r} is not an axis here: call update inside jax.pmap, "
                "jax.shard_map or jax.vmap over it, or leave axis_name out. Under jit "
                "with sharded arrays it is not needed."
            ) from error


def mean(tree: Tree, axes: Axes) -> Tree:
    """The mean over all devices of the axes; `tree` as it is where there are none."""
    if not axes:
        return tree
    result: Tree = jax.lax.pmean(tree, axes)  # type: ignore[no-untyped-call]
    return result


def as_own(tree: Tree, axes: Axes) -> Tree:
    """`tree` as a value that each device has for itself.

    Under `shard_map` with its check of varying values (`check_vma=True`), the gradient
    with respect to a replicated value is the sum over all devices, and its mean over
    them too large as many times as there are devices. With respect to a value that
    varies it is each device's own, as everywhere else.
    """
    result: Tree = jax.tree.map(lambda x: _cast(x, _missing(x, axes)), tree)
    return result


def varying(tree: Tree, axes: Axes) -> Axes:
    """The axes over which a leaf is known to vary; none where that is not kept."""
    leaves = jax.tree.leaves(tree)
    return tuple(a for a in axes if any(a in _varying(x) for x in leaves))


def replicated(tree: Tree, axes: Axes) -> Axes:
    """The axes over which all leaves are known to be equal; none if that is unknown."""
    known = varying(as_own(jnp.zeros(()), axes), axes)
    return tuple(a for a in known if a not in varying(tree, axes))


def _missing(x: jax.Array, axes: Axes) -> Axes:
    """Axes of `shard_map` or `pmap` over which `x` does not vary yet."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(a for a in axes if a in manual and a not in _varying(x))


def _varying(x: jax.Array) -> frozenset[Hashable]:
    names: frozenset[Hashable] = jax.typeof(x).manual_axis_type.varying
    return names


def _cast(x: jax.Array, axes: Axes) -> jax.Array:
    if not axes:
        return x
    result: jax.Array = jax.lax.pcast(x, axes, to="varying")
    return result
