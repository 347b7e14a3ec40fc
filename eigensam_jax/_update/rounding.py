"""Stochastic rounding to narrow dtypes, exact on average.

A bfloat16 weight has 8 bits: rounded to the nearest, most are not moved by ε, nor a
long average by one step. The noise of random rounding mostly cancels in a gradient.
(Gupta, Agrawal, Gopalakrishnan, Narayanan, "Deep Learning with Limited Numerical
Precision", ICML 2015.)
"""

from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from eigensam_jax import tree_math
from eigensam_jax.tree_math import PyTree

_MANTISSA_BITS = 23  # of float32


def add(weights: PyTree, epsilon: PyTree, count: ArrayLike = 0) -> PyTree:
    """The perturbed weights w + ε, in the dtypes of `weights`.

    In dtypes narrower than float32 x = w + ε is rounded to a neighbour at random, with
    mean x. The random bits come from x and the step number `count`, so that no key is
    needed and all devices agree.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax._update import rounding
      >>> w = jnp.ones(10_000, jnp.bfloat16)  # the next number is 1.0078
      >>> epsilon = jnp.linspace(0, 0.002, 10_000)
      >>> moved = rounding.add(w, epsilon) - w
      >>> bool(jnp.abs(moved.astype(jnp.float32).sum() / epsilon.sum() - 1) < 0.1)
      True
    """
    return jax.tree.map(
        lambda w, x: _rounded(x, jnp.result_type(w), count),
        weights,
        tree_math.add_scaled(weights, 1, epsilon),
    )


def cast(tree: PyTree, dtype: DTypeLike, count: ArrayLike) -> PyTree:
    """`tree` in another dtype, rounded as in `add`."""
    dtype = jnp.dtype(dtype)
    return jax.tree.map(
        lambda x: x if x.dtype == dtype else _rounded(x, dtype, count), tree
    )


def spread_like(tree: PyTree, seed: jax.Array) -> PyTree:
    """Numbers spread evenly from −1 to 1 (Weyl, 1916): a start vector, not independent.

    No two leaves have the same. They compile many times faster than `jax.random`. A
    `seed` known at compile time would make the compiler work them out, slowly.
    """
    leaves, treedef = jax.tree.flatten(tree)
    ends = [0, *accumulate(x.size for x in leaves)]

    def spread(x: jax.Array, before: int) -> jax.Array:
        position = jnp.arange(1, x.size + 1, dtype=jnp.int32).reshape(x.shape)
        position += jnp.int32(before % 2**31)
        # Multiples of the golden ratio in units of 2⁻³², which wrap around.
        turns = (position + seed * 65_537) * jnp.int32(-1_640_531_527)
        # Added to zeros, so that they are sharded as x.
        return jnp.add(jnp.where(False, x, 0), turns.astype(x.dtype) * 2.0**-31)

    return jax.tree.unflatten(treedef, map(spread, leaves, ends[:-1]))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _rounded(x: jax.Array, dtype: jnp.dtype, count: ArrayLike) -> jax.Array:
    nearest = x.astype(dtype)
    if tree_math.accumulation_dtype(nearest) == dtype:
        return nearest
    x = x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    finfo = jnp.finfo(dtype)  # type: ignore[no-untyped-call]
    fine = _MANTISSA_BITS - 1 - finfo.nmant  # bits that float32 has for the noise
    uniform = (_hash(bits, count) >> (32 - fine)).astype(jnp.float32)
    uniform = (uniform + 0.5) / 2**fine  # symmetric in (0, 1)
    power = bits >> _MANTISSA_BITS << _MANTISSA_BITS  # ±2ⁿ with 2ⁿ ≤ |x| < 2ⁿ⁺¹
    power = jnp.abs(jax.lax.bitcast_convert_type(power, jnp.float32))
    smallest = max(
        float(finfo.smallest_subnormal), float(np.finfo(np.float32).smallest_normal)
    )
    spacing = jnp.maximum(power * float(finfo.eps), smallest)
    magnitude = jnp.floor(jnp.abs(x) / spacing + uniform) * spacing
    magnitude = jnp.minimum(magnitude, float(finfo.max))  # finite stays finite
    dithered = jnp.copysign(magnitude, x).astype(dtype)
    return jnp.where(nearest.astype(x.dtype) == x, nearest, dithered)


@_rounded.defjvp
def _rounded_jvp(dtype: jnp.dtype, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """The mean is x, so the derivative is that of a cast."""
    return _rounded(primals[0], dtype, primals[1]), tangents[0].astype(dtype)


def _hash(bits: jax.Array, count: ArrayLike) -> jax.Array:
    bits = bits + jnp.asarray(count).astype(jnp.uint32) * jnp.uint32(0x9E3779B1)
    for multiplier, shift in ((0x85EBCA6B, 15), (0xC2B2AE35, 13)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(multiplier)
    return bits ^ (bits >> 16)
