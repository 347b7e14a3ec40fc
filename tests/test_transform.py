import functools
import re
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze
from jax.flatten_util import ravel_pytree
from problems import (
    SPECTRA,
    dense_hessian,
    dense_hessian_of_sines,
    flatten,
    jitted,
    network,
    quadratic,
    sines,
    symmetric,
)

from eigensam_jax import (
    asam,
    eigen_sam,
    hessian,
    perturbation,
    sam,
    trackers,
    tree_math,
)
from eigensam_jax._update import rounding

FACTORIES = {"sam": sam, "asam": asam, "eigen_sam": eigen_sam}
each_factory = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)


def train(tx, params, loss, steps, batch_of_step=lambda step: step % 5):
    """Runs `steps` jitted updates over the batches of `network`, in one trace."""
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state, index):
        value_fn = lambda p: loss(p, index)
        grads = jax.grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(steps):
        params, state = step(params, state, jnp.int32(batch_of_step(i)))
    return params, state


# --- closed forms ---------------------------------------------------------------------


def definition(name, w, matrix, v, rho, alpha, eta):
    """ε by the definitions, in float64."""
    g = matrix @ w
    u = g / np.linalg.norm(g)
    if name == "sam":
        return rho * u
    if name == "asam":
        scale = np.abs(w) + eta
        return rho * scale**2 * g / np.linalg.norm(scale * g)
    positive = v @ matrix @ v > 0
    return rho * (u + positive * alpha * np.sign(g @ v) * (v - (u @ v) * u))


@functools.cache
def on_a_quadratic(name, tracker_seed, dtype):
    """The jitted first step from a matrix, which all spectra share, and parameters."""
    kwargs = {
        "sam": {"rho": 0.3},
        "asam": {"rho": 0.3, "eta": 0.1, "scale_biases": True},
        "eigen_sam": {
            "rho": 0.3,
            "alpha": 0.7,
            "tracker": trackers.power_iteration(50, seed=tracker_seed),
        },
    }[name]
    tx = FACTORIES[name](**kwargs)

    @jax.jit
    def step(matrix, params):
        value_fn, _ = quadratic(matrix, dtype)
        grads = jax.grad(value_fn)(params)
        return tx.update(grads, tx.init(params), params, value_fn=value_fn)

    return step


@pytest.mark.parametrize(
    ("dtype", "rtol"), [("float32", 1e-6), ("float64", 1e-12)], ids=["f32", "f64"]
)
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FACTORIES)
def test_on_a_quadratic_the_gradient_is_h_times_w_plus_epsilon(
    name, seed, spectrum, dtype, rtol
):
    with jax.enable_x64(dtype == "float64"):
        matrix, _ = symmetric(spectrum, seed)
        matrix = np.asarray(matrix, dtype).astype(np.float64)
        w = np.random.default_rng(seed).normal(size=5).astype(dtype).astype(np.float64)
        _, to_tree = quadratic(matrix, dtype)
        step = on_a_quadratic(name, seed if name == "eigen_sam" else 0, dtype)
        updates, state = step(jnp.asarray(matrix, dtype), to_tree(w))
        v = None
        if name == "eigen_sam":
            v = flatten(state.tracker.eigenvector).astype(np.float64)
            top = np.linalg.norm(matrix @ v - state.tracker.eigenvalue * v)
            assert top < 1e-2 * max(np.abs(spectrum))
        epsilon = definition(name, w, matrix, v, rho=0.3, alpha=0.7, eta=0.1)
        expected = matrix @ (w + epsilon)
        error = np.linalg.norm(flatten(updates) - expected)
        assert error <= rtol * np.linalg.norm(expected)
        info = state.info
        radius = np.linalg.norm(epsilon)
        np.testing.assert_allclose(info.perturbation_norm, radius, rtol=10 * rtol)
        np.testing.assert_allclose(
            info.grad_norm, np.linalg.norm(matrix @ w), rtol=10 * rtol
        )
        value = 0.5 * (w + epsilon) @ matrix @ (w + epsilon)
        np.testing.assert_allclose(
            info.perturbed_value, value, rtol=10 * rtol, atol=10 * rtol
        )
        if v is not None:
            alignment = abs(epsilon @ v) / radius
            np.testing.assert_allclose(info.alignment, alignment, rtol=10 * rtol)
        assert {x.dtype for x in jax.tree.leaves((updates, info))} == {jnp.dtype(dtype)}


def test_asam_scales_no_biases_unless_told():
    w = {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([3.0])}
    tilt = {"kernel": jnp.array([[0.5, 1.0]]), "bias": jnp.array([2.0])}
    value_fn = lambda p: tree_math.vdot(tilt, p) + 0.5 * tree_math.vdot(p, p)
    grads = jax.grad(value_fn)(w)
    g = flatten(grads)
    for scale_biases, bias in ((False, 1.0), (True, 3.1)):
        tx = asam(0.3, 0.1, scale_biases=scale_biases)
        updates, _ = tx.update(grads, tx.init(w), w, value_fn=value_fn)
        scale = np.array([bias, 1.1, 2.1])
        epsilon = 0.3 * scale**2 * g / np.linalg.norm(scale * g)
        np.testing.assert_allclose(flatten(updates) - g, epsilon, rtol=1e-5)
    default = asam(0.3, 0.1)
    expected = asam(0.3, 0.1, scale_biases=False)
    chex.assert_trees_all_equal(
        *(t.update(grads, t.init(w), w, value_fn=value_fn) for t in (default, expected))
    )


# --- against a naive rewrite ----------------------------------------------------------


def test_three_hundred_steps_against_a_flat_rewrite_with_a_dense_hessian():
    rho, alpha, interval, num_matvecs = 0.1, 0.2, 10, 5
    batch_of_step = lambda step: step // 3 % 5  # refreshes meet different batches
    with jax.enable_x64(True):
        params, network_loss = network(dtype=jnp.float64)
        # Concave where weights are small, so that power iteration first finds λ < 0.
        loss = lambda p, i: network_loss(p, i) + 0.3 * jnp.cos(ravel_pytree(p)[0]).sum()
        flat, unravel = ravel_pytree(params)
        gradient = jax.jit(jax.grad(lambda x, i: loss(unravel(x), i)))
        hessian = jax.jit(jax.hessian(lambda x, i: loss(unravel(x), i)))
        tracker = trackers.power_iteration(num_matvecs, interval)
        tx = optax.chain(eigen_sam(rho, alpha, tracker), optax.sgd(0.1, momentum=0.9))
        start = rounding.spread_like(tree_math.zeros_like(params), jnp.int32(0))
        v = flatten(start) / np.linalg.norm(flatten(start))
        w, momentum, dropped = np.array(flat), np.zeros(flat.size), 0
        unsure = 0
        for step in range(300):
            batch = batch_of_step(step)
            g = np.asarray(gradient(w, batch))
            if step % interval == 0:
                matrix = np.asarray(hessian(w, batch))
                for _ in range(num_matvecs):
                    curvature = v @ matrix @ v
                    residual = np.linalg.norm(matrix @ v - curvature * v)
                    v = matrix @ v / np.linalg.norm(matrix @ v)
                unsure += curvature < 0 <= curvature + residual
            u = g / np.linalg.norm(g)
            epsilon = rho * u
            if curvature + residual >= 0:
                epsilon += rho * alpha * np.sign(g @ v) * (v - (u @ v) * u)
            dropped += curvature + residual < 0
            momentum = 0.9 * momentum + np.asarray(gradient(w + epsilon, batch))
            w = w - 0.1 * momentum
        assert 0 < dropped < 300  # both branches were taken
        assert unsure > 0  # and λ < 0 alone would not have been the rule

        trained, state = train(tx, params, loss, 300, batch_of_step)
        assert np.linalg.norm(flatten(trained) - w) <= 1e-8 * np.linalg.norm(w)
        cosine = flatten(optax.tree.get(state, "eigenvector")) @ v
        np.testing.assert_allclose(abs(cosine), 1, rtol=1e-8)
        for other in (optax.identity(), sam(rho)):  # neither SGD nor SAM would pass
            plain = optax.chain(other, optax.sgd(0.1, momentum=0.9))
            elsewhere, _ = train(plain, params, loss, 300, batch_of_step)
            distance = np.linalg.norm(flatten(elsewhere) - w)
            assert distance > 1e-3 * np.linalg.norm(w)


# --- against each other and optax -----------------------------------------------------


@pytest.fixture(scope="module")
def of_sam():
    """What SAM trains, from which α = 0.5 is another."""
    params, loss = network()
    sgd = optax.sgd(0.1, momentum=0.9)
    expected, _ = train(optax.chain(sam(0.2), sgd), params, loss, 120)
    other, _ = train(optax.chain(eigen_sam(0.2, 0.5), sgd), params, loss, 120)
    assert tree_math.norm(tree_math.add_scaled(other, -1, expected)) > 1e-3
    return expected


@pytest.mark.parametrize("alpha", [0, lambda count: 0.0 * count])
@pytest.mark.parametrize(
    "tracker",
    [trackers.secant(), trackers.power_iteration()],
    ids=["secant", "power_iteration"],
)
def test_alpha_zero_is_sam_bit_for_bit(tracker, alpha, of_sam):
    params, loss = network()
    sgd = optax.sgd(0.1, momentum=0.9)
    tx = optax.chain(eigen_sam(0.2, alpha, tracker), sgd)
    actual, (state, _) = train(tx, params, loss, 120)
    chex.assert_trees_all_equal(actual, of_sam)
    # v is tracked all the same.
    np.testing.assert_allclose(tree_math.norm(state.tracker.eigenvector), 1, rtol=1e-5)
    assert state.tracker.eigenvalue != 0


def test_the_sign_of_the_eigenvector_changes_nothing():
    params, loss = network()
    tx = eigen_sam(0.1, 0.7)
    grads = jax.grad(loss)(params)
    _, state = tx.update(grads, tx.init(params), params, value_fn=loss)
    flipped = state._replace(
        tracker=state.tracker._replace(
            eigenvector=tree_math.scale(-1, state.tracker.eigenvector)
        )
    )
    update = jax.jit(
        lambda s: tx.update(grads, s, params, value_fn=loss, refresh=False)
    )
    (one, state_one), (two, state_two) = update(state), update(flipped)
    chex.assert_trees_all_equal(one, two)
    chex.assert_trees_all_equal(state_one.info, state_two.info)


def test_sam_is_optax_contrib_sam_with_a_normalised_ascent():
    params, loss = network()
    theirs = optax.contrib.sam(
        optax.sgd(0.1, momentum=0.9),
        optax.chain(optax.contrib.normalize(), optax.sgd(0.05)),
        opaque_mode=True,
    )

    @jax.jit
    def step(params, state, index):
        grad_fn = jax.grad(lambda p, _: loss(p, index))
        updates, state = theirs.update(
            grad_fn(params, 0), state, params, grad_fn=grad_fn
        )
        return optax.apply_updates(params, updates), state

    expected, state = params, theirs.init(params)
    for i in range(100):
        expected, state = step(expected, state, jnp.int32(i % 5))
    ours, _ = train(
        optax.chain(sam(0.05), optax.sgd(0.1, momentum=0.9)), params, loss, 100
    )
    chex.assert_trees_all_close(ours, expected, rtol=1e-6, atol=1e-6)


@each_factory
def test_rho_zero_hands_the_gradient_back(factory):
    params, loss = network()
    grads = jax.grad(loss)(params)
    tx = factory(rho=0.0)
    updates, state = tx.update(grads, tx.init(params), params, value_fn=loss)
    chex.assert_trees_all_equal(updates, grads)
    assert state.info.perturbation_norm == 0


# --- the eigenvector ------------------------------------------------------------------


def test_the_eigenvector_is_that_of_the_dense_hessian():
    params, loss = network()
    tx = optax.chain(
        eigen_sam(tracker=trackers.power_iteration(num_matvecs=300)), optax.sgd(0.1)
    )
    grads = jax.grad(loss)(params)
    _, state = jitted(tx, value_fn=loss)(grads, tx.init(params), params)
    values, vectors = np.linalg.eigh(dense_hessian(loss, params))
    v = flatten(optax.tree.get(state, "eigenvector"))
    assert abs(v @ vectors[:, -1]) >= 1 - 1e-5
    eigenvalue = optax.tree.get(state, "eigenvalue")
    np.testing.assert_allclose(eigenvalue, values[-1], rtol=1e-5)
    assert optax.tree.get(state, "residual") < 1e-3 * values[-1]


def test_each_name_is_in_the_state_once():
    params, _ = network()
    tx = optax.chain(eigen_sam(), optax.add_decayed_weights(1e-4), optax.adam(1e-3))
    state = tx.init(params)
    for name in (
        *("eigenvector", "eigenvalue", "residual", "alignment"),
        *("grad_norm", "perturbation_norm", "perturbed_value"),
    ):
        assert len(optax.tree.get_all_with_path(state, name)) == 1, name
    assert optax.tree.get(state, "count") == 0  # adam's: ours is `num_updates`
    assert optax.tree.get(state, "num_updates") == 0


def test_a_negative_eigenvalue_drops_the_added_term_until_the_next_refresh():
    spectrum = jnp.array([-5.0, 1.0, 2.0])
    value_fn = lambda w: 0.5 * jnp.sum(spectrum * w**2)
    w = jnp.array([1.0, 1.0, 1.0])
    tx = eigen_sam(0.1, 1.0, trackers.power_iteration(50, update_interval=2))
    plain = sam(0.1)
    state = tx.init(w)
    for _ in range(4):
        grads = jax.grad(value_fn)(w)
        updates, state = tx.update(grads, state, w, value_fn=value_fn)
        expected, _ = plain.update(grads, plain.init(w), w, value_fn=value_fn)
        np.testing.assert_array_equal(updates, expected)
        np.testing.assert_allclose(state.tracker.eigenvalue, -5, rtol=1e-5)
        np.testing.assert_allclose(state.info.perturbation_norm, 0.1, rtol=1e-6)
    spectrum = jnp.array([1.0, 1.0, 8.0])  # a convex batch: the term is back
    updates, state = tx.update(
        jax.grad(value_fn)(w), state, w, value_fn=value_fn, refresh=True
    )
    assert state.tracker.eigenvalue > 0
    assert state.info.perturbation_norm > 0.1


def test_curvature_fn_is_the_loss_that_is_tracked():
    params, loss = network()
    tx = eigen_sam(tracker=trackers.power_iteration(num_matvecs=300))
    train_fn, held_out = (lambda p: loss(p, 0)), (lambda p: loss(p, 3))
    grads = jax.grad(train_fn)(params)
    update = jitted(tx, value_fn=train_fn, curvature_fn=held_out)
    updates, state = update(grads, tx.init(params), params)
    eigenvalues = np.linalg.eigvalsh(dense_hessian(held_out, params))
    np.testing.assert_allclose(state.tracker.eigenvalue, eigenvalues[-1], rtol=1e-4)
    v = state.tracker.eigenvector  # of the held-out loss; the gradients are not
    epsilon = perturbation.eigen_sam(grads, v, 0.05, 0.5).epsilon
    perturbed = tree_math.add_scaled(params, 1, epsilon)
    chex.assert_trees_all_close(updates, jax.grad(train_fn)(perturbed), rtol=1e-5)
    assert tree_math.norm(tree_math.add_scaled(updates, -1, grads)) > 0.01


def test_grad_fn_takes_the_place_of_value_fn():
    params, loss = network()
    tx = eigen_sam(0.1, 0.5)
    grads = jax.grad(loss)(params)
    state = tx.init(params)
    expected, by_value = tx.update(grads, state, params, value_fn=loss)
    actual, by_grad = tx.update(grads, state, params, grad_fn=jax.grad(loss))
    chex.assert_trees_all_equal(actual, expected)
    chex.assert_trees_all_equal(by_grad.tracker, by_value.tracker)
    np.testing.assert_allclose(by_value.info.perturbed_value, loss(params), rtol=0.5)
    assert by_grad.info.perturbed_value == 0
    pair = jax.value_and_grad(loss)
    actual, by_pair = tx.update(grads, state, params, grad_fn=pair)
    chex.assert_trees_all_equal((actual, by_pair), (expected, by_value))
    doubled = lambda p: tree_math.scale(2.0, jax.grad(loss)(p))
    both, _ = tx.update(grads, state, params, grad_fn=doubled, value_fn=loss)
    chex.assert_trees_all_close(both, tree_math.scale(2.0, expected), rtol=1e-6)


# --- masks ----------------------------------------------------------------------------


def test_a_mask_confines_perturbation_eigenvector_and_hessian():
    params, loss = network()
    mask = {"hidden": {"w": True, "b": False}, "out": False}
    inner, seen = trackers.power_iteration(num_matvecs=400), []
    spy = inner._replace(
        observe=lambda s, *given: seen.append(given) or s, observe_interval=1
    )
    tx = eigen_sam(0.1, 0.5, spy, mask=mask)
    grads = jax.grad(loss)(params)
    state = tx.init(params)
    assert tree_math.norm(state.tracker.eigenvector) == 0

    @jax.jit
    def update(state):
        return tx.update(grads, state, params, value_fn=loss), seen.pop()

    (updates, state), ([change], projection, radius) = update(state)
    assert not seen  # and there is one perturbed leaf
    vector = state.tracker.eigenvector
    np.testing.assert_allclose(tree_math.norm(vector), 1, rtol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(vector, params)
    assert tree_math.norm([vector["hidden"]["b"], vector["out"]]) == 0

    block = lambda w: loss(params | {"hidden": params["hidden"] | {"w": w}})
    w = params["hidden"]["w"]
    values, vectors = np.linalg.eigh(jax.hessian(block)(w).reshape(w.size, w.size))
    np.testing.assert_allclose(state.tracker.eigenvalue, values[-1], rtol=1e-4)
    v = vectors[:, -1]
    assert abs(flatten(state.tracker.eigenvector["hidden"]["w"]) @ v) > 1 - 1e-4

    g = flatten(grads["hidden"]["w"])
    np.testing.assert_allclose(state.info.grad_norm, np.linalg.norm(g), rtol=1e-6)
    u = g / np.linalg.norm(g)
    epsilon = 0.1 * (u + 0.5 * np.sign(g @ v) * (v - (u @ v) * u))
    perturbed = {
        "hidden": params["hidden"] | {"w": w + epsilon.reshape(w.shape)},
        "out": params["out"],
    }
    chex.assert_trees_all_close(updates, jax.grad(loss)(perturbed), atol=1e-5)
    np.testing.assert_allclose(
        projection, epsilon @ flatten(vector["hidden"]["w"]), rtol=1e-4
    )
    np.testing.assert_allclose(radius, np.linalg.norm(epsilon), rtol=1e-5)
    difference = tree_math.add_scaled(updates, -1, grads)["hidden"]["w"]
    np.testing.assert_array_equal(change, difference)


@each_factory
def test_a_mask_of_everything_changes_nothing(factory):
    params, loss = network()
    grads = jax.grad(loss)(params)
    results = []
    for mask in (
        None,
        {"hidden": True, "out": True},
        lambda p: {"hidden": True, "out": True},
    ):
        tx = factory(mask=mask)
        results.append(tx.update(grads, tx.init(params), params, value_fn=loss))
    chex.assert_trees_all_equal(*results)


# --- modes of the Hessian-vector product ----------------------------------------------


def with_lanczos(**kwargs):
    mask = {"hidden": True, "out": False}
    link = eigen_sam(0.1, 0.5, trackers.lanczos(12, 10), mask=mask, **kwargs)
    return optax.chain(link, optax.sgd(0.1))


@pytest.fixture(scope="module")
def by_the_default_product():
    params, loss = network()
    return train(with_lanczos(), params, loss, 20)[0]


@pytest.mark.parametrize("mode", hessian.HVP_MODES)
def test_each_hvp_mode_finds_the_top_eigenvector_and_trains_alike(
    mode, by_the_default_product
):
    params, loss = network()
    # A central difference in float32 is wrong by eps^⅔ = 2e-5 or a few times that.
    tolerance = 1e-3 if mode == "finite_difference" else 1e-5

    tx = with_lanczos(hvp_mode=mode)
    _, state = train(tx, params, loss, 1)
    block = lambda w: loss(params | {"hidden": w})
    values, vectors = np.linalg.eigh(dense_hessian(block, params["hidden"]))
    v = optax.tree.get(state, "eigenvector")
    assert abs(flatten(v["hidden"]) @ vectors[:, -1]) > 1 - tolerance
    assert tree_math.norm(v["out"]) == 0
    eigenvalue = optax.tree.get(state, "eigenvalue")
    np.testing.assert_allclose(eigenvalue, values[-1], rtol=tolerance)

    trained, _ = train(tx, params, loss, 20)
    expected = by_the_default_product
    distance = tree_math.norm(tree_math.add_scaled(trained, -1, expected))
    moved = tree_math.norm(tree_math.add_scaled(expected, -1, params))
    assert distance < tolerance * moved


def test_the_mode_reaches_the_products_of_a_tracker():
    w, tracker = jnp.array([0.3, 1.2, -2.0]), trackers.power_iteration(30)
    tx = eigen_sam(tracker=tracker, hvp_mode="reverse_over_reverse")
    _, state = tx.update(jax.grad(sines)(w), tx.init(w), w, value_fn=sines)
    largest = abs(dense_hessian_of_sines(w)).max()
    np.testing.assert_allclose(abs(state.tracker.eigenvalue), largest, rtol=1e-3)


def test_another_hvp_mode_is_refused_with_the_choices():
    with pytest.raises(
        ValueError, match=r"hvp_mode .*'finite_difference'\), got 'reverse'"
    ):
        eigen_sam(hvp_mode="reverse")


# --- schedules ------------------------------------------------------------------------


def test_rho_and_alpha_follow_schedules_of_the_transformations_own_count():
    params, loss = network()
    tx = eigen_sam(
        rho=optax.linear_schedule(0.0, 0.3, 3), alpha=lambda count: 1.0 * (count >= 2)
    )
    state, grads = tx.init(params), jax.grad(loss)(params)
    radii = []
    for _ in range(4):
        _, state = tx.update(grads, state, params, value_fn=loss)
        radii.append(float(state.info.perturbation_norm))
    np.testing.assert_allclose(radii[:2], [0.0, 0.1], rtol=1e-6)
    assert radii[2] > 0.201
    assert radii[3] > 0.301
    assert state.num_updates == 4


def test_traced_rho_and_alpha_by_inject_hyperparams():
    params, loss = network()
    grads = jax.grad(loss)(params)
    injected = optax.inject_hyperparams(eigen_sam)(rho=0.05, alpha=0.2)
    state = injected.init(params)
    state.hyperparams["rho"] = jnp.float32(0.4)
    update = jax.jit(lambda s: injected.update(grads, s, params, value_fn=loss))
    actual, state = update(state)
    first, second = eigen_sam(rho=0.4, alpha=0.2), eigen_sam(rho=0.4, alpha=2.0)
    expected, after = first.update(grads, first.init(params), params, value_fn=loss)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5)
    state.hyperparams["alpha"] = jnp.float32(2.0)  # from here on there is a v
    actual, state = update(state)
    expected, after = second.update(grads, after, params, value_fn=loss)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5)
    radius = optax.tree.get(state, "perturbation_norm")
    np.testing.assert_allclose(radius, after.info.perturbation_norm, rtol=1e-5)
    assert radius > 0.41


@each_factory
@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_a_schedule_below_zero_or_not_finite_counts_as_zero(factory, bad):
    params, loss = network()
    grads = jax.grad(loss)(params)
    tx = factory(rho=lambda count: jnp.where(count < 1, bad, 0.1))
    update = jax.jit(lambda s: tx.update(grads, s, params, value_fn=loss))
    updates, state = update(tx.init(params))
    chex.assert_trees_all_close(updates, grads, rtol=1e-6, atol=1e-7)
    assert state.info.perturbation_norm == 0
    _, state = update(state)
    assert state.info.perturbation_norm > 0


def test_a_schedule_that_is_no_scalar_is_refused_by_name():
    params, loss = network()
    tx = eigen_sam(alpha=lambda count: jnp.ones(3))
    with pytest.raises(ValueError, match=r"alpha must be a scalar .* \(3,\)"):
        tx.update(params, tx.init(params), params, value_fn=loss)


# --- faults ---------------------------------------------------------------------------


@each_factory
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_zero_gradient_gives_zero_perturbation(factory, dtype):
    value_fn = lambda w: jnp.sum(w**2)
    w = jnp.zeros(3, dtype)
    tx = factory()
    updates, state = tx.update(jnp.zeros(3, dtype), tx.init(w), w, value_fn=value_fn)
    np.testing.assert_array_equal(updates, np.zeros(3))
    assert state.info.perturbation_norm == 0
    chex.assert_tree_all_finite(state)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_bad_batch_does_not_stay_in_the_tracker(bad):
    params, loss = network()
    tx = eigen_sam(0.1, 0.5, trackers.power_iteration(update_interval=1))
    state = tx.init(params)
    grads = jax.grad(loss)(params)
    _, state = tx.update(grads, state, params, value_fn=loss)
    poisoned = lambda p: bad * loss(p)
    _, after = tx.update(jax.grad(poisoned)(params), state, params, value_fn=poisoned)
    chex.assert_trees_all_equal(after.tracker, state.tracker)
    assert after.info.perturbation_norm == 0
    assert after.info.alignment == 0
    updates, recovered = tx.update(grads, after, params, value_fn=loss)
    chex.assert_tree_all_finite((updates, recovered))
    assert recovered.info.perturbation_norm > 0.1


def test_a_linear_model_trains():
    value_fn = lambda w: jnp.dot(w, jnp.array([3.0, 4.0]))
    w = jnp.ones(2)
    tx = eigen_sam(0.1, 0.5)
    updates, state = tx.update(jax.grad(value_fn)(w), tx.init(w), w, value_fn=value_fn)
    np.testing.assert_array_equal(updates, [3.0, 4.0])
    assert state.tracker.eigenvalue == 0
    chex.assert_tree_all_finite(state)


# --- what it costs --------------------------------------------------------------------


def test_one_compilation_over_250_steps():
    params, loss = network()  # `train` allows one trace
    tracker = trackers.power_iteration()
    tx = optax.chain(eigen_sam(tracker=tracker), optax.sgd(0.1))
    _, state = train(tx, params, loss, 250)
    assert state[0].num_updates == 250


def counting_loss(loss, counts):
    """`loss`, counting its evaluations, and the tangents that are pushed through it."""

    @jax.custom_jvp
    def probe(x):
        jax.debug.callback(lambda: counts.update(value=counts["value"] + 1))
        return x

    @probe.defjvp
    def _(primals, tangents):
        return probe(primals[0]), tangents[0]

    return lambda p, i=0: probe(loss(p, i))


@pytest.mark.parametrize("refresh", [None, False, True])
def test_only_a_step_that_refreshes_runs_hessian_vector_products(refresh):
    params, loss = network()
    counts = {"value": 0}
    counted = counting_loss(loss, counts)
    num_matvecs, interval = 3, 4
    tx = eigen_sam(tracker=trackers.power_iteration(num_matvecs, interval))
    grads = jax.grad(loss)(params)
    step = jax.jit(
        lambda s: tx.update(grads, s, params, value_fn=counted, refresh=refresh)
    )
    state = tx.init(params)
    for i in range(9):
        counts["value"] = 0
        _, state = jax.block_until_ready(step(state))
        jax.effects_barrier()
        refreshed = refresh if refresh is not None else i % interval == 0
        assert counts["value"] == 1 + num_matvecs * refreshed


def test_the_refresh_is_a_conditional_of_the_compiled_program():
    params, loss = network()
    tx = eigen_sam(tracker=trackers.power_iteration())

    def program(refresh):
        step = jax.jit(
            lambda g, s, p: tx.update(g, s, p, value_fn=loss, refresh=refresh)
        )
        return step.lower(params, tx.init(params), params)

    assert program(None).compile().as_text().count(" conditional(") == 1
    # As it is before XLA makes loops of its own, of a scatter for one.
    loops = {
        fixed: program(fixed).as_text().count("stablehlo.while")
        for fixed in (None, False, True, np.True_)
    }
    assert loops[None] == loops[True] == loops[np.True_] == loops[False] + 4
    assert loops[False] == 1  # of the norm; a refresh has one of products, and norms
    for fixed in (False, True, np.True_):
        assert not re.search(r"stablehlo\.(case|if)", program(fixed).as_text())


def assert_stable(tx, params, loss):
    """An update keeps the structure, shapes and dtypes of updates and state."""
    grads = jax.tree.map(jnp.asarray, jax.grad(loss)(params))
    state = tx.init(params)
    updates, after = tx.update(grads, state, params, value_fn=loss)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    chex.assert_tree_all_finite(after)
    return {x.dtype for x in jax.tree.leaves(after)} - {jnp.dtype("int32")}


@each_factory
def test_structure_and_dtypes_are_kept(factory):
    params, loss = network(dtype=jnp.bfloat16)
    assert assert_stable(factory(), params, loss) == {jnp.dtype("float32")}


@each_factory
def test_structure_and_dtypes_are_kept_with_mixed_dtypes_and_a_mask(factory):
    with jax.enable_x64(True):
        params = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones(3, jnp.float64)}
        loss = lambda p: jnp.sum(p["a"] ** 2) + jnp.sum(p["b"] ** 4)
        assert_stable(factory(mask={"a": True, "b": False}), params, loss)
        assert_stable(factory(), params, loss)


class Pair(NamedTuple):
    w: Any
    b: Any


@each_factory
@pytest.mark.parametrize(
    "params",
    [
        {"float": 2.0, "numpy": np.ones(2, np.float32), "none": None},
        {"scalar": jnp.array(3.0), "empty": jnp.ones((0, 4)), "nested": [(), [{}]]},
        Pair(w=jnp.ones((2, 2)), b=(jnp.ones(1),)),
        freeze({"dense": {"w": jnp.ones(3)}}),
        jnp.ones(4),
    ],
    ids=["python and numpy", "scalar and empty", "namedtuple", "frozen", "array"],
)
def test_trees_of_all_kinds(factory, params):
    assert_stable(factory(), params, lambda p: sum(map(square, jax.tree.leaves(p))))


def square(x):
    return jnp.sum((x - 0.5) ** 2)


@each_factory
def test_the_state_can_be_donated(factory):
    params, loss = network()
    tx = factory()
    step = jax.jit(
        lambda s, p: tx.update(p, s, params, value_fn=loss), donate_argnums=(0, 1)
    )
    state = tx.init(params)
    _, after = step(state, jax.tree.map(jnp.copy, params))
    used = [state.num_updates]  # what is only looked at is no input
    if state.tracker is not None:
        used += [state.tracker.eigenvector, state.tracker.moments]
    assert all(x.is_deleted() for x in jax.tree.leaves(used))
    chex.assert_tree_all_finite(after)


def test_steps_scan():
    params, loss = network()
    tx = optax.chain(
        eigen_sam(tracker=trackers.power_iteration(2, 4)), optax.sgd(0.1, momentum=0.9)
    )

    def step(carry, index):
        params, state = carry
        value_fn = lambda p: loss(p, index)
        updates, state = tx.update(
            jax.grad(value_fn)(params), state, params, value_fn=value_fn
        )
        return (optax.apply_updates(params, updates), state), None

    (scanned, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(20) % 5)
    expected, _ = train(tx, params, loss, 20)
    chex.assert_trees_all_close(scanned, expected, rtol=1e-5, atol=1e-6)


# --- misuse ---------------------------------------------------------------------------


@each_factory
@pytest.mark.parametrize(
    "value",
    [-0.1, np.nan, np.inf, "0.1", None, np.float32(-1), np.ones(2), np.array(True)],
)
def test_bad_rho_is_refused_with_name_and_value(factory, value):
    with pytest.raises(ValueError, match=re.escape(f"got {value!r}")):
        factory(rho=value)
    with pytest.raises(ValueError, match="rho must be a finite number of at least 0"):
        factory(rho=value)


def test_other_bad_hyperparameters():
    with pytest.raises(ValueError, match=r"alpha .* got -1"):
        eigen_sam(alpha=-1)
    for eta in (-0.5, lambda count: 0.1):
        with pytest.raises(ValueError, match=r"eta .* or a scalar array, got"):
            asam(eta=eta)
    sam(rho=np.array(0.1))  # a scalar array, as said
    with pytest.raises(ValueError, match=r"tracker .* got <function power_iteration"):
        eigen_sam(tracker=trackers.power_iteration)


@each_factory
def test_a_call_that_lacks_something_shows_the_call_that_works(factory):
    params, loss = network()
    tx = factory()
    state = tx.init(params)
    call = (
        r"tx\.update\(grads, opt_state, params, value_fn=lambda p: loss\(p, batch\)\)"
    )
    with pytest.raises(ValueError, match=f"needs params, got None.*{call}"):
        tx.update(params, state, value_fn=loss)
    with pytest.raises(ValueError, match=f"needs value_fn or grad_fn.*{call}"):
        tx.update(params, state, params)
    with pytest.raises(ValueError, match=f"value_fn must be a function.*{call}"):
        tx.update(params, state, params, value_fn=loss(params))


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("name", ["value_fn", "curvature_fn"])
def test_a_function_that_ignores_its_argument_is_refused(name, jitted):
    params, loss = network()
    tx = eigen_sam(tracker=trackers.power_iteration())
    state = tx.init(params)

    def step(params, used):
        given = {"value_fn": loss, name: used(params)}
        return tx.update(jax.grad(loss)(params), state, params, **given)[0]

    if jitted:
        step = jax.jit(step, static_argnums=1)
    mistake = lambda params: lambda p: loss(params)
    part = lambda params: lambda p: loss({**params, "out": p["out"]})
    frozen = lambda params: lambda p: loss(jax.lax.stop_gradient(p))
    for used in (mistake, frozen):
        with pytest.raises(ValueError, match=f"{name} ignores its argument.*loss\\(p"):
            step(params, used)
    chex.assert_tree_all_finite(step(params, part))  # of part of it is enough
    zero = lambda params: lambda p: 0.0 * loss(p)  # by value and not by structure
    chex.assert_tree_all_finite(step(params, zero))


def test_functions_that_return_the_wrong_thing():
    params, loss = network()
    tx = eigen_sam(tracker=trackers.power_iteration())
    state = tx.init(params)
    with pytest.raises(
        ValueError, match=r"value_fn must return a scalar, got a tuple .*\)\[0\]"
    ):
        tx.update(params, state, params, value_fn=lambda p: (loss(p), 1.0))
    with pytest.raises(ValueError, match="value_fn must return a scalar, got None"):
        tx.update(params, state, params, value_fn=lambda p: None)
    with pytest.raises(ValueError, match="value_fn must return a scalar"):
        tx.update(params, state, params, value_fn=lambda p: (loss(p), None))
    b = params["hidden"]["b"]  # as losses of single examples are: [0] would take one
    message = (
        f"value_fn must return a scalar, got an array of the shape {b.shape}: average "
        "the losses, value_fn=lambda p: loss(p, batch).mean()."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        tx.update(params, state, params, value_fn=lambda p: p["hidden"]["b"])
    with pytest.raises(ValueError, match="curvature_fn must return a scalar"):
        tx.update(
            params, state, params, value_fn=loss, curvature_fn=lambda p: p["out"]["w"]
        )
    has_aux = jax.value_and_grad(lambda p: (loss(p), 1.0), has_aux=True)
    with pytest.raises(ValueError, match=r"grad_fn\(params\) must be a tree like"):
        tx.update(params, state, params, grad_fn=has_aux)
    renamed = {"first": params["hidden"], "out": params["out"]}
    for updates in (params["out"], renamed):
        with pytest.raises(ValueError, match="updates must be a tree like params"):
            tx.update(updates, state, params, value_fn=loss)


def test_containers_alone_may_differ():
    params, loss = network()
    tx = eigen_sam()
    grads = jax.grad(loss)(params)
    expected = tx.update(grads, tx.init(params), params, value_fn=loss)
    actual = tx.update(freeze(grads), tx.init(params), params, value_fn=loss)
    chex.assert_trees_all_equal(actual, expected)
    same_shapes = Pair(jnp.ones(2), jnp.zeros(2))
    with pytest.raises(ValueError, match="updates must be a tree like params"):
        tx.update(
            {"b": jnp.zeros(2), "w": jnp.ones(2)},
            tx.init(same_shapes),
            same_shapes,
            value_fn=lambda p: square(p.w) + square(p.b),
        )


def test_a_state_of_another_transformation_is_refused():
    params, loss = network()
    states = (sam().init(params), optax.sgd(0.1).init(params), None)
    for state in states:
        with pytest.raises(
            ValueError, match=r"opt_state must be .* tx\.init\(params\)"
        ):
            eigen_sam().update(params, state, params, value_fn=loss)
    with pytest.raises(ValueError, match="got one without a tracker"):
        eigen_sam().update(params, states[0], params, value_fn=loss)
    with pytest.raises(ValueError, match="got one with a tracker"):
        sam().update(params, eigen_sam().init(params), params, value_fn=loss)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (trackers.secant(), trackers.power_iteration()),
        (trackers.lanczos(), trackers.secant()),
        (trackers.ritz(), trackers.secant()),
    ],
)
def test_a_state_of_another_tracker_or_other_parameters_is_refused(ours, theirs):
    params, loss = network()
    other = {"hidden": params["hidden"], "out": {"w": jnp.ones((6, 4))}}
    tx = eigen_sam(tracker=ours)
    for state in (eigen_sam(tracker=theirs).init(params), tx.init(other)):
        with pytest.raises(ValueError, match=r"another tracker or to other parameters"):
            tx.update(params, state, params, value_fn=loss)


def test_a_traced_refresh_is_refused():
    params, loss = network()
    tx = eigen_sam()
    step = jax.jit(
        lambda s, due: tx.update(params, s, params, value_fn=loss, refresh=due)
    )
    with pytest.raises(ValueError, match=r"refresh must be .*static argument"):
        step(tx.init(params), True)


@each_factory
@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32])
def test_parameters_that_are_not_real_are_refused(factory, dtype):
    with pytest.raises(ValueError, match=r"params\['w'\] must be real floating-point"):
        factory().init({"w": jnp.ones(2, dtype)})


def test_other_extra_arguments_are_ignored():
    params, loss = network()
    tx = optax.chain(eigen_sam(), optax.sgd(0.1))
    grads = jax.grad(loss)(params)
    expected = tx.update(grads, tx.init(params), params, value_fn=loss)
    actual = tx.update(
        grads, tx.init(params), params, value_fn=loss, value=1.0, epoch="first"
    )
    chex.assert_trees_all_equal(actual, expected)
