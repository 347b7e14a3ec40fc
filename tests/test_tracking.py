"""Every tracker inside `eigen_sam`: what it follows, survives and costs."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import dense_hessian, flatten, jitted, network

from eigensam_jax import eigen_sam, trackers, tree_math

TRACKERS = {
    "power_iteration": trackers.power_iteration(update_interval=2),
    "lanczos": trackers.lanczos(update_interval=2),
    "secant": trackers.secant(),
    "secant every 2": trackers.secant(0.9, update_interval=2),
    "ritz": trackers.ritz(update_interval=2),
}
each_tracker = pytest.mark.parametrize("tracker", TRACKERS.values(), ids=TRACKERS)


def step_function(tx, loss, **kwargs):
    """(params, opt_state, batch) -> the same after one update."""

    def step(params, state, batch):
        value_fn = lambda p: loss(p, batch)
        grads = jax.grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn, **kwargs)
        return optax.apply_updates(params, updates), state

    return step


# --- what they follow -----------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=pytest.mark.slow if x == "secant every 2" else ())
        for x in TRACKERS
    ],
)
def test_follows_the_top_eigenvector_of_a_network_in_training(name):
    tracker = TRACKERS[name]
    params, loss = network()
    tx = optax.chain(eigen_sam(0.05, 0.5, tracker), optax.sgd(0.02))
    step, state = step_function(tx, loss), tx.init(params)

    @jax.jit
    def train(params, state):
        body = lambda carry, batch: (step(*carry, batch), None)
        return jax.lax.scan(body, (params, state), jnp.arange(300) % 5)[0]

    params, state = train(params, state)
    mean_loss = lambda p: sum(loss(p, batch) for batch in range(5)) / 5
    matrix = dense_hessian(mean_loss, params)
    values, vectors = np.linalg.eigh(matrix)
    v = flatten(optax.tree.get(state, "eigenvector"))
    # Those that solve now and then know the Hessian of their last batch alone.
    averages = name not in ("power_iteration", "lanczos")
    assert v @ matrix @ v > (0.85 if averages else 0.6) * values[-1]
    assert values[-1] > 3 * np.abs(values).mean()  # a random v would not get there
    g = flatten(jax.grad(mean_loss)(params))
    assert abs(v @ vectors[:, -1]) > abs(g @ vectors[:, -1]) / np.linalg.norm(g)
    eigenvalue = optax.tree.get(state, "eigenvalue")
    np.testing.assert_allclose(eigenvalue, values[-1], rtol=0.5)  # of batches


@pytest.mark.parametrize("name", ["secant", "ritz"])
def test_a_mask_confines_what_is_averaged(name):
    params, loss = network()
    mask = {"hidden": {"w": True, "b": False}, "out": False}
    tx = eigen_sam(0.05, 0.5, TRACKERS[name], mask=mask)
    block = params["hidden"]["w"]
    alone = eigen_sam(0.05, 0.5, TRACKERS[name])
    within = lambda w, i=0: loss(params | {"hidden": params["hidden"] | {"w": w}}, i)

    @jax.jit
    def updated(state, expected, i):
        of_all, of_block = (lambda p: loss(p, i)), (lambda w: within(w, i))
        grads, block_grad = jax.grad(of_all)(params), jax.grad(of_block)(block)
        _, state = tx.update(grads, state, params, value_fn=of_all)
        _, expected = alone.update(block_grad, expected, block, value_fn=of_block)
        return state, expected

    state, expected = tx.init(params), alone.init(block)
    for i in range(5):
        state, expected = updated(state, expected, i)
    v = state.tracker.eigenvector
    assert tree_math.norm([v["hidden"]["b"], v["out"]]) == 0
    np.testing.assert_allclose(
        v["hidden"]["w"], expected.tracker.eigenvector, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        state.tracker.eigenvalue, expected.tracker.eigenvalue, rtol=1e-4
    )


def test_what_works_where_there_is_no_second_derivative():
    @jax.custom_vjp
    def kernel(w):
        return jnp.sum(jnp.array([1.0, 2.0, 8.0]) * w**2)

    def backward(w, cotangent):
        gradient = lambda w: np.array([2.0, 4.0, 16.0], np.float32) * w
        like = jax.ShapeDtypeStruct(w.shape, w.dtype)
        return (cotangent * jax.pure_callback(gradient, like, w),)

    kernel.defvjp(lambda w: (kernel(w), w), backward)
    w = jnp.array([1.0, -0.5, 0.3])
    gradient = jax.grad(kernel)
    other = eigen_sam(tracker=trackers.power_iteration())
    with pytest.raises((ValueError, TypeError), match="differentiated twice"):
        other.update(gradient(w), other.init(w), w, grad_fn=gradient)
    of_gradients = eigen_sam(
        tracker=trackers.power_iteration(30), hvp_mode="finite_difference"
    )
    start = of_gradients.init(w)
    _, state = jitted(of_gradients, grad_fn=gradient)(gradient(w), start, w)
    np.testing.assert_allclose(state.tracker.eigenvalue, 16, rtol=1e-3)
    tx = eigen_sam(0.1, 1.0, trackers.secant(decay=0.8))
    state, update = tx.init(w), jitted(tx, grad_fn=gradient)
    for i in range(40):
        at = w + 0.1 * jax.random.normal(jax.random.key(i), (3,))
        _, state = update(gradient(at), state, at)
    assert jnp.abs(state.tracker.eigenvector[2]) > 0.95
    np.testing.assert_allclose(state.tracker.eigenvalue, 16, rtol=0.05)


# --- what they survive ----------------------------------------------------------------


@functools.cache
def on_a_scaled_batch(tracker):
    """The first state, and (state, factor of the loss) -> updates and the next one."""
    params, loss = network()
    tx = eigen_sam(0.1, 0.5, tracker)

    @jax.jit
    def update(state, factor):
        value_fn = lambda p: factor * loss(p)
        return tx.update(jax.grad(value_fn)(params), state, params, value_fn=value_fn)

    return tx.init(params), update


@each_tracker
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_bad_batch_leaves_no_trace_and_the_next_good_one_goes_on(tracker, bad):
    state, update = on_a_scaled_batch(tracker)
    for factor in (1.0, 1.0, bad, bad):
        before = state
        _, state = update(state, factor)
    chex.assert_trees_all_equal(state.tracker, before.tracker)
    chex.assert_tree_all_finite(state.tracker)
    assert state.info.perturbation_norm == 0
    for _ in range(2):
        updates, state = update(state, 1.0)
    chex.assert_tree_all_finite((updates, state))
    np.testing.assert_allclose(tree_math.norm(state.tracker.eigenvector), 1, rtol=1e-5)
    assert state.info.perturbation_norm > 0.1


@each_tracker
def test_a_zero_gradient_and_a_zero_hessian_stay_finite(tracker):
    w = jnp.array([3.0, 4.0])
    tx = eigen_sam(0.1, 0.5, tracker)

    @jax.jit
    def update(state, w, slope, curvature):
        value_fn = lambda w: slope @ w + jnp.sum(curvature * (w - 1) ** 2)
        grads = jax.grad(value_fn)(w)
        return grads, *tx.update(grads, state, w, value_fn=value_fn)

    linear = jnp.array([3.0, 4.0]), jnp.zeros(2)
    bowl = jnp.zeros(2), jnp.array([1.0, 2.0])
    state = tx.init(w)
    for function, at in ((linear, w), (linear, w), (bowl, jnp.ones(2))):
        grads, updates, state = update(state, at, *function)
        np.testing.assert_array_equal(updates, grads)
        chex.assert_tree_all_finite(state)
    for _ in range(4):
        *_, state = update(state, w, *bowl)
    np.testing.assert_allclose(tree_math.norm(state.tracker.eigenvector), 1, rtol=1e-5)
    assert state.tracker.eigenvalue > 1


@pytest.mark.parametrize("name", ["secant", "ritz"])
def test_without_a_perturbation_there_is_nothing_to_learn(name):
    params, loss = network()
    tx = eigen_sam(
        optax.piecewise_constant_schedule(0.0, {1: 0.0}), 0.5, TRACKERS[name]
    )
    state, grads = tx.init(params), jax.grad(loss)(params)  # of another program
    update = jax.jit(lambda s: tx.update(grads, s, params, value_fn=loss))
    for _ in range(3):
        _, state = update(state)
    assert tree_math.norm(state.tracker.eigenvector) == 0


@pytest.mark.parametrize("name", ["secant", "ritz", "power_iteration"])
def test_the_state_keeps_its_dtypes_whatever_the_gradients_have(name):
    makers = {
        "secant": lambda: trackers.secant(np.float64(0.9)),
        "ritz": lambda: trackers.ritz(1, np.float64(0.9), np.float64(0.1)),
        "power_iteration": lambda: trackers.power_iteration(2, 1),
    }
    with jax.enable_x64(True):
        params, loss = network(dtype=jnp.float32)
        tx = eigen_sam(0.1, 0.5, makers[name]())
        state = tx.init(params)
        grads = jax.tree.map(lambda g: g.astype(jnp.float64), jax.grad(loss)(params))
        update = jitted(tx, value_fn=loss)
        for _ in range(2):
            _, after = update(grads, state, params)
            chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
            state = after


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@each_tracker
def test_the_state_keeps_float64_where_jax_allows_it_without_x64(tracker, dtype):
    name = "jax_explicit_x64_dtypes"
    before = getattr(jax.config, name)
    jax.config.update(name, "allow")
    try:
        params = {"w": jnp.ones(3, dtype)}
        value_fn = lambda p: jnp.sum(jnp.arange(1, 4) * p["w"] ** 4)
        tx = eigen_sam(0.1, 0.5, tracker, eigenvector_dtype=jnp.float64)
        state, grads = tx.init(params), jax.grad(value_fn)(params)
        _, after = jax.jit(lambda s: tx.update(grads, s, params, value_fn=value_fn))(
            state
        )
    finally:
        jax.config.update(name, before)
    assert after.tracker.eigenvector["w"].dtype == jnp.float64
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


@each_tracker
def test_the_state_keeps_its_types_in_one_compilation_and_can_be_donated(tracker):
    params, loss = network(dtype=jnp.bfloat16)
    tx = eigen_sam(0.1, 0.5, tracker)
    step = jax.jit(
        chex.assert_max_traces(step_function(tx, loss), 1), donate_argnums=(0, 1)
    )
    chex.clear_trace_counter()
    state = first = tx.init(params)
    types = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for name in ("eigenvector", "eigenvalue", "residual", "alignment"):
        assert len(optax.tree.get_all_with_path(state, name)) == 1, name
    for batch in range(6):
        params, state = step(params, state, jnp.int32(batch % 5))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == types
    assert all(x.is_deleted() for x in jax.tree.leaves(first.tracker.eigenvector))
    floats = [x for x in jax.tree.leaves(state.tracker) if x.dtype != jnp.int32]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ["secant", "secant every 2"])
def test_under_vmap_over_seeds_it_is_the_loop_over_them(name):
    networks = [network(seed) for seed in range(3)]
    _, loss = networks[0]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(params for params, _ in networks))
    tx = optax.chain(eigen_sam(0.1, 0.5, TRACKERS[name]), optax.sgd(0.1))
    step = step_function(tx, loss)
    params, states = stacked, jax.vmap(tx.init)(stacked)
    vmapped = jax.jit(jax.vmap(step, in_axes=(0, 0, None)))
    for batch in range(5):
        params, states = vmapped(params, states, batch)
    single = jax.jit(step)
    for i, (own, _) in enumerate(networks):
        state = tx.init(own)
        for batch in range(5):
            own, state = single(own, state, batch)
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], params), own, rtol=1e-4, atol=1e-5
        )
    if name == "secant":  # there is no branch of which both sides would be paid for
        text = str(jax.make_jaxpr(step)(own, state, 0))
        assert "cond[" not in text


# --- what they cost -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tracker", "products"),
    [
        (trackers.secant(), [0] * 6),
        (trackers.ritz(update_interval=3), [1, 0, 0, 1, 0, 0]),
        (trackers.power_iteration(2, update_interval=3), [2, 0, 0, 2, 0, 0]),
    ],
    ids=["secant", "ritz", "power_iteration"],
)
def test_products_are_made_on_the_steps_that_are_due(tracker, products):
    params, loss = network()
    counts = {"product": 0}

    @jax.custom_jvp
    def counted(x):
        return x

    @counted.defjvp
    def _(primals, tangents):
        jax.debug.callback(lambda: counts.update(product=counts["product"] + 1))
        return counted(primals[0]), tangents[0]

    # A second function, so that the tangents of its products alone are counted.
    curvature_fn = lambda p: loss(jax.tree.map(counted, p))
    tx = eigen_sam(0.1, 0.2, tracker)
    grads, state = jax.grad(loss)(params), tx.init(params)
    update = jax.jit(
        lambda s: tx.update(grads, s, params, value_fn=loss, curvature_fn=curvature_fn)
    )
    seen = []
    for _ in products:
        counts["product"] = 0
        _, state = jax.block_until_ready(update(state))
        jax.effects_barrier()
        seen.append(counts["product"])
    assert (max(seen) > 0) == any(products)
    per_product = max(seen) // max(products) if any(products) else 1
    assert seen == [per_product * n for n in products]


@pytest.mark.parametrize(
    ("refresh", "observed"), [(None, [0, 3, 6]), (True, [*range(7)]), (False, [])]
)
def test_observe_is_called_at_its_interval_or_where_the_caller_says_so(
    refresh, observed
):
    params, loss = network()
    seen = []
    inner = trackers.secant(update_interval=3)

    def observe(*given):
        jax.debug.callback(lambda: seen.append(steps[-1]))
        return inner.observe(*given)

    tx = eigen_sam(0.1, 0.2, inner._replace(observe=observe))
    grads, state = jax.grad(loss)(params), tx.init(params)
    update = jax.jit(
        lambda s: tx.update(grads, s, params, value_fn=loss, refresh=refresh)
    )
    steps = []
    for step in range(7):
        steps.append(step)
        _, state = update(state)
        jax.effects_barrier()
    assert seen == observed
