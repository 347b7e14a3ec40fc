"""A campaign of faults: what a step may be handed, at random, and what must survive.

A network with batch normalisation trains while gradients that are not finite, zero,
huge or denormal are thrown in: in the clean pass, in the perturbed pass and in the
Hessian-vector product.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from links import LINKS

from eigensam_jax import tree_math

# Of all trackers, single bad batches are in test_tracking.py.
SLOW = ("asam", "secant_2", "lanczos", "ritz")
FACTORS = jnp.array([1.0, jnp.nan, jnp.inf, -jnp.inf, 0.0, 1e30, -1e30, 1e-40])
RUNS, STEPS, FAULTS = 20, 60, 8  # 20 runs with 8 faults, of 7 links: 1,120 injections


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, momentum=0.9)(nn.Dense(8)(x))
        return nn.Dense(3)(nn.tanh(x))


def batches(seed):
    """Three classes around three centres, other examples for each seed."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, (STEPS, 16))
    inputs = np.eye(3, 5)[labels] + rng.normal(size=(STEPS, 16, 5))
    return jnp.asarray(inputs, jnp.float32), jnp.asarray(labels)


def without_info(state):
    return state[0]._replace(info=()), *state[1:]


def trained(tx):
    """`run(batches, factors)`; factors has a column for each of the three places."""
    network = Network()

    def loss(params, stats, batch, factor):
        logits, new = network.apply(
            {"params": params, "batch_stats": stats}, batch[0], mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        return factor * losses.mean(), new["batch_stats"]

    def step(carry, given):
        params, stats, state = carry
        batch, (clean, perturbed, product) = given
        grads, new_stats = jax.grad(loss, has_aux=True)(params, stats, batch, clean)
        updates, state = tx.update(
            grads,
            state,
            params,
            value_fn=lambda p: loss(p, stats, batch, perturbed)[0],
            curvature_fn=lambda p: loss(p, stats, batch, product)[0],
        )
        params = optax.apply_updates(params, updates)
        # All but what says what the last step did: of a bad batch, NaN is the truth.
        kept = params, new_stats, without_info(state)
        finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(kept)]
        return (params, new_stats, state), jnp.all(jnp.stack(finite))

    @jax.jit
    def run(batches, factors):
        variables = network.init(jax.random.key(0), batches[0][0])
        params, stats = variables["params"], variables["batch_stats"]
        carry = params, stats, tx.init(params)
        carry, finite = jax.lax.scan(step, carry, (batches, factors))
        whole = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)
        return carry[2], finite, loss(carry[0], carry[1], whole, 1.0)[0]

    return run


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[pytest.mark.slow] if x in SLOW else []) for x in LINKS],
)
def test_training_goes_on_after_faults_of_all_kinds(name):
    """The recipe: after the link, clip, and skip what is not finite."""
    tx = optax.chain(
        LINKS[name](),
        optax.clip_by_global_norm(1.0),
        optax.apply_if_finite(optax.sgd(0.1, momentum=0.9), 100),
    )
    run = trained(tx)
    rng = np.random.default_rng(0)
    losses = np.empty((RUNS, 2))
    for seed in range(RUNS):
        data = batches(seed)
        places = 3 if name not in ("sam", "asam") else 2
        kinds = np.zeros((STEPS, 3), int)
        where = rng.choice((STEPS - 1) * places, FAULTS, replace=False)
        kinds[where // places, where % places] = rng.integers(1, len(FACTORS), FAULTS)
        state, finite, losses[seed, 1] = run(data, FACTORS[kinds])
        assert finite.all()
        assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(state))
        v = optax.tree.get(state, "eigenvector")
        if v is not None:
            np.testing.assert_allclose(tree_math.norm(v), 1, rtol=1e-5)
        *_, losses[seed, 0] = run(data, jnp.ones((STEPS, 3)))
    clean, faulty = losses.T
    assert clean.mean() < 0.9  # it learns: a guess has log 3 = 1.1
    assert abs((faulty - clean).mean()) < clean.std(ddof=1)
