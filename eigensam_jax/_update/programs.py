"""Loops of the program or of Python, and what these compile."""

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

Carry = TypeVar("Carry")
_PROGRAMS: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], Any]]
_PROGRAMS = weakref.WeakKeyDictionary()


def is_traced(tree: Any) -> bool:
    """Whether any leaf is traced. Outside `jit` none is, and a loop compiles anew."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def on_device(tree: Any) -> Any:
    """`tree` with NumPy's arrays on the device, where each call would move them."""

    def moved(x: Any) -> Any:
        is_elsewhere = isinstance(x, np.ndarray | np.generic)
        return jax.device_put(np.asarray(x)) if is_elsewhere else x

    return jax.tree.map(moved, tree)


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
    if is_traced(cond(carry)):
        raise ValueError(
            "host_loop=True loops in Python, so it can't be inside jit, vmap or grad: "
            "leave host_loop out there, or call this outside."
        )
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
    if is_traced(outside):
        return None
    outside = on_device(outside)
    text = str(jaxpr)
    kept: dict[tuple[Any, ...], Any] = {}
    # An address identifies a Python function only while it lives; dots abbreviate
    # numbers that JAX keeps in the program.
    if " at 0x" not in text and "..." not in text:
        try:
            kept = _PROGRAMS.setdefault(owner, kept)
        except TypeError:  # no weak reference, or no hash
            kept = {}
    # The text does not show the arrays of an inner program, such as a `jit`. The kept
    # program holds them, so that no other has their addresses.
    key = (text, *map(id, _arrays_within(jaxpr)))
    if key not in kept:
        for old in [x for x in kept if x[0] == text]:
            del kept[old]
        kept[key] = jax.jit(
            lambda outside, leaves: core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, outside))(
                *leaves
            )
        )
    program, structure = kept[key], jax.tree.structure(shapes)

    def call(*arguments: Any) -> Any:
        leaves = jax.tree.leaves(arguments)
        return jax.tree.unflatten(structure, program(outside, leaves))

    return call


def _arrays_within(jaxpr: Any) -> list[Any]:
    """The arrays that inner programs of `jaxpr` hold, such as a batch."""
    is_program: Callable[[Any], bool] = lambda x: hasattr(x, "eqns")
    found = []
    for equation in jaxpr.eqns:
        for x in jax.tree.leaves(equation.params, is_leaf=is_program):
            if is_program(x):
                found += [*getattr(x, "consts", ()), *_arrays_within(x)]
    return found
