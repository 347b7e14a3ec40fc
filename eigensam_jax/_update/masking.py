"""Which parameters are perturbed: masks as in optax, resolved to a subspace."""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import keystr

from eigensam_jax import tree_math
from eigensam_jax._update import arguments
from eigensam_jax.tree_math import PyTree

Mask = PyTree | Callable[[PyTree], PyTree] | None

_REMEDY = (
    "Give a tree of bools like the parameters or a prefix of them, for example "
    '{"encoder": True, "head": False}, or a function from the parameters to one.'
)
_FILTERS = (
    "A filter of Flax nnx is not a mask: nnx.Optimizer passes arrays without their "
    "variable types. Make bools from the model: jax.tree.map(lambda v: isinstance(v, "
    "Kind), nnx.state(model, wrt), is_leaf=lambda v: isinstance(v, nnx.Variable))."
)


class Subspace(NamedTuple):
    """The selected leaves of a parameter tree, as a list.

    Attributes:
      treedef: the structure of the whole tree.
      selected: for each of its leaves, in order, whether it is in the subspace.
    """

    treedef: Any
    selected: tuple[bool, ...]

    def select(self, tree: PyTree) -> list[jax.Array]:
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
        """`leaves` in the whole space, with zeros like `like` elsewhere."""
        return self.merge(leaves, tree_math.zeros_like(like))


def check(mask: Mask) -> None:
    if isinstance(mask, type) or mask is ...:
        raise ValueError(f"mask must not be {mask!r}. {_REMEDY} {_FILTERS}")
    if mask is not None and not _is_function(mask):
        _check_tree(mask)


def subspace(mask: Mask, params: PyTree) -> Subspace:
    """The subspace of `params` that `mask` selects, whatever its containers."""
    leaves, treedef = jax.tree.flatten(params)
    selected = (True,) * len(leaves)
    check(mask)
    if mask is not None and leaves:
        arguments.check_params(params, (False,) * len(leaves))
        tree = _called(mask, params) if _is_function(mask) else mask
        _check_tree(tree)
        selected = _broadcast(tree, params)
        if not any(selected):
            raise ValueError(f"mask selects no parameter, got {tree}. {_REMEDY}")
    return Subspace(treedef, selected)


def layers(params: PyTree) -> dict[str, PyTree]:
    """A mask for each layer: leaves that differ in the last part of their names.

    Layers without entries are left out.
    """
    leaves = jax.tree.leaves_with_path(params)
    paths = [_names(path) for path, _ in leaves]
    names = ["/".join(path[:-1] or path) for path in paths]
    filled = [name for name, (_, x) in zip(names, leaves, strict=True) if np.size(x)]
    treedef = jax.tree.structure(params)
    if jax.tree_util.all_leaves([params]):
        return {"": None}
    return {
        chosen: jax.tree.unflatten(treedef, [name == chosen for name in names])
        for chosen in dict.fromkeys(filled)
    }


def _is_function(mask: Mask) -> bool:
    """Whether to call it: a module of bools is callable, and a tree."""
    leaves = jax.tree.leaves(mask)
    return callable(mask) and not (leaves and all(map(_is_bool, leaves)))


def _is_bool(leaf: Any) -> bool:
    return isinstance(leaf, bool | np.bool_)


def _check_tree(mask: PyTree) -> None:
    if _is_bool(mask):
        raise ValueError(f"mask must not be a bare bool, got {mask}. {_REMEDY}")
    for path, leaf in jax.tree.leaves_with_path(mask):
        remedy = f". {_REMEDY.removesuffix('.')}"
        arguments.require(_is_bool(leaf), f"mask{keystr(path)}", leaf, "a bool", remedy)


def _called(mask: Callable[[PyTree], PyTree], params: PyTree) -> PyTree:
    """`mask(params)`; errors get a note on how it was called."""
    try:
        return mask(params)
    except Exception as error:
        note = "mask is a function, called with the parameters alone."
        error.add_note(f"{note} {_FILTERS}")
        raise


def _broadcast(mask: PyTree, params: PyTree) -> tuple[bool, ...]:
    """The bool of `mask` for each leaf of `params`, by structure or else by names."""
    with contextlib.suppress(ValueError):
        return tuple(map(bool, jax.tree.leaves(jax.tree.broadcast(mask, params))))
    bools = {_names(path): leaf for path, leaf in jax.tree.leaves_with_path(mask)}
    paths = [_names(path) for path, _ in jax.tree.leaves_with_path(params)]
    found = [
        next((path[:i] for i in range(len(path) + 1) if path[:i] in bools), None)
        for path in paths
    ]
    if None in found or not bools.keys() <= {*found}:
        uncovered = (x for x, on_it in zip(paths, found, strict=True) if not on_it)
        unused = (path for path in bools if path not in found)
        raise ValueError(
            "mask is not a prefix of the parameters, got no bool for "
            f"{_joined(uncovered)}, and no parameter for {_joined(unused)}. {_REMEDY}"
        )
    return tuple(bool(bools[on_it]) for on_it in found if on_it is not None)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The names on the way to a leaf, without `.value` of Flax's variables."""
    if path and str(path[-1]) == ".value":
        path = path[:-1]
    return tuple(keystr((key,), simple=True) for key in path)


def _joined(paths: Iterable[tuple[str, ...]]) -> str:
    return ", ".join("/".join(path) for path in paths) or "none"
