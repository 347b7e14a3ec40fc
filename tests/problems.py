"""Losses with known derivatives, and the dense Hessians to hold results against."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

SPECTRA = {
    "definite": [0.5, 1.0, 2.0, 4.0, 10.0],
    "indefinite": [-3.0, -1.0, 0.0, 2.0, 5.0],
    "degenerate": [0.0, 0.0, 3.0, 3.0, 3.0],
}


def symmetric(spectrum, seed):
    """A dense symmetric float64 matrix with this spectrum, and its eigenvectors."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(len(spectrum), len(spectrum))))
    return (basis * np.asarray(spectrum)) @ basis.T, basis


def quadratic(matrix, dtype):
    """½ wᵀHw on the tree {"a": (2,), "b": {"c": (n − 2,)}}, and the way to and fro."""
    matrix = jnp.asarray(matrix, dtype)

    def to_tree(vector):
        vector = jnp.asarray(vector, dtype)
        return {"a": vector[:2], "b": {"c": vector[2:]}}

    def value_fn(params):
        w = jnp.concatenate([params["a"], params["b"]["c"]])
        product = jnp.matmul(matrix, w, precision="highest")
        return 0.5 * jnp.dot(w, product, precision="highest")

    return value_fn, to_tree


def network(seed=0, dtype=jnp.float32):
    """Parameters and loss(params, batch_index) of a small tanh network.

    One function for all that ask, so that what is made of it is compiled once; but for
    those that are traced, whose function has tracers.
    """
    key = seed, jnp.dtype(dtype), jax.config.jax_enable_x64
    params = _network_parameters(*key[:2])
    loss = _LOSSES.get(key) or _network_loss(*key[:2])
    if not isinstance(params["hidden"]["b"], jax.core.Tracer):
        _LOSSES[key] = loss
    return params, loss


@functools.partial(jax.jit, static_argnums=1)
def _network_parameters(seed, dtype):
    keys = jax.random.split(jax.random.key(seed), 4)
    return {
        "hidden": {
            "w": 0.5 * jax.random.normal(keys[0], (4, 6), dtype),
            "b": jnp.zeros(6, dtype),
        },
        "out": {"w": 0.5 * jax.random.normal(keys[1], (6, 3), dtype)},
    }


_LOSSES = {}


def _network_loss(seed, dtype):
    inputs, labels = _network_batches(seed, dtype)

    def loss(params, index=0):
        x, y = inputs[index], labels[index]
        hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"])
        logits = hidden @ params["out"]["w"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss


@functools.partial(jax.jit, static_argnums=1)
def _network_batches(seed, dtype):
    *_, input_key, label_key = jax.random.split(jax.random.key(seed), 4)
    inputs = jax.random.normal(input_key, (5, 16, 4), dtype)
    return inputs, jax.random.randint(label_key, (5, 16), 0, 3)


def dense_hessian(value_fn, params):
    """The Hessian as a matrix over the raveled parameters."""
    return _dense_hessian(value_fn)(params)


@functools.lru_cache(maxsize=50)
def _dense_hessian(value_fn):
    def dense(params):
        flat, unravel = ravel_pytree(params)
        return jax.hessian(lambda x: value_fn(unravel(x)))(flat)

    return jax.jit(dense)


def jitted(tx, **kwargs):
    """(updates, state, params) -> what `tx.update` makes of them, in one program."""
    return jax.jit(lambda *args: tx.update(*args, **kwargs))


def flatten(tree):
    return np.asarray(ravel_pytree(tree)[0])


@jax.custom_vjp
def slope_of_sine(x):
    return jnp.cos(x)


slope_of_sine.defvjp(lambda x: (jnp.cos(x), x), lambda x, g: (-jnp.sin(x) * g,))


@jax.custom_vjp
def sine_with_a_custom_slope(x):
    return jnp.sin(x)


sine_with_a_custom_slope.defvjp(
    lambda x: (jnp.sin(x), x), lambda x, g: (slope_of_sine(x) * g,)
)


def sines(w):
    """Σ wᵢ sin wᵢ, whose gradient has no forward derivative in JAX."""
    return jnp.sum(w * sine_with_a_custom_slope(w))


def dense_hessian_of_sines(w):
    return np.diag(2 * np.cos(w) - w * np.sin(w))


class LossOnABatch:
    """A loss on a batch that can be exchanged."""

    def __init__(self):
        self.batch = jnp.array([1.0, 2.0, 4.0])

    def __call__(self, w):
        return jnp.sum(self.batch * w**2)


def mask_by_path(is_chosen):
    """A mask by the names on the way to a leaf, as in notebooks/composing.md."""

    def chosen(path, x):
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return is_chosen(names, x)

    return lambda params: jax.tree.map_with_path(chosen, params)
