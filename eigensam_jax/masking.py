"""Which parameters are perturbed: masks as in optax, resolved to a subspace."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from eigensam_jax import tree_math
from eigensam_jax.tree_math import PyTree

Mask = PyTree | Callable[[PyTree], PyTree] | None

_REMEDY = (
    "Give a tree of bools like the parameters or a prefix of them, for example "
    '{"encoder": True, "head": False}, or a function that makes one from them.'
)


class Subspace(NamedTuple):
    """The selected leaves of a parameter tree, as a list that is a tree of its own.

    Attributes:
      treedef: the structure of the whole tree.
      selected: for each of its leaves, in order, whether it is in the subspace.
    """

    treedef: Any
    selected: tuple[bool, ...]

    def select(self, tree: PyTree) -> list[jax.Array]:
        """The leaves of `tree` that are in the subspace."""
        leaves = self.treedef.flatten_up_to(tree)
        return [x for x, chosen in zip(leaves, self.selected, strict=True) if chosen]

    def merge(self, leaves: list[jax.Array], rest: PyTree) -> PyTree:
        """`rest` with the leaves of the subspace replaced by `leaves`."""
        chosen_leaves = iter(leaves)
        others = zip(self.treedef.flatten_up_to(rest), self.selected, strict=True)
        return self.treedef.unflatten(
            next(chosen_leaves) if chosen else x for x, chosen in others
        )

    def embed(self, leaves: list[jax.Array], like: PyTree) -> PyTree:
        """`leaves` in the whole space: arrays of zeros shaped as `like` elsewhere."""
        return self.merge(leaves, tree_math.zeros_like(like))


def check(mask: Mask) -> None:
    """Refuses what can't be a mask whatever the parameters are.

    Raises:
      ValueError: if `mask` is a bare bool or has leaves that are not bools.
    """
    if mask is None or callable(mask):
        return
    if isinstance(mask, bool | np.bool_):
        raise ValueError(f"mask must not be a bare bool, got {mask}. {_REMEDY}")
    for path, leaf in jax.tree.leaves_with_path(mask):
        if not isinstance(leaf, bool | np.bool_):
            where = jax.tree_util.keystr(path)
            raise ValueError(f"mask{where} must be a bool, got {leaf!r}. {_REMEDY}")


def subspace(mask: Mask, params: PyTree) -> Subspace:
    """The subspace of `params` that `mask` selects; all of it for None.

    Raises:
      ValueError: if `mask`, or what it returns, is not a prefix of `params` made of
        bools, or selects no parameter.
    """
    leaves, treedef = jax.tree.flatten(params)
    if mask is None or not leaves:
        return Subspace(treedef, (True,) * len(leaves))
    tree = mask(params) if callable(mask) else mask
    check(tree)
    try:
        selected = jax.tree.leaves(jax.tree.broadcast(tree, params))
    except ValueError as error:
        paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(params)]
        raise ValueError(
            f"mask is not a prefix of the parameters, got {tree} for "
            f"{', '.join(paths)}. {_REMEDY}"
        ) from error
    if not any(selected):
        raise ValueError(f"mask selects no parameter, got {tree}. {_REMEDY}")
    return Subspace(treedef, tuple(bool(chosen) for chosen in selected))
