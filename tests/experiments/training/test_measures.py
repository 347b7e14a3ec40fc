from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from problems import dense_hessian
from scipy.sparse import linalg

from eigensam_jax import eigen_sam, trackers
from eigensam_jax.experiments.data import load as data
from eigensam_jax.experiments.training import losses, measures, methods
from eigensam_jax.experiments.training.steps import TrainState


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.Dense(3)(nn.tanh(nn.Dense(4)(images.reshape(len(images), -1))))


@pytest.fixture
def problem():
    keys = jax.random.split(jax.random.key(0), 5)
    dataset = data.Dataset(
        jax.random.normal(keys[0], (60, 2, 2, 1)),
        jax.random.randint(keys[1], (60,), 0, 3),
        jax.random.normal(keys[2], (30, 2, 2, 1)),
        jax.random.randint(keys[3], (30,), 0, 3),
    )
    model = Tiny()
    params = model.init(keys[4], dataset.train_images)["params"]
    return model, dataset, params


def top_of(loss, params, batch, start=None):
    matvec = measures.make_matvec(loss)(params, *batch)
    return measures.top_eigenpair(matvec, params, start, measures.CURVATURE_TOLERANCE)


def test_the_top_eigenpair_is_that_of_the_dense_hessian(problem):
    model, dataset, params = problem
    loss = losses.evaluation_loss(model)
    batch = dataset.train_images, dataset.train_labels
    top = top_of(loss, params, batch)
    dense = dense_hessian(lambda p: loss(p, *batch), params)
    values, vectors = np.linalg.eigh(dense)
    np.testing.assert_allclose(top.eigenvalue, values[-1], rtol=1e-4)
    v = ravel_pytree(top.eigenvector)[0]
    assert abs(v @ vectors[:, -1]) > 1 - 1e-4
    assert top.residual < 2 * measures.CURVATURE_TOLERANCE * top.eigenvalue
    error = np.linalg.norm(dense @ v - top.eigenvalue * v)
    np.testing.assert_allclose(top.residual, error, rtol=0.05)
    again = top_of(loss, params, batch, top.eigenvector)
    np.testing.assert_allclose(again.eigenvalue, top.eigenvalue, rtol=1e-4)


def test_a_negative_curvature_is_not_taken_for_the_top(problem):
    model, dataset, params = problem
    loss = losses.evaluation_loss(model)
    minus = lambda p, x, y, stats=None: -loss(p, x, y, stats)
    batch = dataset.train_images, dataset.train_labels
    values = np.linalg.eigvalsh(dense_hessian(lambda p: minus(p, *batch), params))
    assert -values[0] > 1.5 * values[-1]  # by magnitude it would be the other end
    top = top_of(minus, params, batch)
    np.testing.assert_allclose(top.eigenvalue, values[-1], rtol=1e-3)


def test_a_hessian_of_zeros_is_said(problem):
    _, dataset, params = problem
    flat = lambda p, x, *_: sum(map(jnp.sum, jax.tree.leaves(p))) * jnp.sum(x)
    with pytest.raises(FloatingPointError, match="λ_max is not found"):
        top_of(flat, params, (dataset.train_images, dataset.train_labels))


def test_the_top_eigenpair_is_arpacks(problem):
    """By another library, in float64."""
    model, dataset, params = problem
    loss = losses.evaluation_loss(model)
    batch = dataset.train_images, dataset.train_labels
    with jax.enable_x64(True):
        images, wide = jax.tree.map(jnp.float64, (dataset.train_images, params))
        dense = dense_hessian(lambda p: loss(p, images, batch[1]), wide)
    assert dense.dtype == np.float64
    values, vectors = linalg.eigsh(np.asarray(dense), k=1, which="LA")
    top = top_of(loss, params, batch)
    np.testing.assert_allclose(top.eigenvalue, values[0], rtol=1e-4)
    assert abs(ravel_pytree(top.eigenvector)[0] @ vectors[:, 0]) > 1 - 1e-4


@pytest.mark.parametrize("name", ["sgd", "eigen_sam"])
def test_measure_against_a_naive_computation(problem, name, monkeypatch):
    monkeypatch.setattr(measures, "_CHUNK", 7)  # so that chunks are of unequal size
    monkeypatch.setattr(measures, "CHUNK", 7)
    model, dataset, params = problem
    loss = losses.evaluation_loss(model)
    value_fn = lambda p: loss(p, dataset.train_images, dataset.train_labels)
    tx, alpha = optax.identity(), 0.7
    if name == "eigen_sam":
        tx = eigen_sam(0.1, alpha, trackers.power_iteration(num_matvecs=3))
    opt_state = tx.init(params)
    if name == "eigen_sam":
        grads = jax.jit(jax.grad(value_fn))(params)
        update = jax.jit(partial(tx.update, value_fn=value_fn))
        _, opt_state = update(grads, opt_state, params)
    order = jax.random.permutation(jax.random.key(1), 60)
    measure = measures.make_measure(model, dataset, 16, 2_000)
    state = TrainState(params, opt_state, None, order, None, None, {})
    result, start = measure(methods.named(name, 0.1, alpha), state, None)

    np.testing.assert_allclose(result.train_loss, value_fn(params), rtol=1e-5)
    logits = model.apply({"params": params}, dataset.test_images)
    accuracy = np.mean(np.argmax(logits, -1) == np.asarray(dataset.test_labels))
    np.testing.assert_allclose(result.test_accuracy, accuracy, rtol=1e-6)
    test_loss = loss(params, dataset.test_images, dataset.test_labels)
    np.testing.assert_allclose(result.test_loss, test_loss, rtol=1e-5)
    assert result.held_loss is None  # this data set holds nothing out
    values, vectors = np.linalg.eigh(dense_hessian(value_fn, params))
    np.testing.assert_allclose(result.lambda_max, values[-1], rtol=1e-4)
    cosines = []
    for i in range(3):  # 60 examples are three batches of 16, and a rest
        batch = order[16 * i : 16 * (i + 1)]
        g = jax.jit(jax.grad(loss))(
            params, dataset.train_images[batch], dataset.train_labels[batch]
        )
        g = np.asarray(ravel_pytree(g)[0])
        epsilon = u = g / np.linalg.norm(g)
        if name == "eigen_sam":
            assert opt_state.tracker.eigenvalue > 0
            v = np.asarray(ravel_pytree(opt_state.tracker.eigenvector)[0])
            epsilon = u + alpha * np.sign(g @ v) * (v - (u @ v) * u)
        cosines.append(abs(epsilon @ vectors[:, -1]) / np.linalg.norm(epsilon))
    np.testing.assert_allclose(result.alignment, np.mean(cosines), rtol=1e-3)
    assert abs(ravel_pytree(start)[0] @ vectors[:, -1]) > 1 - 1e-4
    assert jnp.isfinite(jnp.array(jax.tree.leaves(result))).all()
