"""Random crops and flips of training images, on the device."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

PADDING = 4

Augment = Callable[[jax.Array, jax.Array], jax.Array]


def crop(key: jax.Array, images: jax.Array) -> jax.Array:
    """Shifts each image by up to `PADDING` pixels, as a random crop of the padded one.

    Padding is zero, the mean colour of standardised images. Shifts are uniform.
    """
    count, height, width, _ = images.shape
    sides = (PADDING, PADDING)
    padded = jnp.pad(images, ((0, 0), sides, sides, (0, 0)))
    corners = jax.random.randint(key, (2, count, 1), 0, 2 * PADDING + 1)
    rows, columns = corners[0] + jnp.arange(height), corners[1] + jnp.arange(width)
    examples = jnp.arange(count)[:, None, None]
    return padded[examples, rows[:, :, None], columns[:, None, :]]


def crop_and_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """`crop`, then a flip from left to right with probability ½, image by image."""
    crop_key, flip_key = jax.random.split(key)
    images = crop(crop_key, images)
    flipped = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
    return jnp.where(flipped, images[:, :, ::-1], images)
