"""Weights plus a perturbation in a narrow dtype, without losing the perturbation.

In bfloat16 a weight has 8 bits, so that ε moves it, rounded to the nearest, only where
it is larger than half of the last: of a million weights at a radius of 0.05 most stay
where they are. Rounded up or down at random instead, with the chances that make the
mean exact, each perturbation arrives on average over the weights. What is added to ε is
noise without a direction, of which the gradient, a sum over many weights, sees little.
"""

import jax
import jax.numpy as jnp
import numpy as np

from eigensam_jax import tree_math
from eigensam_jax.tree_math import PyTree

_MANTISSA_BITS = 23  # of float32
_DITHER_BITS = 12  # with the 11 that float16 has, still exact in float32


def add(weights: PyTree, epsilon: PyTree, count: jax.Array) -> PyTree:
    """The perturbed weights w + ε, in the dtypes of `weights`.

    In dtypes narrower than float32 rounded stochastically, x = w + ε to one of its two
    neighbours with the probabilities that make x the mean; a sum that the dtype holds
    stays as it is. In float32 and wider, to the nearest.

    Args:
      weights: w, a tree of real arrays.
      epsilon: ε, a tree of the same structure and shapes, in float32 or wider.
      count: the number of the step. What seems random is made of it and of x, so that
        it needs no key, and is the same on all devices.

    Returns:
      A tree like `weights`.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import rounding
      >>> w = jnp.ones(10_000, jnp.bfloat16)  # the next number is 1.0078
      >>> epsilon = jnp.linspace(0, 0.002, 10_000)
      >>> float((w + epsilon.astype(w.dtype) - w).sum())  # to the nearest
      0.0
      >>> moved = rounding.add(w, epsilon, jnp.int32(0)) - w
      >>> bool(jnp.abs(moved.astype(jnp.float32).sum() / epsilon.sum() - 1) < 0.1)
      True

    References:
      Gupta, Agrawal, Gopalakrishnan, Narayanan, "Deep Learning with Limited Numerical
      Precision", ICML 2015 (stochastic rounding).
    """
    return jax.tree.map(
        lambda w, e: _rounded(w + e, jnp.result_type(w), count), weights, epsilon
    )


def _rounded(x: jax.Array, dtype: jnp.dtype, count: jax.Array) -> jax.Array:
    nearest = x.astype(dtype)
    if tree_math.accumulation_dtype(nearest) == dtype:
        return nearest
    x = x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    uniform = _hash(bits, count) >> (32 - _DITHER_BITS)
    uniform = uniform.astype(jnp.float32) / 2**_DITHER_BITS
    power = bits >> _MANTISSA_BITS << _MANTISSA_BITS  # ±2ⁿ with 2ⁿ ≤ |x| < 2ⁿ⁺¹
    power = jnp.abs(jax.lax.bitcast_convert_type(power, jnp.float32))
    finfo = jnp.finfo(dtype)  # type: ignore[no-untyped-call]
    smallest = max(
        float(finfo.smallest_subnormal), float(np.finfo(np.float32).smallest_normal)
    )
    spacing = jnp.maximum(power * float(finfo.eps), smallest)
    magnitude = jnp.floor(jnp.abs(x) / spacing + uniform) * spacing
    magnitude = jnp.minimum(magnitude, float(finfo.max))  # what is finite stays so
    dithered = jnp.copysign(magnitude, x).astype(dtype)
    return jnp.where(nearest == x, nearest, dithered)


def _hash(bits: jax.Array, count: jax.Array) -> jax.Array:
    """Numbers that look random, of 32 bits each, by multiplications and shifts."""
    bits = bits + count.astype(jnp.uint32) * jnp.uint32(0x9E3779B1)
    for multiplier, shift in ((0x85EBCA6B, 15), (0xC2B2AE35, 13)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(multiplier)
    return bits ^ (bits >> 16)
