"""Loops of the program or of Python, and what these compile."""

import math
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from eigensam_jax import tree_math

Carry = TypeVar("Carry")
_PROGRAMS: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()


def is_traced(tree: Any) -> bool:
    """Whether any leaf is traced. Outside `jit` none is, and a loop compiles anew."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def while_loop(
    host_loop: bool,
    cond: Callable[[Carry], jax.Array],
    body: Callable[[Carry], Carry],
    carry: Carry,
) -> Carry:
    """`jax.lax.while_loop`, or with `host_loop` a Python loop."""
    if not host_loop:
        last: Carry = jax.lax.while_loop(cond, body, carry)
        return last
    while cond(carry):
        carry = body(carry)
    return carry


def repeat(
    host_loop: bool,
    count: int,
    body: Callable[[jax.Array, Carry], Carry],
    carry: Carry,
) -> Carry:
    """`carry` after body(i, carry) for each i from 0 on, `count` of them."""
    first = (jnp.zeros((), jnp.int32), carry)
    step = lambda c: (c[0] + 1, body(*c))
    return while_loop(host_loop, lambda c: c[0] < count, step, first)[1]


def jitted(
    host_loop: bool, function: Callable[..., Any], **options: Any
) -> Callable[..., Any]:
    """`function`, jitted if a Python loop is around it, which does not compile it."""
    return jax.jit(function, **options) if host_loop else function


class Vectors(NamedTuple):
    """How a loop holds trees.

    Attributes:
      zero: the one that is zero.
      join, split: from a tree, and back, with leading axes too.
    """

    zero: Any
    join: Callable[[Any], Any]
    split: Callable[[Any], Any]

    def product(self, matvec: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """`matvec`, from trees to trees, for these."""
        return lambda vector: self.join(matvec(self.split(vector)))


def vectors(host_loop: bool, like: Any) -> Vectors:
    """Trees like `like`, each in one array where Python loops, else as they are.

    What is around a product would compile for up to half a second a leaf. Leaves on
    several devices or of several dtypes stay apart.
    """
    is_whole = not is_traced(like) and all(
        map(_is_on_one_device, jax.tree.leaves(like))
    )
    zeros = tree_math.zeros_like(like)
    leaves, treedef = jax.tree.flatten(zeros)
    are_alike = len(leaves) > 1 and len({x.dtype for x in leaves}) == 1
    if not (host_loop and is_whole and are_alike):
        return Vectors(zeros, lambda tree: tree, lambda tree: tree)
    shapes = tuple(x.shape for x in leaves)

    def join(tree: Any) -> jax.Array:
        found = tuple(jnp.shape(x) for x in jax.tree.leaves(tree))
        structure: Any = jax.tree.structure(tree)
        if (structure, found) != (treedef, shapes):
            raise ValueError(
                "matvec must return a tree like its argument, got shapes "
                f"{found} in {structure}: give {shapes} in {treedef}."
            )
        vector: jax.Array = _concatenated(tree, leaves[0].dtype)
        return vector

    return Vectors(join(zeros), join, partial(_split, treedef, shapes))


@partial(jax.jit, static_argnums=1)
def _concatenated(tree: Any, dtype: jnp.dtype) -> jax.Array:
    return jnp.concatenate([x.astype(dtype).ravel() for x in jax.tree.leaves(tree)])


@partial(jax.jit, static_argnums=(0, 1))
def _split(
    treedef: Any, shapes: tuple[tuple[int, ...], ...], vectors: jax.Array
) -> Any:
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = jnp.split(vectors, ends[:-1], axis=-1)
    leading = vectors.shape[:-1]
    pairs = zip(parts, shapes, strict=True)
    return jax.tree.unflatten(treedef, [x.reshape(leading + s) for x, s in pairs])


def _is_on_one_device(leaf: Any) -> bool:
    if isinstance(leaf, jax.core.Tracer):
        return False
    sharding = getattr(leaf, "sharding", None)
    return sharding is None or len(sharding.device_set) == 1


def host_loop_of(
    host_loop: bool | None,
    owner: Callable[..., Any],
    function: Callable[..., Any],
    *example: Any,
) -> tuple[bool, Callable[..., Any]]:
    """Whether a loop is Python's, and what it calls for arguments like `example`.

    None leaves the choice: Python's on a CPU outside `jit`, as XLA runs convolutions
    many times slower inside a loop there. `compiled` says how `function` is kept.
    """
    if host_loop is None:
        host_loop = jax.default_backend() == "cpu" and not is_traced(example)
    known = compiled(owner, function, *example) if host_loop else None
    return known is not None, known or function


def compiled(
    owner: Callable[..., Any], function: Callable[..., Any], *example: Any
) -> Callable[..., Any] | None:
    """`function`, compiled for arguments like `example`; None if it depends on tracers.

    Kept as long as `owner` lives, and reused if a new trace has the same operations.
    Closed-over arrays, such as the batch, are arguments of the program.
    """
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*example)
    outside, jaxpr = list(traced.consts), traced.jaxpr
    if any(isinstance(x, jax.core.Tracer) for x in outside):
        return None
    text = str(jaxpr)
    kept: dict[str, Any] = {}
    # An address identifies a Python function only while it lives; dots abbreviate
    # numbers that JAX keeps in the program.
    if " at 0x" not in text and "..." not in text:
        try:
            kept = _PROGRAMS.setdefault(owner, kept)
        except TypeError:  # no weak reference, or no hash
            kept = {}
    if text not in kept:
        kept[text] = jax.jit(
            lambda outside, leaves: core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, outside))(
                *leaves
            )
        )
    program, structure = kept[text], jax.tree.structure(shapes)

    def call(*arguments: Any) -> Any:
        leaves = jax.tree.leaves(arguments)
        return jax.tree.unflatten(structure, program(outside, leaves))

    return call
