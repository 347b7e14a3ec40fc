"""Training that carries running statistics, and draws at random in every step."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from problems import dense_hessian

from eigensam_jax import sam, tree_math
from eigensam_jax._update import rounding
from eigensam_jax.experiments import cli, entries, registry
from eigensam_jax.experiments.data import load as data
from eigensam_jax.experiments.data.augmentation import crop_and_flip
from eigensam_jax.experiments.models import resnet, vit
from eigensam_jax.experiments.models import small as models
from eigensam_jax.experiments.records import checkpoints
from eigensam_jax.experiments.training import loop as training
from eigensam_jax.experiments.training import losses, measures, methods
from eigensam_jax.experiments.training.steps import TrainState

STEPS = 3 * 3
LARGE = ("efficientnet_lite0", "resnet18", "vit")
SETTINGS = training.Settings(
    steps=STEPS,
    batch_size=16,
    learning_rate=0.05,
    looks=(0, 3, 6, 9),
    augment=crop_and_flip,
)


class Tiny(nn.Module):
    num_classes: int = 3

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dense(4)(images.reshape(len(images), -1))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.8)(x)
        return nn.Dense(self.num_classes)(nn.tanh(x))


@pytest.fixture(scope="module")
def dataset():
    """Three batches an epoch, and a rest."""
    keys = jax.random.split(jax.random.key(0), 4)
    return data.Dataset(
        jax.random.normal(keys[0], (50, 3, 3, 1)) + 1,
        jax.random.randint(keys[1], (50,), 0, 3),
        jax.random.normal(keys[2], (30, 3, 3, 1)) + 1,
        jax.random.randint(keys[3], (30,), 0, 3),
    )


def look(method, state, looks):
    """All that there is to see, copied."""
    del method
    looks = jnp.zeros(()) if looks is None else looks + 1
    return jax.tree.map(np.array, (state.params, state.batch_stats)), looks


@pytest.fixture(scope="module")
def run(dataset):
    return partial(
        training.make_run(Tiny(), dataset, look, SETTINGS), methods.Setup("sam", 0.1)
    )


def test_steps_are_those_of_a_plain_loop(dataset, run):
    """Statistics move by the clean pass alone; both passes see the same images."""
    *_, end = run(1)
    model = Tiny()
    schedule = optax.cosine_decay_schedule(0.05, STEPS)
    tx = optax.chain(sam(0.1), optax.sgd(schedule, momentum=0.9))

    @jax.jit
    def step(params, stats, opt_state, images, labels):
        def loss(params):
            variables = {"params": params, "batch_stats": stats}
            logits, new = model.apply(
                variables, images, train=True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), new["batch_stats"]

        grads, new = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(
            grads, opt_state, params, value_fn=lambda p: loss(p)[0]
        )
        return optax.apply_updates(params, updates), new, opt_state

    init_key, key = jax.random.split(jax.random.key(1))
    variables = model.init(init_key, dataset.train_images[:1])
    params, stats = variables["params"], variables["batch_stats"]
    opt_state, order, seen = tx.init(params), jnp.arange(50), []
    for i in range(STEPS):
        if i % 3 == 0:
            key, order_key = jax.random.split(key)
            order = jax.random.permutation(order_key, order)
        batch = order[16 * (i % 3) : 16 * (i % 3 + 1)]
        drawn = jax.random.fold_in(jax.random.fold_in(key, 2), i)
        images = crop_and_flip(drawn, dataset.train_images[batch])
        seen.append(jax.random.key_data(drawn).tobytes())
        params, stats, opt_state = step(
            params, stats, opt_state, images, dataset.train_labels[batch]
        )
    assert len(set(seen)) == STEPS
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-4),
        end.measurement,
        (params, stats),
    )


def test_a_run_that_goes_on_is_the_same_to_the_last_bit(run, tmp_path):
    points = iter(run(0))
    for _ in range(2):
        state = training.serialization.to_state_dict(next(points).progress)
    checkpoints.write(tmp_path / "kept", {"run": state})
    *_, once = points
    *_, again = run(0, checkpoints.read(tmp_path / "kept")["run"])
    assert once.step == again.step == STEPS
    jax.tree.map(np.testing.assert_array_equal, once.measurement, again.measurement)


def test_a_tracker_follows_the_hessian_of_evaluation(dataset):
    """A power iteration by running statistics on the batch, as in the paper's code."""
    settings = SETTINGS._replace(augment=None, looks=tuple(range(STEPS + 1)))
    keep = lambda method, state, before: (jax.tree.map(np.array, state), None)
    train = training.make_run(Tiny(), dataset, keep, settings)
    points = train(
        methods.named("eigen_sam_paper", 0.1, 0.2)._replace(num_products=1), 0
    )
    start, after = next(points).measurement, next(points).measurement
    found = ravel_pytree(optax.tree.get(after.opt_state, "eigenvector"))[0]
    # Where the first refresh starts, as there is no v yet.
    before = tree_math.zeros_like(start.params)
    before = ravel_pytree(rounding.spread_like(before, jnp.int32(0)))[0]
    before /= np.linalg.norm(before)
    first, stats = after.order[:16], start.batch_stats
    batch = dataset.train_images[first], dataset.train_labels[first]
    evaluation, training_loss = (
        make(Tiny()) for make in (losses.evaluation_loss, losses.training_loss)
    )
    ours, other = (
        dense_hessian(value_fn, start.params) @ before
        for value_fn in (
            lambda p: evaluation(p, *batch, stats),
            lambda p: training_loss(p, stats, *batch)[0],
        )
    )
    np.testing.assert_allclose(found, ours / np.linalg.norm(ours), atol=1e-5)
    assert found @ other < 0.9 * np.linalg.norm(other)
    found = optax.tree.get(after.opt_state, "eigenvalue")
    np.testing.assert_allclose(found, before @ ours, rtol=1e-4)


def test_a_network_is_measured_in_evaluation(dataset):
    """Loss, accuracy and Hessian by running statistics, the perturbation by a batch."""
    model = Tiny()
    variables = model.init(jax.random.key(2), dataset.train_images[:1])
    params = variables["params"]
    stats = jax.tree.map(lambda x: 1.5 * x + 0.5, variables["batch_stats"])

    @partial(jax.jit, static_argnames="train")
    def mean(params, images, labels, train=False):
        logits, _ = model.apply(
            {"params": params, "batch_stats": stats},
            images,
            train=train,
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    batch = dataset.train_images, dataset.train_labels
    value_fn = lambda p: mean(p, *batch)
    measure = measures.make_measure(model, dataset, 16, 2_000)
    state = TrainState(params, (), None, jnp.arange(50), None, None, stats)
    found, top = measure(methods.Setup("sgd"), state, None)
    dense = dense_hessian(value_fn, params)
    values, vectors = np.linalg.eigh(dense)
    np.testing.assert_allclose(found.train_loss, value_fn(params), rtol=1e-5)
    np.testing.assert_allclose(found.lambda_max, values[-1], rtol=1e-4)
    assert abs(ravel_pytree(top)[0] @ vectors[:, -1]) > 1 - 1e-4
    logits = model.apply({"params": params, "batch_stats": stats}, dataset.test_images)
    accuracy = np.mean(np.argmax(logits, -1) == np.asarray(dataset.test_labels))
    np.testing.assert_allclose(found.test_accuracy, accuracy, rtol=1e-6)
    gradient, cosines = jax.jit(jax.grad(partial(mean, train=True))), []
    for i in range(3):
        part = slice(16 * i, 16 * (i + 1))
        g = gradient(params, batch[0][part], batch[1][part])
        g = np.asarray(ravel_pytree(g)[0])
        cosines.append(abs(g @ vectors[:, -1]) / np.linalg.norm(g))
    np.testing.assert_allclose(found.alignment, np.mean(cosines), rtol=1e-3)


def test_products_are_of_the_network_in_evaluation(dataset):
    variables = Tiny().init(jax.random.key(2), dataset.train_images[:1])
    params = variables["params"]
    stats = jax.tree.map(lambda x: 1.5 * x + 0.5, variables["batch_stats"])
    loss = losses.evaluation_loss(Tiny())
    batch = dataset.train_images, dataset.train_labels
    product = measures.make_matvec(loss)(params, *batch, stats)
    value_fn = lambda p: loss(p, dataset.train_images, dataset.train_labels, stats)
    flat, unravel = ravel_pytree(params)
    vector = jnp.arange(1.0, 1 + len(flat))
    expected = dense_hessian(value_fn, params) @ vector
    ours = ravel_pytree(product(unravel(vector)))[0]
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param(name, shape, marks=pytest.mark.slow if is_slow else ())
        for name, model in registry.MODELS.items()
        if model.kind == "images"
        for shape in ((8, 8, 1), (28, 28, 1), (32, 32, 3))
        for is_slow in [name in LARGE and shape == (28, 28, 1)]  # between the others
    ],
)
def test_every_network_takes_every_data_set(name, shape):
    model, images = registry.model(name, 7), jnp.zeros((2, *shape))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert jax.eval_shape(model.apply, variables, images).shape == (2, 7)
    loss = losses.training_loss(model)
    stats = variables.get("batch_stats", {})
    with_norms = ("norm_cnn", "resnet18", "efficientnet_lite0")
    assert bool(stats) == (name in with_norms) == registry.MODELS[name].batch_norm
    labels = jnp.zeros(2, jnp.int32)
    value, new = jax.eval_shape(loss, variables["params"], stats, images, labels)
    assert value.shape == ()
    assert jax.tree.structure(new) == jax.tree.structure(stats)


def test_cnn6_has_six_layers():
    variables = jax.eval_shape(
        models.CNN6(10).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))
    )
    kernels = [layer["kernel"].shape for layer in variables["params"].values()]
    assert [shape[-1] for shape in kernels] == [24, 48, 48, 64, 64, 10]
    assert kernels[-1] == (4 * 4 * 64, 10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "compare --optimizers eigen_sam --curvature-examples 64",
        "spectrum --examples 64",
    ],
)
@pytest.mark.parametrize("model", ["resnet18", "vit"])
def test_the_commands_take_large_networks(command, model, tmp_path, monkeypatch):
    few = tuple(array[:256] for array in registry.DATASETS["digits"].read(None))
    source = entries.DataSource(lambda folder: few)
    monkeypatch.setitem(registry.DATASETS, "digits", source)
    monkeypatch.setattr(resnet, "_STAGES", ((8, 2),))  # soon compiled
    small = entries.Network(lambda n: vit.ViT(n, width=8, depth=1, heads=2))
    monkeypatch.setitem(registry.MODELS, "vit", small)
    options = ["--smoke", "--model", model, "--out", str(tmp_path)]
    assert cli.main([*command.split(), *options]) == 0
    assert (tmp_path / "results.json").exists()
