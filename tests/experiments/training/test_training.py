import functools

import jax
import numpy as np
import optax
import pytest

from eigensam_jax import eigen_sam, sam, trackers
from eigensam_jax.experiments import registry
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.training import loop as training
from eigensam_jax.experiments.training import losses, measures, methods

STEPS = 4 * 8
SETTINGS = training.Settings(
    steps=STEPS, batch_size=64, learning_rate=0.05, looks=(0, STEPS // 2, STEPS)
)
AT_THE_END = SETTINGS._replace(looks=(STEPS,))
METHODS = {name: methods.named(name, 0.1, 0.5) for name in registry.METHODS}


@pytest.fixture(scope="module")
def digits():
    """The first 512 training images, 8 steps an epoch."""
    digits = registry.dataset("digits")
    return digits._replace(
        train_images=digits.train_images[:512], train_labels=digits.train_labels[:512]
    )


@pytest.fixture(scope="module")
def measured(digits):
    """By its name, a network and what measures it, compiled once."""

    @functools.cache
    def of(name):
        model = registry.model(name, digits.num_classes)
        return model, measures.make_measure(model, digits, 64, 2_000)

    return of


@pytest.fixture(
    scope="module", params=["mlp", pytest.param("cnn", marks=pytest.mark.slow)]
)
def network(request, measured):
    return measured(request.param)


@pytest.fixture(scope="module")
def mlp(measured):
    return measured("mlp")


@pytest.fixture(scope="module")
def train(digits, network):
    """Runs with the settings above, each method compiled once."""
    return training.make_run(network[0], digits, network[1], SETTINGS)


def run(digits, network, method, *, settings=SETTINGS, seed=0):
    return list(
        training.make_run(network[0], digits, network[1], settings)(method, seed)
    )


def test_a_run_learns_and_starts_where_the_others_do(train):
    names = ("sgd", "sam", "eigen_sam", "eigen_sam_paper")
    runs = {name: list(train(METHODS[name], 0)) for name in names}
    for points in runs.values():
        assert [p.step for p in points] == [0, STEPS // 2, STEPS]
        first, last = points[0].measurement, points[-1].measurement
        assert first == runs["sgd"][0].measurement._replace(alignment=first.alignment)
        assert last.train_loss < 0.75 * first.train_loss
        assert last.test_accuracy > 0.6
        assert last.lambda_max_residual < 5e-3 * last.lambda_max
        assert points[-1].progress.seconds > 0
    assert runs["sgd"][-1].radius == 0
    np.testing.assert_allclose(runs["sam"][-1].radius, 0.1, rtol=1e-5)
    for name in names[2:]:
        assert 0.1 < runs[name][-1].radius <= 0.1 * np.sqrt(1 + 0.5**2)
    losses = {p[-1].measurement.train_loss for p in runs.values()}
    assert len(losses) == 4


def plain_loop(digits, model, link, descent, seed):
    """The training loss after a loop in which the tracker, if any, decides."""
    loss, tx = losses.evaluation_loss(model), optax.chain(link, descent)

    @jax.jit
    def step(params, state, images, labels):
        value_fn = lambda p: loss(p, images, labels)
        grads = jax.grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    init_key, key = jax.random.split(jax.random.key(seed))
    params = model.init(init_key, digits.train_images[:1])["params"]
    state, order = tx.init(params), np.arange(512)
    for _ in range(4):
        key, order_key = jax.random.split(key)
        order = jax.random.permutation(order_key, order)
        for i in range(8):
            batch = order[64 * i : 64 * (i + 1)]
            params, state = step(
                params, state, digits.train_images[batch], digits.train_labels[batch]
            )
    return loss(params, digits.train_images, digits.train_labels)


def test_fixing_the_refresh_is_the_trackers_own_schedule(digits, mlp):
    method = METHODS["eigen_sam_paper"]._replace(update_interval=10)
    points = run(digits, mlp, method, settings=AT_THE_END, seed=1)
    link = eigen_sam(0.1, 0.5, trackers.power_iteration(5, 10))
    descent = optax.sgd(optax.cosine_decay_schedule(0.05, STEPS), momentum=0.9)
    expected = plain_loop(digits, mlp[0], link, descent, seed=1)
    np.testing.assert_allclose(points[-1].measurement.train_loss, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "base", "make"),
    [
        ("sam", "adamw", lambda rate: optax.adamw(rate, weight_decay=0.3)),
        ("adamw", "sgd", lambda rate: optax.adamw(rate, weight_decay=0.3)),
        (
            "sam",
            "sgd",
            lambda rate: optax.chain(
                optax.add_decayed_weights(0.3), optax.sgd(rate, momentum=0.9)
            ),
        ),
    ],
)
def test_the_base_optimizer_is_the_one_that_is_named(name, base, make, digits, mlp):
    settings = AT_THE_END._replace(learning_rate=0.003, base=base, weight_decay=0.3)
    points = run(digits, mlp, METHODS[name], settings=settings, seed=2)
    link = sam(0.1) if name == "sam" else optax.identity()
    descent = make(optax.cosine_decay_schedule(0.003, STEPS))
    link = optax.with_extra_args_support(link)
    expected = plain_loop(digits, mlp[0], link, descent, seed=2)
    np.testing.assert_allclose(points[-1].measurement.train_loss, expected, rtol=1e-4)


def test_a_run_is_determined_by_its_seed(train):
    one, two, other = (list(train(METHODS["eigen_sam"], seed)) for seed in (0, 0, 1))
    assert [p.measurement for p in one] == [p.measurement for p in two]
    assert one[-1].measurement != other[-1].measurement


def test_a_run_that_diverges_ends_with_what_to_do(digits, mlp):
    settings = SETTINGS._replace(learning_rate=1e30)
    with pytest.raises(UserError, match=r"sgd, seed 0: .* lower the learning rate"):
        run(digits, mlp, METHODS["sgd"], settings=settings)


def test_there_are_never_more_evaluations_than_steps():
    assert training.evaluation_steps(100, 4) == (0, 25, 50, 75, 100)
    assert training.evaluation_steps(2, 20) == (0, 1, 2)
