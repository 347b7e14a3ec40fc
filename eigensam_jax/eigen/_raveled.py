"""Trees as one array each, for the Krylov methods of `eigen` in a loop of Python's.

What is around a product would else compile for up to half a second a leaf.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from eigensam_jax import tree_math
from eigensam_jax._update import arguments, programs
from eigensam_jax.hessian import Matvec
from eigensam_jax.tree_math import PyTree


class Raveled(NamedTuple):
    """The vectors of a method, and the way to them from trees.

    Attributes:
      zero: the zero vector.
      ravel: from a tree to its vector.
      unravel: from a vector to its tree; leading axes stay.
    """

    zero: PyTree
    ravel: Callable[[PyTree], PyTree]
    unravel: Callable[[PyTree], PyTree]

    def product(self, matvec: Matvec) -> Matvec:
        """The product with vectors, of `matvec`, which takes and gives trees."""
        return lambda vector: self.ravel(matvec(self.unravel(vector)))


def raveled(host_loop: bool, like: PyTree) -> Raveled:
    """The vectors of trees like `like`: one array each where Python loops.

    Trees that are traced, are not all on the same device, or have several dtypes are
    their own vectors.
    """
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(like)):
        like = tree_math.zeros_like(like)
    leaves = jax.tree.leaves(like)
    dtypes = {tree_math.accumulation_dtype(x) for x in leaves}
    are_alike = len(leaves) > 1 and len(dtypes) == 1
    if not (host_loop and are_alike and _are_on_one_device(leaves)):
        zeros = tree_math.zeros_like(like)
        cast = partial(tree_math.cast_like, other=zeros)
        return Raveled(zeros, cast, lambda tree: tree)
    (dtype,), inverses = dtypes, []
    spec = jax.eval_shape(tree_math.widen, like)
    jax.eval_shape(lambda tree: inverses.append(ravel_pytree(tree)[1]), spec)
    (unravel,) = inverses

    def ravel(tree: PyTree) -> jax.Array:
        remedy = "Give a product that returns a tree like its argument."
        tree = arguments.like_params("matvec(v)", tree, spec, remedy)
        vector: jax.Array = _ravel(dtype, tree)
        return vector

    return Raveled(_zero(dtype, like), ravel, partial(_unravel, unravel))


def _are_on_one_device(leaves: list[Any]) -> bool:
    if programs.is_traced(leaves):
        return False
    arrays = [x for x in leaves if isinstance(x, jax.Array)]
    return len({device for x in arrays for device in x.sharding.device_set}) < 2


@partial(jax.jit, static_argnums=0)
def _ravel(dtype: jnp.dtype, tree: PyTree) -> jax.Array:
    return ravel_pytree(jax.tree.map(lambda x: x.astype(dtype), tree))[0]


@partial(jax.jit, static_argnums=0)
def _zero(dtype: jnp.dtype, tree: PyTree) -> jax.Array:
    return jnp.where(False, _ravel(dtype, tree), 0)  # on the device of the tree


@partial(jax.jit, static_argnums=0)
def _unravel(unravel: Callable[[jax.Array], PyTree], vectors: jax.Array) -> PyTree:
    for _ in range(vectors.ndim - 1):
        unravel = jax.vmap(unravel)
    return unravel(vectors)
