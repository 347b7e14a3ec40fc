"""What the last step did, found in any optimizer state."""

import functools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from links import LINKS

from eigensam_jax import eigen_sam, info, linen, sam
from eigensam_jax.nnx import value_fn

NAMES = ("alignment", "residual", "eigenvalue", "grad_norm", "count", "tracker")
PARAMS = {name: jnp.full(2, i + 1.0) for i, name in enumerate(NAMES)}
LOSS = lambda p: sum(jnp.sum(jnp.sin(x) ** 2) for x in jax.tree.leaves(p))
SGD = optax.sgd(0.1)


def step(tx, params, state):
    value, grads = jax.value_and_grad(LOSS)(params)
    return tx.update(grads, state, params, value_fn=LOSS, value=value, grad=grads)


def info_of_steps(tx, num=2):
    update = jax.jit(functools.partial(step, tx))
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(num):
        updates, state = update(params, state)
        params = optax.apply_updates(params, updates)
    return info(state)


def assert_close(a, b):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), a, b)


@pytest.mark.parametrize("name", ["sam", "asam", "secant", "power_iteration"])
def test_it_is_what_the_step_did(name):
    link = LINKS[name]()
    _, state = jax.jit(lambda p: step(link, p, link.init(p)))(PARAMS)
    got = info(state)
    grads = jax.grad(LOSS)(PARAMS)
    moved, _ = link.update(  # what comes out is the perturbed weights
        grads,
        link.init(PARAMS),
        PARAMS,
        grad_fn=lambda p: p,
        curvature_fn=LOSS,
    )
    epsilon = jax.tree.map(lambda x, w: x - w, moved, PARAMS)
    np.testing.assert_allclose(got.grad_norm, optax.tree.norm(grads), rtol=1e-5)
    norm = optax.tree.norm(epsilon)
    np.testing.assert_allclose(got.perturbation_norm, norm, rtol=1e-4)
    np.testing.assert_allclose(got.perturbed_value, LOSS(moved), rtol=1e-5)
    tracked = (got.alignment, got.eigenvalue, got.residual)
    if name in ("sam", "asam"):
        assert tracked == (None, None, None)
    else:
        assert all(x.shape == () and x.dtype == jnp.float32 for x in tracked)
        assert 0 <= got.alignment <= 1
        of_tracker = state.tracker.eigenvalue, state.tracker.residual
        assert (got.eigenvalue, got.residual) == of_tracker


LINK = lambda: eigen_sam(0.1, 0.5)
WRAPPED = {
    "nested": lambda: optax.chain(optax.chain(optax.chain(LINK())), SGD),
    "named": lambda: optax.named_chain(("alignment", LINK()), ("residual", SGD)),
    "inject_hyperparams": lambda: optax.chain(
        optax.inject_hyperparams(eigen_sam)(rho=0.1, alpha=0.5), SGD
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.chain(LINK(), SGD), 3),
    "MultiSteps": lambda: optax.MultiSteps(
        optax.chain(LINK(), SGD), 1
    ).gradient_transformation(),
    "conditionally_transform": lambda: optax.chain(
        optax.conditionally_transform(LINK(), lambda step: step >= 0), SGD
    ),
    "something else after": lambda: optax.chain(LINK(), optax.trace(0.0), SGD),
}


@functools.cache
def info_of_the_chain():
    return info_of_steps(optax.chain(LINK(), SGD))


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_it_is_found_in_every_wrapper(wrapping):
    assert_close(info_of_steps(WRAPPED[wrapping]()), info_of_the_chain())


def test_it_is_found_in_schedule_free():
    chain = optax.chain(LINK(), SGD)
    tx = optax.contrib.schedule_free(chain, learning_rate=0.1)
    assert_close(info_of_steps(tx, num=1), info_of_steps(chain, num=1))


def test_of_states_under_vmap_it_has_their_axis():
    tx = optax.chain(LINK(), SGD)
    each = jax.vmap(lambda scale: jax.tree.map(lambda x: scale * x, PARAMS))
    params = each(jnp.array([1.0, 0.5, 0.1]))
    state = jax.jit(jax.vmap(lambda p: step(tx, p, tx.init(p))[1]))(params)
    got = info(state)
    alone = jax.jit(lambda p: info(step(tx, p, tx.init(p))[1]))
    for i in range(3):
        of_one = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
        assert_close(of_one(got), alone(of_one(params)))


class Residual(nnx.Module):
    def __init__(self, rngs):
        self.alignment = nnx.Linear(3, 4, rngs=rngs)
        self.residual = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.residual(jnp.tanh(self.alignment(x)))


def test_of_flax_the_same_plain_arrays_come_out():
    tx = optax.chain(LINK(), SGD)
    x = jnp.arange(6.0).reshape(2, 3) / 6
    model = Residual(nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    loss = lambda model: jnp.mean((model(x) - 1) ** 2)
    at_clean_pass = value_fn(model, loss)

    state = linen.TrainState.create(apply_fn=None, params=params, tx=tx)
    grads = jax.grad(at_clean_pass)(params)
    state = state.apply_gradients(grads=grads, value_fn=at_clean_pass)
    expected = info(state.opt_state)

    optimizer.update(model, nnx.grad(loss)(model), value_fn=at_clean_pass)
    got = info(optimizer.opt_state)
    assert_close(got, expected)
    assert all(isinstance(value, jax.Array) for value in got)
    assert f"{got.perturbation_norm:.3f}" == "0.100"
    under_jit = nnx.jit(lambda optimizer: info(optimizer.opt_state))(optimizer)
    assert_close(under_jit, expected)


def test_no_link_and_several_links_are_told():
    with pytest.raises(ValueError, match=r"one sam, asam or eigen_sam, got 0\."):
        info(optax.adam(0.1).init(PARAMS))
    two = optax.chain(sam(), optax.named_chain(("second", LINK())))
    with pytest.raises(ValueError, match=r"got 2 at \[0\], \[1\]\['second'\]\."):
        info(two.init(PARAMS))


def test_a_linen_network_may_call_its_modules_so_as_well():
    class Network(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            x = flax.linen.Dense(3, name="eigenvalue")(x)
            return flax.linen.Dense(1, name="residual")(x)

    variables = Network().init(jax.random.key(0), jnp.ones((2, 3)))
    tx = LINK()
    assert info(tx.init(variables["params"])).residual == 0
