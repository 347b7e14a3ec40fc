"""Means over devices, if the caller maps over them by `pmap`, `shard_map` or `vmap`."""

from typing import TypeVar

import jax
import jax.numpy as jnp

from eigensam_jax._update.scalars import varies_over, varying
from eigensam_jax.tree_math import PyTree

AxisName = str | tuple[str, ...] | None
Axes = tuple[str, ...]
Tree = TypeVar("Tree")


def as_tuple(axis_name: AxisName) -> Axes:
    if axis_name is None:
        return ()
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def check_bound(axes: Axes) -> None:
    """Refuses names that nothing around the call maps over."""
    for name in axes:
        try:
            jax.lax.axis_size(name)
        except NameError as error:
            raise ValueError(
                f"axis_name {name!r} is not an axis here: call update inside jax.pmap, "
                "jax.shard_map or jax.vmap over it, or leave axis_name out, as under "
                "jit with sharded arrays."
            ) from error


def mean(tree: Tree, axes: Axes) -> Tree:
    """The mean over all devices of the axes; `tree` itself without axes."""
    if not axes:
        return tree
    result: Tree = jax.lax.pmean(tree, axes)  # type: ignore[no-untyped-call]
    return result


def as_own(tree: Tree, axes: Axes) -> Tree:
    """`tree`, varying over the axes, with gradients per device instead of their sum."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    mapped = tuple(a for a in axes if a in manual)
    result: Tree = jax.tree.map(lambda x: varying(x, mapped), tree)
    return result


def differing(tree: PyTree, axes: Axes) -> Axes:
    """The axes over which some leaf is known to vary."""
    leaves = jax.tree.leaves(tree)
    return tuple(a for a in axes if any(a in varies_over(x) for x in leaves))


def summed(value: jax.Array, params: PyTree, axes: Axes) -> Axes:
    """Other axes over which `value` varies and no leaf: gradients sum over them."""
    leaves = jax.tree.leaves(params)
    known = varies_over(value).difference(axes, *map(varies_over, leaves))
    return tuple(sorted(known))


def replicated(tree: PyTree, axes: Axes) -> Axes:
    """The axes over which some leaf is known to be the same on all devices."""
    # Without check_vma a cast does not make a value vary.
    known = varies_over(as_own(jnp.zeros(()), axes))
    leaves = jax.tree.leaves(tree)
    return tuple(
        a for a in axes if a in known and any(a not in varies_over(x) for x in leaves)
    )
