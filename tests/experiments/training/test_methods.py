"""What comes before SGD, and on which steps it acts."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from eigensam_jax import perturbation
from eigensam_jax.experiments import registry
from eigensam_jax.experiments.models import small as models
from eigensam_jax.experiments.training import losses, methods
from eigensam_jax.experiments.training import steps as training_steps
from eigensam_jax.experiments.training.methods import Setup, named


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.LayerNorm()(images.reshape(len(images), -1))
        return nn.Dense(3)(nn.tanh(nn.Dense(4)(x)))


@pytest.fixture(scope="module")
def batch():
    keys = jax.random.split(jax.random.key(0))
    images = jax.random.normal(keys[0], (16, 2, 2, 1))
    return images, jax.random.randint(keys[1], (16,), 0, 3)


def started(method, batch, learning_rate=0.1):
    tx = methods.make_optimizer(method, optax.sgd(learning_rate))
    return tx, training_steps.start(Tiny(), tx, batch[0], 0)


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def test_the_steps_that_perturb_are_every_so_many_of_the_last_share():
    method = Setup("sam", 0.1, every=3, last=0.25)
    assert [i for i in range(40) if method.acts(i, 40)] == [30, 33, 36, 39]
    assert not any(Setup("sgd").acts(i, 40) for i in range(40))
    paper = named("eigen_sam_paper", 0.1, 0.2)._replace(update_interval=4)
    assert [i for i in range(12) if paper.refreshes(i, 12)] == [0, 4, 8]
    late = paper._replace(last=0.5)  # it refreshes on the first step that perturbs
    assert [i for i in range(12) if late.refreshes(i, 12) and late.acts(i, 12)] == [
        6,
        10,
    ]


def test_gradients_are_counted_with_two_for_a_product():
    assert Setup("sgd").gradients(400) == 1
    assert Setup("sam", 0.1).gradients(400) == 2
    assert named("eigen_sam", 0.1, 1.0).gradients(400) == 2
    assert named("eigen_sam_paper", 0.1, 1.0).gradients(400) == pytest.approx(2.1)
    assert Setup("sam", 0.1, every=4).gradients(400) == 1.25
    assert Setup("sam", 0.1, last=0.1).gradients(400) == pytest.approx(1.1)
    paper = named("eigen_sam_paper", 0.1, 1.0)._replace(every=5)
    assert paper.gradients(400) == pytest.approx(1.3)  # all refreshes are on its steps


def test_a_step_that_does_not_act_is_sgd_and_leaves_the_rest_of_the_state(batch):
    method = named("eigen_sam", 0.5, 1.0)
    tx, state = started(method, batch)
    loss = losses.training_loss(Tiny())
    sgd, plain = started(Setup("sgd"), batch)
    ours = training_steps.take_step(tx, loss, state, *batch, False, acts=False)
    theirs = training_steps.take_step(sgd, loss, plain, *batch, False)
    np.testing.assert_array_equal(flat(ours.params), flat(theirs.params))
    assert ours.radius_sum == 0
    jax.tree.map(np.testing.assert_array_equal, ours.opt_state[0], state.opt_state[0])
    acting = training_steps.take_step(tx, loss, state, *batch, True)
    assert np.abs(flat(acting.params) - flat(theirs.params)).max() > 1e-3


def test_parts_of_a_batch_are_perturbed_each_by_its_own_gradient(batch):
    method = Setup("sam", 0.5, parts=4)
    tx, state = started(method, batch)
    loss = losses.training_loss(Tiny())
    take_step = partial(training_steps.take_step, tx, loss, refresh=False, parts=4)
    after = jax.jit(take_step)(state, *batch)
    gradient = jax.jit(jax.grad(lambda p, x, y: loss(p, {}, x, y)[0]))
    means = []
    for part in range(4):
        own = tuple(x[4 * part : 4 * part + 4] for x in batch)
        epsilon = perturbation.sam(gradient(state.params, *own), 0.5).epsilon
        moved = jax.tree.map(jnp.add, state.params, epsilon)
        means.append(flat(gradient(moved, *own)))
    expected = flat(state.params) - 0.1 * np.mean(means, 0)
    np.testing.assert_allclose(flat(after.params), expected, atol=1e-6)
    whole = training_steps.take_step(
        started(method._replace(parts=1), batch)[0], loss, state, *batch, False
    )
    assert np.abs(flat(whole.params) - expected).max() > 1e-4


def test_the_direction_is_that_of_the_links_own_perturbation(batch):
    """What is measured is |cos| of the ε by which a step perturbs."""
    loss = losses.training_loss(Tiny())
    for method in (
        Setup("sam", 0.1),
        Setup("sam", 0.1, norms_only=True),
        Setup("asam", 0.1),
        named("eigen_sam", 0.1, 0.7),
        named("eigen_sam_paper", 0.1, 0.7),
        named("eigen_sam_paper", 0.1, 0.7)._replace(every=3),
    ):
        tx, state = started(method, batch)
        take_step = jax.jit(partial(training_steps.take_step, tx, loss, refresh=True))
        for _ in range(3):  # the secant has no v before the first
            state = take_step(state, *batch)

        @jax.jit
        def both(state, tx=tx, method=method):
            """ε, and the parameters where a step takes its second gradient."""
            grads = jax.grad(lambda p: loss(p, {}, *batch)[0])(state.params)
            of_state = state.params, state.opt_state
            epsilon = methods.perturbation_direction(method, grads, *of_state)
            updates, _ = tx.update(grads, *of_state[::-1], grad_fn=lambda p: p)
            return epsilon, jax.tree.map(lambda x: x / -0.1, updates)

        states = [state]
        if method.tracker:  # where λ is negative, a step leaves v out
            values = {"secant": {"moments": -jnp.ones(4)}}
            values["power_iteration"] = {"eigenvalue": -1.0, "residual": 0.0}
            opt_state = optax.tree.set(state.opt_state, **values[method.tracker])
            states.append(state._replace(opt_state=opt_state))
        for state in states:
            epsilon, moved = both(state)
            difference = flat(moved) - flat(state.params)
            cosine = difference @ flat(epsilon)
            cosine /= np.linalg.norm(difference) * np.linalg.norm(flat(epsilon))
            assert cosine > 1 - 1e-4, method


def test_norms_are_found_where_they_have_names_of_their_own():
    init = registry.model("efficientnet_lite0", 10).init
    variables = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    params = variables["params"]
    mask = jax.tree.leaves(methods.is_norm(params))
    inside = [
        x for x, is_in in zip(jax.tree.leaves(params), mask, strict=True) if is_in
    ]
    assert len(inside) == 2 * 49  # a scale and a bias for each of the convolutions
    assert all(x.ndim == 1 for x in inside)


def test_norms_are_those_of_the_network():
    images = jnp.zeros((1, 32, 32, 3))
    params = jax.eval_shape(models.NormCNN(10).init, jax.random.key(0), images)
    mask = methods.is_norm(params["params"])
    inside = {name for name, tree in mask.items() if all(jax.tree.leaves(tree))}
    assert inside == {"BatchNorm_0", "BatchNorm_1", "BatchNorm_2"}
    assert not any(jax.tree.leaves({k: v for k, v in mask.items() if k not in inside}))
