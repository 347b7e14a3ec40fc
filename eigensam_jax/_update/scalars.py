"""Scalars of a step: safe roots, branches, and values computed once."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import jax
import jax.numpy as jnp

Operand = TypeVar("Operand")
Result = TypeVar("Result")


def branch(
    condition: jax.Array | bool,
    on_true: Callable[[Operand], Result],
    on_false: Callable[[Operand], Result],
    operand: Operand,
) -> Result:
    """`jax.lax.cond`, or `if` where the condition is known, which compiles nothing."""
    if isinstance(condition, jax.core.Tracer):
        result: Result = jax.lax.cond(condition, on_true, on_false, operand)
        return result
    return on_true(operand) if condition else on_false(operand)


def once(*scalars: jax.Array) -> jax.Array:
    """The same scalars as a vector, computed once before the loops that use them.

    XLA repeats a cheap computation in the loop over each leaf, at a multiple of the
    compile time. A quotient is not cheap: here one by 1, which XLA does not know.
    """
    vector = jnp.stack(scalars)
    return vector / jnp.where(jnp.isnan(vector), vector, 1)


def safe_sqrt(x: jax.Array) -> jax.Array:
    """√x where x is positive, else 0 with derivative 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def safe_rsqrt(x: jax.Array) -> jax.Array:
    """1/√x where x is positive and finite, else 0 with derivative 0."""
    usable = (x > 0) & jnp.isfinite(x)
    return jnp.where(usable, jax.lax.rsqrt(jnp.where(usable, x, 1)), 0)


def varies_over(x: jax.Array) -> frozenset[str]:
    axes: frozenset[str] = jax.typeof(x).manual_axis_type.varying
    return axes


def varying(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """`x`, varying over these axes of `shard_map` as well."""
    missing = tuple(a for a in axes if a not in varies_over(x))
    result: jax.Array = jax.lax.pcast(x, missing, to="varying") if missing else x
    return result
