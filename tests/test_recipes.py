"""The recipes of notebooks/composing.md, each against what it stands for."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformer
from jax.flatten_util import ravel_pytree
from links import LINKS
from meshes import AXIS, DEVICES
from optax.microbatching import AccumulationType, microbatch
from problems import mask_by_path, network

from eigensam_jax import eigen_sam, info, perturbation, sam, trackers, tree_math

NAMES = ("sam", "secant", "power_iteration", "lanczos", "ritz")
each_link = pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            x, marks=[] if x in ("secant", "power_iteration") else [pytest.mark.slow]
        )
        for x in NAMES
    ],
)
each_or_slow = pytest.mark.parametrize(
    "name", ["secant", pytest.param("power_iteration", marks=[pytest.mark.slow])]
)
# Whose v does not depend on how the parameters are laid out in leaves.
without_random_start = pytest.mark.parametrize(
    "name", [pytest.param("sam", marks=pytest.mark.slow), "secant"]
)
EIGEN = [name for name in NAMES if name != "sam"]


def train(tx, params, make_value_fn, steps=4, make_grad_fn=None):
    """Jitted steps with `make_value_fn(step)` and, if given, `make_grad_fn(step)`."""

    @jax.jit
    def step(params, state, index):
        value_fn = make_value_fn(index)
        grad_fn = make_grad_fn(index) if make_grad_fn else None
        grads = (grad_fn or jax.grad(value_fn))(params)
        updates, state = tx.update(
            grads, state, params, value_fn=value_fn, grad_fn=grad_fn
        )
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(steps):
        params, state = step(params, state, jnp.int32(i))
    return params, state


def assert_same_run(run, other):
    """Parameters and eigenvectors to rounding."""
    (params, state), (expected, expected_state) = run, other
    chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=2e-6)
    v = optax.tree.get(expected_state, "eigenvector")
    if v is not None:
        chex.assert_trees_all_close(
            optax.tree.get(state, "eigenvector"), v, rtol=1e-4, atol=2e-4
        )


# --- gradient accumulation ------------------------------------------------------------


def wide_network(examples, width=64):
    keys = jax.random.split(jax.random.key(3), 4)
    params = {
        "in": jax.random.normal(keys[0], (16, width)) / 4,
        "out": jax.random.normal(keys[1], (width, 4)) / 8,
    }
    inputs = jax.random.normal(keys[2], (examples, 16))
    return params, (inputs, jax.random.randint(keys[3], (examples,), 0, 4))


def wide_loss(params, batch):
    logits = jnp.tanh(batch[0] @ params["in"]) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def accumulated(batch, size):
    """The recipe: a gradient that goes through the batch in parts of `size`."""
    mean_grad = microbatch(jax.grad(wide_loss), 1, size, AccumulationType.RUNNING_MEAN)
    return lambda params: mean_grad(params, batch)


@each_link
def test_accumulation_is_the_step_on_the_whole_batch(name):
    params, batch = wide_network(96)
    tx = optax.chain(LINKS[name](), optax.sgd(0.1))
    whole = train(tx, params, lambda _: lambda p: wide_loss(p, batch))
    parts = train(
        tx, params, lambda _: None, make_grad_fn=lambda _: accumulated(batch, 16)
    )
    assert_same_run(parts, whole)


@each_or_slow
def test_memory_does_not_grow_with_the_number_of_micro_batches(name):
    def measured(num, in_parts):
        """Bytes of temporary memory, and of the batch."""
        params, batch = wide_network(64 * num, width=1024)
        tx = LINKS[name]()

        def step(params, state, batch):
            grad_fn = lambda p: jax.grad(wide_loss)(p, batch)
            if in_parts:
                grad_fn = accumulated(batch, 64)
            return tx.update(grad_fn(params), state, params, grad_fn=grad_fn)

        compiled = jax.jit(step).lower(params, tx.init(params), batch).compile()
        memory = compiled.memory_analysis().temp_size_in_bytes
        return memory, sum(x.nbytes for x in batch)

    few, few_examples = measured(4, True)
    many, many_examples = measured(32, True)
    # The batch in the order of its parts, for either gradient; and no activations.
    assert many - few <= 2 * (many_examples - few_examples)
    assert measured(32, False)[0] > 4 * many


def test_parts_with_masks_of_their_own_and_running_statistics():
    """The recipe, in linen, against a loop in Python."""

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False, momentum=0.9)(nn.Dense(8)(x))
            return nn.Dense(4)(nn.Dropout(0.5, deterministic=False)(nn.tanh(x)))

    batch, model = wide_network(64)[1], Network()
    keys = jax.random.split(jax.random.key(5), 4)
    start = model.init({"params": keys[0], "dropout": keys[0]}, batch[0])
    params, old_stats = start["params"], start["batch_stats"]

    def loss(params, stats, batch, key):
        variables = {"params": params, "batch_stats": stats}
        logits, new = model.apply(
            variables, batch[0], rngs={"dropout": key}, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        return losses.mean(), new["batch_stats"]

    def mean_of_parts(params, stats, parts, keys):
        def add(carry, part):
            total, stats = carry
            grads, stats = jax.grad(loss, has_aux=True)(params, stats, *part)
            return (optax.tree.add(total, grads), stats), None

        start = optax.tree.zeros_like(params), stats
        (total, stats), _ = jax.lax.scan(add, start, (parts, keys))
        return optax.tree.scale(1 / len(keys), total), stats

    @jax.jit
    def step(params):
        parts = jax.tree.map(lambda x: x.reshape(4, 16, *x.shape[1:]), batch)
        grads, stats = mean_of_parts(params, old_stats, parts, keys)
        tx = sam(0.1)
        grad_fn = lambda p: mean_of_parts(p, old_stats, parts, keys)[0]
        updates, _ = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
        return updates, stats

    @jax.jit
    def by_hand(params):
        part = lambda i: jax.tree.map(lambda x: x[16 * i :][:16], batch)
        pairs = [(part(i), keys[i]) for i in range(4)]
        stats = old_stats
        for pair in pairs:
            _, stats = loss(params, stats, *pair)
        mean = lambda p: sum(loss(p, old_stats, *pair)[0] for pair in pairs) / 4
        epsilon = perturbation.sam(jax.grad(mean)(params), 0.1).epsilon
        return jax.grad(mean)(tree_math.add_scaled(params, 1, epsilon)), stats

    chex.assert_trees_all_close(step(params), by_hand(params), rtol=1e-4, atol=1e-6)


# --- low precision --------------------------------------------------------------------


def test_float16_with_loss_scaling():
    """Gradients of 1e-7 and less, which float16 would lose, and float32 weights."""
    params, batch = wide_network(64)
    small_loss = lambda p, batch: 1e-5 * wide_loss(p, batch)

    def half_loss(params, scale):
        half = jax.tree.map(lambda x: x.astype(jnp.float16), (params, batch[0]))
        logits = jnp.tanh(half[1] @ half[0]["in"]) @ half[0]["out"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        # What flows backward is float16 from here on.
        return (jnp.float16(1e-5) * jnp.float16(scale) * losses).mean()

    def unscaled_grad(scale):
        return lambda p: tree_math.scale(1 / scale, jax.grad(half_loss)(p, scale))

    tx = eigen_sam(0.1, 0.5)
    exact = lambda p: jax.grad(small_loss)(p, batch)
    after, _ = tx.update(exact(params), tx.init(params), params, grad_fn=exact)

    def error(scale):
        grad_fn = unscaled_grad(scale)
        got, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
        chex.assert_trees_all_equal_dtypes(got, params)
        difference = tree_math.add_scaled(got, -1, after)
        return float(tree_math.norm(difference) / tree_math.norm(after))

    assert error(2.0**14) < 0.01
    assert error(1.0) > 0.3


@pytest.mark.parametrize("name", ["power_iteration", "lanczos"])
def test_float16_products_overflow_before_gradients_and_want_no_scale(name):
    """Near a minimum, at scales that the gradient bears: ‖∇L‖ is 0.04 and λ is 4."""
    params = {"w": jnp.array([1e-2, 5e-3, -5e-3])}
    curvatures = jnp.array([4.0, 1.0, 0.5], jnp.float16)

    def half_loss(params):
        w = params["w"].astype(jnp.float16)
        return jnp.sum((0.5 * curvatures * w * w).astype(jnp.float32))

    tx = LINKS[name]()

    @functools.partial(jax.jit, static_argnames="curvature_fn")
    def update(scale, **curvature_fn):
        grad_fn = lambda p: tree_math.scale(
            1 / scale, jax.grad(lambda p: scale * half_loss(p))(p)
        )
        grads, start = grad_fn(params), tx.init(params)
        return grads, tx.update(grads, start, params, grad_fn=grad_fn, **curvature_fn)

    def eigenvalue(scale, **curvature_fn):
        grads, (_, state) = update(scale, **curvature_fn)
        assert jnp.all(jnp.isfinite(grads["w"]))
        return info(state).eigenvalue

    assert eigenvalue(2.0**15) == 0
    np.testing.assert_allclose(eigenvalue(2.0**12), 4, rtol=0.1)
    without = eigenvalue(2.0**15, curvature_fn=half_loss)
    np.testing.assert_allclose(without, 4, rtol=0.1)


@each_or_slow
def test_an_eigenvector_in_bfloat16_is_half_as_large_and_hardly_another(name):
    params, loss = network()
    make_value_fn = lambda i: lambda p: loss(p, i % 5)
    narrow = optax.chain(LINKS[name](eigenvector_dtype=jnp.bfloat16), optax.sgd(0.1))
    _, state = train(narrow, params, make_value_fn, steps=10)
    _, wide_state = train(
        optax.chain(LINKS[name](), optax.sgd(0.1)), params, make_value_fn, steps=10
    )
    v, wide = (optax.tree.get(s, "eigenvector") for s in (state, wide_state))
    chex.assert_trees_all_equal_dtypes(
        v, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    )
    for field in ("eigenvalue", "residual", "alignment"):
        assert optax.tree.get(state, field).dtype == jnp.float32
    nbytes = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    assert nbytes(v) == nbytes(wide) / 2
    cosine = tree_math.vdot(v, wide) / tree_math.norm(v) / tree_math.norm(wide)
    assert abs(cosine) > 0.99


def test_an_eigenvector_may_be_narrower_than_float64_parameters():
    with jax.enable_x64(True):
        params, loss = network(dtype=jnp.float64)
        tracker = trackers.power_iteration(2, update_interval=2)
        tx = eigen_sam(0.1, 0.5, tracker, eigenvector_dtype=jnp.float32)
        _, state = train(tx, params, lambda i: lambda p: loss(p, i % 5))
        for leaf in jax.tree.leaves(optax.tree.get(state, "eigenvector")):
            assert leaf.dtype == jnp.float32
        assert optax.tree.get(state, "eigenvalue").dtype == jnp.float64


# --- masks ----------------------------------------------------------------------------


is_norm = lambda path: any(key.startswith("norm") for key in path)
MASKS = {
    "norms only": mask_by_path(lambda path, _: is_norm(path)),
    "no biases, no norms": mask_by_path(
        lambda path, x: x.ndim > 1 and not is_norm(path)
    ),
    "adapter only": mask_by_path(lambda path, _: "lora" in path),
    "head only": mask_by_path(lambda path, _: path[0] == "norm"),
}


@pytest.mark.parametrize(
    "masked",
    [
        pytest.param(x, marks=[] if x == "norms only" else [pytest.mark.slow])
        for x in MASKS
    ],
)
def test_a_masked_perturbation_and_its_eigenvector(masked):
    """ε and v are exactly 0 outside; inside v is the eigenvector of that block."""
    params = transformer.parameters()
    mask = MASKS[masked](params)
    value_fn = lambda p: transformer.loss(p, 0)
    chosen = lambda tree: [
        x for x, on in zip(*map(jax.tree.leaves, (tree, mask)), strict=True) if on
    ]
    flat, unravel = ravel_pytree(chosen(params))

    def block_loss(flat):
        inside = iter(unravel(flat))
        whole = jax.tree.map(lambda x, on: next(inside) if on else x, params, mask)
        return value_fn(whole)

    @jax.jit
    def step(params):
        tx = eigen_sam(0.1, 0.5, trackers.power_iteration(300), mask=mask)
        perturbed, state = tx.update(
            jax.grad(value_fn)(params),
            tx.init(params),
            params,
            grad_fn=lambda p: p,  # what comes out is the perturbed weights
            curvature_fn=value_fn,
        )
        return perturbed, state.tracker.eigenvector, jax.hessian(block_loss)(flat)

    perturbed, v, block = step(params)
    for w, moved, x, on in zip(
        *map(jax.tree.leaves, (params, perturbed, v, mask)), strict=True
    ):
        assert jnp.any(w != moved) == on
        assert jnp.any(x != 0) == on
    values, vectors = np.linalg.eigh(block)
    top = vectors[:, np.argmax(np.abs(values))]
    assert abs(ravel_pytree(chosen(v))[0] @ top) > 0.99


@pytest.mark.parametrize(
    "name",  # of each tracker by itself, so do tests of masks elsewhere
    [pytest.param(x, marks=[] if x == "secant" else [pytest.mark.slow]) for x in EIGEN],
)
def test_outside_the_mask_every_tracker_keeps_to_zero(name):
    params, loss = network()
    mask = mask_by_path(lambda path, _: "b" in path)(params)
    tx = optax.chain(LINKS[name](mask=mask), optax.sgd(0.1))
    _, state = train(tx, params, lambda i: lambda p: loss(p, i))
    v = optax.tree.get(state, "eigenvector")
    inside = jax.tree.map(lambda x, on: jnp.any(x != 0) == on, v, mask)
    assert all(jax.tree.leaves(inside))


def test_frozen_weights_are_constants():
    """Masked and frozen, a run is one in which they are closed over."""
    params = transformer.parameters()
    trained = MASKS["adapter only"](params)
    frozen = jax.tree.map(lambda on: not on, trained)
    tx = optax.chain(
        eigen_sam(0.1, 0.5, mask=trained), optax.freeze(frozen), optax.adam(1e-2)
    )
    run = train(tx, params, lambda i: lambda p: transformer.loss(p, i))

    def value_fn(index):
        return lambda lora: transformer.loss(
            params | {"block": params["block"] | {"lora": lora}}, index
        )

    alone = train(
        optax.chain(eigen_sam(0.1, 0.5), optax.adam(1e-2)),
        params["block"]["lora"],
        value_fn,
    )
    chex.assert_trees_all_close(run[0]["block"]["lora"], alone[0], atol=1e-6)
    for w, start, on in zip(
        *map(jax.tree.leaves, (run[0], params, trained)), strict=True
    ):
        assert on or jnp.all(w == start)


# --- models of other libraries --------------------------------------------------------


@pytest.mark.parametrize("name", ["secant"])
def test_tied_weights_and_dropout_of_plain_dicts(name):
    """The mask of the second pass is that of the first: the loss is a function of w."""
    params = transformer.parameters()
    tx = optax.chain(LINKS[name](), optax.sgd(0.1))

    def value_fn(index):
        key = jax.random.fold_in(jax.random.key(0), index)
        return lambda p: transformer.loss(p, index, key)

    whole = train(tx, params, value_fn)
    flat, unravel = ravel_pytree(params)
    raveled = train(tx, flat, lambda i: lambda x: value_fn(i)(unravel(x)))
    chex.assert_trees_all_close(ravel_pytree(whole[0])[0], raveled[0], atol=1e-5)
    assert jnp.linalg.norm(raveled[0] - flat) > 0.01


@without_random_start
def test_equinox_is_its_arrays_in_a_dict(name):
    eqx = pytest.importorskip("equinox")
    params, loss = network()

    class Model(eqx.Module):
        hidden: eqx.nn.Linear
        out: eqx.nn.Linear
        activation: functools.partial = jnp.tanh

        def weights(self):
            hidden = {"w": self.hidden.weight.T, "b": self.hidden.bias}
            return {"hidden": hidden, "out": {"w": self.out.weight.T}}

    keys = jax.random.split(jax.random.key(0))
    model = Model(
        eqx.nn.Linear(4, 6, key=keys[0]), eqx.nn.Linear(6, 3, False, key=keys[1])
    )
    model = eqx.tree_at(
        lambda m: (m.hidden.weight, m.hidden.bias, m.out.weight),
        model,
        (params["hidden"]["w"].T, params["hidden"]["b"], params["out"]["w"].T),
    )
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    tx = optax.chain(LINKS[name](), optax.sgd(0.1))
    arrays, _ = train(
        tx,
        arrays,
        lambda i: lambda arrays: loss(eqx.combine(arrays, static).weights(), i),
    )
    expected, _ = train(tx, params, lambda i: lambda p: loss(p, i))
    chex.assert_trees_all_close(
        eqx.combine(arrays, static).weights(), expected, atol=1e-6
    )


def test_equinox_that_is_not_combined_is_told_how():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0))
    loss = lambda model: model(jnp.ones(2))[0]
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    grads = eqx.filter_grad(loss)(model)
    tx = eigen_sam()
    with pytest.raises(TypeError, match="not callable") as error:
        tx.update(grads, tx.init(arrays), arrays, value_fn=loss)
    notes = "".join(error.value.__notes__)
    assert "value_fn=lambda p: loss(eqx.combine(p, static), batch)" in notes
    value_fn = lambda arrays: loss(eqx.combine(arrays, static))
    tx.update(grads, tx.init(arrays), arrays, value_fn=value_fn)


def test_complex_parameters_are_two_real_trees():
    """The recipe: a step in them is the step in ℝ²ⁿ, with the gradient's conjugate."""
    z = {"w": jnp.array([1.0 + 2.0j, -0.5j]), "b": jnp.array(0.3 + 0.1j)}
    matrix = jnp.array([[2.0, 1.0j], [-1.0j, 3.0]])
    loss = lambda z: jnp.real(jnp.conj(z["w"]) @ matrix @ z["w"]) + jnp.abs(z["b"]) ** 4

    parts = jax.tree.map(jnp.real, z), jax.tree.map(jnp.imag, z)
    joined = lambda parts: jax.tree.map(jax.lax.complex, *parts)
    tx = optax.chain(sam(0.1), optax.sgd(0.01))
    run = train(tx, parts, lambda _: lambda parts: loss(joined(parts)))

    @jax.jit
    def by_hand(z):
        grads = jax.tree.map(jnp.conj, jax.grad(loss)(z))
        norm = jnp.sqrt(sum(jnp.sum(jnp.abs(g) ** 2) for g in grads.values()))
        at = jax.tree.map(lambda x, g: x + 0.1 * g / norm, z, grads)
        return jax.tree.map(lambda x, g: x - 0.01 * jnp.conj(g), z, jax.grad(loss)(at))

    for _ in range(4):
        z = by_hand(z)
    chex.assert_trees_all_close(joined(run[0]), z, atol=1e-6)

    around = optax.contrib.split_real_and_imaginary(tx)
    with pytest.raises(TypeError, match="unexpected keyword argument 'value_fn'"):
        around.update(z, around.init(z), z, value_fn=loss)


# --- other recipes --------------------------------------------------------------------


@each_or_slow
def test_unequal_batches_per_device(name):
    """Padded examples weigh nothing, and devices with fewer examples weigh less."""
    params, loss_of_weights = padded_problem()
    lengths = np.array([4, 4, 3, 1, 4, 2, 4, 4])
    weights = jnp.asarray(np.arange(4) < lengths[:, None], jnp.float32)
    tx = LINKS[name](axis_name=AXIS)

    def device_step(params, state, device, weights):
        def value_fn(p):
            total = jax.lax.pmean(weights.sum(), AXIS)
            return loss_of_weights(p, device, weights) / total

        grads = jax.lax.pmean(jax.grad(value_fn)(params), AXIS)
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        return optax.apply_updates(params, tree_math.scale(-0.1, updates)), state

    step = jax.pmap(
        device_step, AXIS, in_axes=(None, None, 0, 0), out_axes=(None, None)
    )
    run = params, tx.init(params)
    for _ in range(2):
        run = step(*run, jnp.arange(DEVICES), weights)

    def whole(p):
        each = jax.vmap(loss_of_weights, in_axes=(None, 0, 0))
        return each(p, jnp.arange(DEVICES), weights).sum() / lengths.sum()

    link = LINKS[name]()
    expected = train(optax.chain(link, optax.sgd(0.1)), params, lambda _: whole, 2)
    assert_same_run(run, expected)


def padded_problem():
    params, (inputs, labels) = wide_network(4 * DEVICES)
    inputs, labels = (x.reshape(DEVICES, 4, *x.shape[1:]) for x in (inputs, labels))

    def weighted_sum(params, device, weights):
        logits = jnp.tanh(inputs[device] @ params["in"]) @ params["out"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[device])
        return jnp.sum(weights * losses)

    return params, weighted_sum


def test_has_aux_and_the_loss_at_the_perturbed_weights():
    params, loss = network()
    with_aux = lambda p: (loss(p, 0), {"norm": tree_math.norm(p)})
    (value, aux), grads = jax.value_and_grad(with_aux, has_aux=True)(params)
    tx = sam(0.1)
    _, state = tx.update(
        grads, tx.init(params), params, value_fn=lambda p: with_aux(p)[0]
    )
    epsilon = perturbation.sam(grads, 0.1).epsilon
    expected = loss(tree_math.add_scaled(params, 1, epsilon), 0)
    perturbed_value = optax.tree.get(state, "perturbed_value")
    np.testing.assert_allclose(perturbed_value, expected, rtol=1e-6)
    assert perturbed_value > value + 0.01  # and not the loss, nor what came beside it
    np.testing.assert_allclose(aux["norm"], tree_math.norm(params))


def test_two_groups_with_a_radius_each():
    """The recipe: perturb each group by itself, and hand the gradient to the rest."""
    params, loss = network()
    radii = {"hidden": 0.2, "out": 0.05}
    value_fn = lambda p: loss(p, 0)
    grads = jax.grad(value_fn)(params)
    epsilon = {
        name: perturbation.sam(grads[name], rho).epsilon for name, rho in radii.items()
    }
    sharp = jax.grad(value_fn)(tree_math.add_scaled(params, 1, epsilon))

    g = {name: ravel_pytree(tree)[0] for name, tree in grads.items()}
    flat, unravel = ravel_pytree(params)
    units = [radii[name] * g[name] / jnp.linalg.norm(g[name]) for name in g]
    by_hand = jax.grad(lambda x: value_fn(unravel(x)))(flat + jnp.concatenate(units))
    np.testing.assert_allclose(ravel_pytree(sharp)[0], by_hand, atol=1e-6)
