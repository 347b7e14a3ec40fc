"""What is done to the weights of a trained network: pure functions of its parameters.

Matrices and kernels are quantized and pruned; biases and scales stay as they are.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from eigensam_jax import diagnostics, tree_math
from eigensam_jax.tree_math import PyTree, ValueFn

NOISE_DRAWS = 4
ASCENT_STEPS = 20

# Of each kind of change what is said of a size, and the sizes, the mildest first.
SIZES: dict[str, tuple[str, Sequence[float]]] = {
    "quantized": ("bits of a weight", (8, 4, 3, 2)),
    "pruned": ("share of the weights", (0.5, 0.7, 0.8, 0.9)),
    "noise": ("length of the noise", (2.0, 4.0, 8.0, 16.0)),
    "worst_case": ("radius of the ball", (0.1, 0.2, 0.4, 0.8)),
}

Change = Callable[[PyTree, float], Sequence[PyTree]]


def changes(value_fn: ValueFn, seed: int) -> dict[str, Change]:
    """(parameters, size) -> what they may become, of each kind in `SIZES`.

    Args:
      value_fn: the loss of the parameters, which the worst case climbs.
      seed: of the noise, and of where the climb begins.
    """

    def climbed(params: PyTree, radius: float) -> PyTree:
        found = diagnostics.worst_case_sharpness(
            value_fn, params, radius, num_steps=ASCENT_STEPS, seed=seed
        )
        return tree_math.add_scaled(params, 1, found.perturbation)

    key = jax.random.key(seed)
    keys = [jax.random.fold_in(key, i) for i in range(NOISE_DRAWS)]
    return {
        "quantized": lambda params, bits: [quantized(params, int(bits))],
        "pruned": lambda params, share: [pruned(params, share)],
        "noise": lambda params, radius: [noisy(params, key, radius) for key in keys],
        "worst_case": lambda params, radius: [climbed(params, radius)],
    }


@jax.jit
def _rounded(weight: jax.Array, largest: jax.Array) -> jax.Array:
    axes = range(weight.ndim - 1)
    scale = jnp.abs(weight).max(axes, keepdims=True) / largest
    return scale * jnp.round(weight * tree_math.safe_inverse(scale))


def quantized(params: PyTree, bits: int) -> PyTree:
    """Rounds to the nearest of 2^bits − 1 levels, symmetric about 0, in each channel.

    w ← s·round(w/s) with s = max|w| / (2^(bits−1) − 1) over the weights that lead to
    one output, which stand along all axes but the last.
    """
    largest = jnp.float32(2 ** (bits - 1) - 1)
    return jax.tree.map(lambda w: _rounded(w, largest) if w.ndim > 1 else w, params)


@jax.jit
def pruned(params: PyTree, share: float) -> PyTree:
    """Sets the smallest `share` of all weights to 0."""
    sizes = [jnp.abs(w).ravel() for w in jax.tree.leaves(params) if w.ndim > 1]
    least = jnp.quantile(jnp.concatenate(sizes), share)
    keep = lambda w: jnp.where(jnp.abs(w) < least, 0, w) if w.ndim > 1 else w
    return jax.tree.map(keep, params)


@jax.jit
def noisy(params: PyTree, key: jax.Array, radius: float) -> PyTree:
    """Adds Gaussian noise with independent entries and mean squared length radius²."""
    leaves, treedef = jax.tree.flatten(params)
    spread = radius / sum(w.size for w in leaves) ** 0.5
    noise = [
        spread * jax.random.normal(jax.random.fold_in(key, i), w.shape, w.dtype)
        for i, w in enumerate(leaves)
    ]
    return tree_math.add_scaled(params, 1, jax.tree.unflatten(treedef, noise))
