"""A small program as a user would write it, for the type checker, and run as a test."""

from typing import NamedTuple, assert_type

import jax
import jax.numpy as jnp
import optax

import eigensam_jax
from eigensam_jax import diagnostics, eigen, hessian, trackers


class Params(NamedTuple):
    weights: jax.Array
    bias: jax.Array


def loss(params: Params) -> jax.Array:
    return jnp.sum((params.weights @ jnp.arange(3.0) + params.bias - 1) ** 2)


link = eigensam_jax.eigen_sam(
    rho=optax.linear_schedule(0.0, 0.05, 10),
    alpha=0.2,
    tracker=trackers.secant(decay=0.9),
    mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
)
assert_type(link, optax.GradientTransformationExtraArgs)
tx = optax.chain(link, optax.sgd(0.1))


@jax.jit
def train_step(params: Params, state: optax.OptState) -> tuple[Params, optax.OptState]:
    grads = jax.grad(loss)(params)
    updates, state = tx.update(grads, state, params, value_fn=loss)
    return optax.apply_updates(params, updates), state


def main() -> float:
    params = Params(jnp.ones((2, 3)), jnp.zeros(2))
    grads = jax.grad(loss)(params)
    assert_type(diagnostics.check_gradient(grads, params, value_fn=loss), float)
    params, _ = train_step(params, tx.init(params))
    top = eigensam_jax.sharpness(loss, params)
    assert_type(top, eigen.Eigenpair)
    assert_type(top.eigenvalue, jax.Array)
    product = hessian.matvec(jax.grad(loss), params)(top.eigenvector)
    return float(diagnostics.alignment(product, top.eigenvector))
