from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from problems import flatten

from eigensam_jax import tree_math
from eigensam_jax._update import rounding
from eigensam_jax.experiments.data import load as data
from eigensam_jax.experiments.registry import TRACKERS
from eigensam_jax.experiments.track import looks as following
from eigensam_jax.experiments.training import loop, losses, methods

STEPS, BATCH_SIZE, RHO, ALPHA, SEED = 8, 16, 0.1, 0.7, 1
LOOKS = following.look_steps(STEPS, STEPS)
RATE = 0.5
SETUPS = {
    "sam": methods.named("sam", RHO, ALPHA),
    **{name: methods.named("eigen_sam", RHO, ALPHA, name) for name in TRACKERS},
}
SETUPS["power_iteration"] = SETUPS["power_iteration"]._replace(
    num_products=2, update_interval=4
)
SETUPS["lanczos"] = SETUPS["lanczos"]._replace(num_products=2, update_interval=3)
SETUPS["ritz"] = SETUPS["ritz"]._replace(update_interval=3)
SLOW = ("lanczos", "secant_5")  # they look as "power_iteration" and "secant" do


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, images):
        dense = partial(nn.Dense, use_bias=False)  # two arrays: soon compiled
        return dense(3)(nn.tanh(dense(4)(images.reshape(len(images), -1))))


LOSS = losses.evaluation_loss(Tiny())


@jax.jit
def hessian(params, images, labels):
    flat, unravel = ravel_pytree(params)
    return jax.hessian(lambda x: LOSS(unravel(x), images, labels))(flat)


@cache
def tiny_dataset():
    """Three batches an epoch, and a rest."""
    keys = jax.random.split(jax.random.key(0), 4)
    return data.Dataset(
        jax.random.normal(keys[0], (60, 2, 2, 1)),
        jax.random.randint(keys[1], (60,), 0, 3),
        jax.random.normal(keys[2], (30, 2, 2, 1)),
        jax.random.randint(keys[3], (30,), 0, 3),
    )


@cache
def measure_and_tracked():
    """What is measured, and the v of it, compiled once."""
    tracked = following.make_tracked(Tiny(), tiny_dataset(), BATCH_SIZE, STEPS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(following, "make_tracked", lambda *_: tracked)
        args = Tiny(), tiny_dataset(), BATCH_SIZE, STEPS
        return following.make_measure(*args), tracked


@cache
def followed(name):
    """The points of a run; and the flat parameters and v that each was made from."""
    seen = []
    measure, tracked = measure_and_tracked()

    def spying(setup, state, start):
        v = None
        if setup.tracker and state.step < STEPS:
            v = flatten(tracked(setup, state).eigenvector)
        seen.append((flatten(state.params), v))
        return measure(setup, state, start)

    at = () if name == "sam" else LOOKS
    settings = loop.Settings(STEPS, BATCH_SIZE, RATE, (*at, STEPS))
    run = loop.make_run(Tiny(), tiny_dataset(), spying, settings)
    return list(run(SETUPS[name], SEED)), seen


@cache
def plain_loop(name):
    """Parameters before, batch and state after each step, by the tracker's own clock.

    And the parameters at the end, with no batch.
    """
    schedule = optax.cosine_decay_schedule(RATE, STEPS)
    tx = methods.make_optimizer(SETUPS[name], optax.sgd(schedule, momentum=0.9))
    dataset = tiny_dataset()

    @jax.jit
    def step(params, state, images, labels):
        value_fn = lambda p: LOSS(p, images, labels)
        grads = jax.grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        return jax.tree.map(jnp.add, params, updates), state

    init_key, key = jax.random.split(jax.random.key(SEED))
    params = Tiny().init(init_key, dataset.train_images[:1])["params"]
    state, order, steps = tx.init(params), np.arange(60), []
    for i in range(STEPS):
        if i % 3 == 0:
            key, order_key = jax.random.split(key)
            order = np.asarray(jax.random.permutation(order_key, order))
        chosen = order[BATCH_SIZE * (i % 3) : BATCH_SIZE * (i % 3 + 1)]
        batch = dataset.train_images[chosen], dataset.train_labels[chosen]
        before = params
        params, state = step(params, state, *batch)
        steps.append((before, batch, state[0]))
    return [*steps, (params, None, state[0])]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
        for name in TRACKERS
    ],
)
def test_a_look_is_at_the_v_that_its_step_perturbs_by(name):
    points, seen = followed(name)
    steps, dataset = plain_loop(name), tiny_dataset()
    whole = dataset.train_images, dataset.train_labels
    assert [point.step for point in points] == [*LOOKS, STEPS]
    radii = [state.info.perturbation_norm for _, _, state in steps[:-1]]
    for found, (flat, v) in zip(points, seen, strict=True):
        point = found.measurement
        params, batch, state = steps[found.step]
        radius = np.mean(radii[: found.step])
        np.testing.assert_allclose(found.radius, radius, rtol=1e-4)
        np.testing.assert_allclose(flat, flatten(params), rtol=1e-4, atol=1e-5)
        values, vectors = np.linalg.eigh(hessian(params, *whole))
        np.testing.assert_allclose(point["lambda_max"], values[-1], rtol=1e-3)
        assert point["lambda_max_residual"] < 2e-3 * values[-1]
        np.testing.assert_allclose(point["train_loss"], LOSS(params, *whole), rtol=1e-4)
        logits = Tiny().apply({"params": params}, dataset.test_images)
        correct = np.argmax(logits, -1) == np.asarray(dataset.test_labels)
        np.testing.assert_allclose(point["test_accuracy"], correct.mean(), rtol=1e-6)
        if batch is None:
            assert v is None
            assert not {"ratio", "cosine"} & set(point)
            continue
        rayleigh = v @ (vectors * values) @ (vectors.T @ v)
        # The tolerance of λ_max is the limit of these two.
        np.testing.assert_allclose(point["ratio"], rayleigh / values[-1], rtol=2e-3)
        np.testing.assert_allclose(point["cosine"], abs(v @ vectors[:, -1]), atol=1e-2)
        # The radius and the alignment of the step, from this v.
        g = flatten(jax.grad(LOSS)(params, *batch))
        u = g / np.linalg.norm(g)
        alpha = ALPHA * (point["tracked_eigenvalue"] + point["tracked_residual"] >= 0)
        epsilon = RHO * (u + alpha * np.sign(g @ v) * (v - (u @ v) * u))
        norm = np.linalg.norm(epsilon)
        np.testing.assert_allclose(state.info.perturbation_norm, norm, rtol=1e-4)
        np.testing.assert_allclose(
            state.info.alignment, abs(epsilon @ v) / norm, rtol=1e-3, atol=1e-4
        )


def test_own_batch_is_the_top_eigenvector_of_the_steps_batch():
    points, seen = followed("own_batch")
    for found, (_, v) in zip(points[:-1], seen[:-1], strict=True):
        params, batch, _ = plain_loop("own_batch")[found.step]
        point = found.measurement
        values, vectors = np.linalg.eigh(hessian(params, *batch))
        assert abs(v @ vectors[:, -1]) > 0.995
        np.testing.assert_allclose(point["tracked_eigenvalue"], values[-1], rtol=5e-3)
        assert point["tracked_residual"] < 0.1 * values[-1]


def test_every_product_averages_the_products_of_all_batches():
    points, seen = followed("every_product")
    steps = plain_loop("every_product")
    v, expected = None, []
    for params, batch, _ in steps[:-1]:
        start = rounding.spread_like(tree_math.zeros_like(params), jnp.int32(0))
        of = flatten(start) if v is None else v
        product = np.asarray(hessian(params, *batch)) @ of
        v = 0.95 * (0 if v is None else v) + 0.05 * product / np.linalg.norm(product)
        v /= np.linalg.norm(v)
        expected.append(v)
    for point, (_, v) in zip(points[:-1], seen[:-1], strict=True):
        np.testing.assert_allclose(v, expected[point.step], atol=1e-4)


def test_sam_has_a_radius_and_no_v():
    points, seen = followed("sam")
    assert [point.step for point in points] == [STEPS]
    np.testing.assert_allclose(points[0].radius, RHO, rtol=1e-5)
    expected = flatten(plain_loop("sam")[-1][0])
    np.testing.assert_allclose(seen[0][0], expected, rtol=1e-4, atol=1e-6)
    record = following.summarise(points)
    assert not {"ratio", "worst_ratio", "cosine", "curves"} & set(record)


def test_the_figures_of_a_run_are_of_its_end_and_of_its_looks():
    points, _ = followed("secant")
    record = following.summarise(points)
    assert record["lambda_max"] == points[-1].measurement["lambda_max"]
    ratios = [point.measurement["ratio"] for point in points[:-1]]
    assert record["curves"]["ratio"] == ratios
    np.testing.assert_allclose(record["ratio"], np.mean(ratios))
    assert record["worst_ratio"] == min(ratios)


def test_a_loss_that_is_not_finite_is_said():
    dataset = tiny_dataset()
    dataset = dataset._replace(train_images=jnp.nan * dataset.train_images)
    measure = following.make_measure(Tiny(), dataset, BATCH_SIZE, STEPS)
    settings = loop.Settings(STEPS, BATCH_SIZE, RATE, (STEPS,))
    run = loop.make_run(Tiny(), dataset, measure, settings)
    with pytest.raises(loop.DivergedError, match="the training loss is nan"):
        list(run(SETUPS["sam"], SEED))


@pytest.mark.parametrize("name", TRACKERS)
def test_a_spec_says_what_its_tracker_does(name):
    spec, calls = TRACKERS[name], []
    spectrum = jnp.linspace(1.0, 2.0, 40)

    def matvec(v):
        jax.debug.callback(lambda: calls.append(None))
        return spectrum * v

    tracker = spec.make(spec.num_matvecs, spec.update_interval)
    assert tracker.refresh_interval in (None, spec.update_interval)
    assert (tracker.refresh_interval is None) == (spec.num_matvecs == 0)

    @jax.jit
    def refreshed():
        state = tracker.init(spectrum)
        if name == "ritz":  # which has no v to multiply before it has observed
            state = tracker.observe(state, spectrum, None, None)
        return tracker.refresh(state, matvec)

    jax.block_until_ready(refreshed())
    jax.effects_barrier()
    assert len(calls) == spec.num_matvecs
    assert tracker.observe_interval in (None, 1, spec.update_interval)


def test_products_are_counted_for_100_steps():
    products = {name: spec.products for name, spec in TRACKERS.items()}
    assert products["power_iteration"] == products["lanczos"] == 5
    assert products["secant"] == products["secant_5"] == 0
    assert products["every_product"] == 100
    assert products["own_batch"] == 1000
    assert TRACKERS["secant_5"].update_interval == 5  # as its name says


def test_looks_are_spread_over_the_last_85_percent():
    steps = following.look_steps(1200, 10)
    assert steps == (180, 293, 406, 520, 633, 746, 859, 973, 1086, 1199)
    assert following.look_steps(2, 10) == (0, 1)
    assert following.look_steps(1, 10) == (0,)
