"""Functions that are compiled once and traced at each use, so that no data is stale."""

import weakref
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

_PROGRAMS: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()


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
