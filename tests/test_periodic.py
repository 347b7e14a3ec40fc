"""A link on every few steps only: its limits, what it keeps, and what it costs."""

import functools

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from links import LINKS
from problems import SPECTRA, network, quadratic, symmetric
from test_cost import FUSES, WIDE, compiled, loss, memory, operations, traffic

from eigensam_jax import eigen_sam, info, linen, periodic, sam, trackers, tree_math
from eigensam_jax._periodic import PeriodicState

slow = pytest.mark.slow
SGD = functools.partial(optax.sgd, 0.05, momentum=0.9)
reusing = functools.partial(periodic, reuse=0.3)


def trained(link, steps=7, of=None, dtype=jnp.float32, static=False, after=None):
    """Parameters and state after some steps of a jitted chain, or `after` some."""
    params, value = network(dtype=dtype) if of is None else of
    tx = optax.chain(link, SGD())

    @functools.partial(jax.jit, static_argnames="perturb")
    def step(params, state, index, perturb=None):
        value_fn = lambda p: value(p, index)
        kwargs = {} if perturb is None else {"perturb": perturb}
        grads = jax.grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn, **kwargs)
        return optax.apply_updates(params, updates), state

    state, kept = tx.init(params), []
    for index in range(steps):
        perturb = index % 3 == 0 if static else None
        params, state = step(params, state, index % 5, perturb)
        if after is not None and index + 1 in after:
            kept.append(state)
    return (params, state) if after is None else kept


# --- limits ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sam", "secant", pytest.param("ritz", marks=slow)])
def test_an_interval_of_one_is_the_link_bit_for_bit(name):
    params, (own, *rest) = trained(reusing(LINKS[name](), 1))
    expected, (link, *others) = trained(LINKS[name]())
    chex.assert_trees_all_equal(params, expected)
    chex.assert_trees_all_equal((own.link, rest), (link, others))
    assert own.orthogonal is None


@pytest.mark.parametrize(
    "name", ["sam", "secant", pytest.param("power_iteration", marks=slow)]
)
def test_without_reuse_it_is_a_conditional_transformation(name):
    due = lambda step: step % 3 == 0
    params, (own, *_) = trained(periodic(LINKS[name](), 3))
    expected, (other, *_) = trained(optax.conditionally_transform(LINKS[name](), due))
    chex.assert_trees_all_equal(params, expected)
    chex.assert_trees_all_equal(own.link, other.inner_state)
    assert own.orthogonal is None
    assert int(own.link.num_updates) == 3  # of seven steps, numbers 0, 3 and 6
    plain, _ = trained(optax.identity())
    assert not jnp.allclose(ravel_pytree(plain)[0], ravel_pytree(params)[0], 1e-4)


@pytest.mark.parametrize(("spectrum", "interval"), [("definite", 2), ("indefinite", 3)])
def test_on_a_quadratic_it_follows_the_closed_form(spectrum, interval):
    rho, reuse, rate = 0.3, 0.7, 0.01
    with jax.enable_x64(True):
        matrix, _ = symmetric(SPECTRA[spectrum], seed=0)
        value_fn, to_tree = quadratic(matrix, jnp.float64)
        w = np.arange(1.0, len(matrix) + 1)
        params, q = to_tree(w), np.zeros_like(w)
        tx = optax.chain(periodic(sam(rho), interval, reuse), optax.sgd(rate))
        state = tx.init(params)
        update = jax.jit(
            lambda g, s, p: tx.update(g, s, p, value_fn=value_fn)  # one batch
        )
        for step in range(6):
            grad = matrix @ w
            unit = grad / np.linalg.norm(grad)
            if step % interval == 0:
                perturbed = matrix @ (w + rho * unit)
                across = perturbed - (perturbed @ unit) * unit
                q = across / np.linalg.norm(across)
                taken = perturbed
            else:
                taken = grad + reuse * np.linalg.norm(grad) * q
            w = w - rate * taken
            updates, state = update(jax.grad(value_fn)(params), state, params)
            params = optax.apply_updates(params, updates)
            np.testing.assert_allclose(ravel_pytree(params)[0], w, rtol=1e-11)
            np.testing.assert_allclose(
                ravel_pytree(state[0].orthogonal)[0], q, rtol=1e-9, atol=1e-12
            )
            np.testing.assert_allclose(info(state).perturbation_norm, rho, rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_radius_of_zero_leaves_the_gradient_as_it_is(dtype):
    params, (own, *_) = trained(periodic(sam(0.0), 3, reuse=1.0), dtype=dtype)
    expected, _ = trained(optax.with_extra_args_support(optax.identity()), dtype=dtype)
    chex.assert_trees_all_equal(params, expected)
    assert not any(jnp.any(x) for x in jax.tree.leaves(own.orthogonal))


def test_along_an_eigenvector_nothing_is_reused():
    """There the perturbed gradient differs from the plain one by its length alone."""
    value_fn = lambda w: w @ jnp.diag(jnp.array([1.0, 3.0, 7.0])) @ w
    w = jnp.array([0.0, 1.3, 0.0])
    tx = periodic(sam(0.3), 2, reuse=1.0)
    _, state = tx.update(jax.grad(value_fn)(w), tx.init(w), w, value_fn=value_fn)
    np.testing.assert_array_equal(state.orthogonal, 0)


# --- what it must withstand -----------------------------------------------------------


def some_steps(tx, batches, value_fn=lambda w, scale: jnp.sum(scale * jnp.cosh(w))):
    """The gradients handed on, and the states, on batches that scale the loss."""
    w, out = jnp.array([0.5, -1.0, 2.0]), []
    state = tx.init(w)
    for scale in batches:
        of_batch = lambda p, scale=scale: value_fn(p, scale)
        grads = jax.grad(of_batch)(w)
        updates, state = tx.update(grads, state, w, value_fn=of_batch)
        out.append((grads, updates, state))
    return out


@pytest.mark.parametrize("bad", [0.0, jnp.nan, jnp.inf])
@pytest.mark.parametrize("name", ["sam", "secant"])
def test_a_bad_batch_leaves_the_state_usable(bad, name):
    scale = jnp.array([1.0, 2.0, 3.0])
    tx = periodic(LINKS[name](), 3, reuse=0.5)
    on_step = {
        "perturbs": [scale, scale, scale, bad * scale, scale, scale, scale],
        "reuses": [scale, bad * scale, scale, scale, scale, scale, scale],
    }
    for batches in on_step.values():
        taken = some_steps(tx, batches)
        for _, _, state in taken:
            carried = state.link.tracker, state.orthogonal
            assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(carried))
            np.testing.assert_allclose(jnp.linalg.norm(state.orthogonal), 1, rtol=1e-6)
        assert jnp.all(jnp.isfinite(taken[-1][1]))
    before, after = (some_steps(tx, on_step["perturbs"])[i][2] for i in (2, 3))
    np.testing.assert_array_equal(before.orthogonal, after.orthogonal)


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e18, 1e30])
def test_the_scale_of_the_loss_does_not_matter(size):
    scale = jnp.array([1.0, 2.0, 3.0])
    tx = periodic(sam(0.1), 2, reuse=0.5)
    for got, expected in zip(
        some_steps(tx, [size * scale] * 4), some_steps(tx, [scale] * 4), strict=True
    ):
        np.testing.assert_allclose(got[1] / size, expected[1], rtol=1e-5)
        np.testing.assert_allclose(
            got[2].orthogonal, expected[2].orthogonal, rtol=1e-4, atol=1e-6
        )


def test_a_mask_is_that_of_the_perturbation_alone():
    """q has what the perturbed gradient has across the plain one, everywhere."""
    params, value = network()
    mask = {"hidden": {"w": True, "b": False}, "out": {"w": True}}
    tx = periodic(sam(0.2, mask=mask), 2, reuse=0.5)
    grads = jax.grad(value)(params)
    perturbed, state = tx.update(grads, tx.init(params), params, value_fn=value)
    inside = {"hidden": {"w": grads["hidden"]["w"]}, "out": grads["out"]}
    norm = optax.tree.norm(inside)
    at = jax.tree.map(lambda w, g, on: w + 0.2 * g / norm * on, params, grads, mask)
    expected, _ = ravel_pytree(jax.grad(value)(at))
    np.testing.assert_allclose(ravel_pytree(perturbed)[0], expected, rtol=1e-4)
    unit = ravel_pytree(grads)[0] / optax.tree.norm(grads)
    across = expected - (expected @ unit) * unit
    q, _ = ravel_pytree(state.orthogonal)
    np.testing.assert_allclose(q, across / jnp.linalg.norm(across), atol=1e-4)
    updates, _ = tx.update(grads, state, params, value_fn=value)
    expected = ravel_pytree(grads)[0] + 0.5 * optax.tree.norm(grads) * q
    np.testing.assert_allclose(ravel_pytree(updates)[0], expected, rtol=1e-5)


def test_narrow_parameters_keep_a_narrow_vector():
    params, value = network()
    _, (wide, *_) = trained(reusing(sam(0.5), 3), 1, of=(params, value))
    for dtype in (jnp.bfloat16, jnp.float16):
        narrow = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)
        _, (own, *_) = trained(reusing(sam(0.5), 3), 1, of=(narrow, value))
        q, expected = ravel_pytree(own.orthogonal)[0], ravel_pytree(wide.orthogonal)[0]
        assert q.dtype == dtype
        assert float(q.astype(jnp.float32) @ expected) > 0.9


def test_one_narrow_leaf_does_not_hide_what_a_wide_one_has():
    """Rounding is that of each leaf: 0.5% across g is some in float32 alone."""
    params, value = network()
    params["out"]["w"] = params["out"]["w"].astype(jnp.bfloat16)
    value_fn = lambda p: value(p) + 20 * jnp.sum(p["hidden"]["w"])  # of a constant g
    grads = jax.grad(value_fn)(params)
    tx = reusing(sam(0.5), 2)
    updates, state = tx.update(grads, tx.init(params), params, value_fn=value_fn)
    g, own = (ravel_pytree(tree_math.widen(x))[0] for x in (grads, updates))
    across = own - (own @ g) / (g @ g) * g
    assert 1e-4 < jnp.linalg.norm(across) / jnp.linalg.norm(own) < 0.01
    q = ravel_pytree(tree_math.widen(state.orthogonal))[0]
    assert q @ across > 0.99 * jnp.linalg.norm(across)


def test_one_infinite_entry_stays_where_it_is():
    params, value = network()
    tx = reusing(sam(0.5), 2)
    grads = jax.grad(value)(params)
    _, state = tx.update(grads, tx.init(params), params, value_fn=value)
    for bad in (jnp.inf, jnp.nan):
        grads["hidden"]["b"] = grads["hidden"]["b"].at[0].set(bad)
        updates, _ = tx.update(grads, state, params, value_fn=value)
        chex.assert_trees_all_equal(updates, grads)


def test_without_parameters_nothing_happens():
    tx = reusing(sam(), 2)
    state = tx.init({})
    for number in (1, 2):
        updates, state = tx.update({}, state, {}, value_fn=lambda p: jnp.zeros(()))
        assert updates == {}
        assert int(state.num_steps) == number


# --- where it runs --------------------------------------------------------------------


# Of the link alone, every mode is in update/test_devices.py.
FEW_MODES = {
    False: ("shard_map", "jit, sharded, Explicit"),
    True: ("pmap", "shard_map"),
}


@pytest.mark.parametrize("per_device", [False, True])
@pytest.mark.parametrize("name", ["sam", pytest.param("secant", marks=slow)])
def test_all_ways_to_run_agree_with_one_device(name, per_device):
    with jax.enable_x64(True):
        params, batches = meshes.parameters(float), meshes.batches(7, float)

        def make(**kwargs):
            link = LINKS[name](**kwargs)
            return optax.chain(periodic(link, 3, reuse=0.5), SGD())

        if per_device:
            make = functools.partial(make, per_device=True)
            kwargs, modes = (
                {"per_device": True},
                (*FEW_MODES[True], "shard_map unchecked"),
            )
            expected = meshes.by_vmap(make, params, batches, **kwargs)
        else:
            kwargs, modes = {}, meshes.MODES
            expected = meshes.one_device(make, params, batches)
        for mode in modes if name == "secant" else FEW_MODES[per_device]:
            got = meshes.MODES[mode](make, params, batches, **kwargs)
            if mode in ("pmap", "shard_map unchecked"):
                for x in jax.tree.leaves(got):
                    np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))
                got = jax.tree.map(lambda x: x[0], got)
            chex.assert_trees_all_close(got, expected, rtol=1e-9, atol=1e-11)


def test_the_vector_is_sharded_as_the_parameters_are():
    params = meshes.parameters()
    spec = jax.sharding.PartitionSpec(meshes.AXIS)
    sharding = jax.sharding.NamedSharding(meshes.mesh(), spec)
    params = jax.device_put(params, sharding)
    with jax.set_mesh(meshes.mesh()):
        state = jax.jit(reusing(sam(0.1)).init)(params)
    for x, w in zip(
        jax.tree.leaves(state.orthogonal), jax.tree.leaves(params), strict=True
    ):
        assert x.sharding.is_equivalent_to(w.sharding, w.ndim)


@pytest.mark.parametrize("make", [periodic, reusing])
def test_a_run_goes_on_from_a_checkpoint(make):
    params, value = network()
    tx = optax.chain(make(LINKS["secant"](), 3), SGD())

    @jax.jit
    def step(params, state, index):
        value_fn = lambda p: value(p, index)
        grads = jax.grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    carry = params, tx.init(params)
    for index in range(5):
        carry = step(*carry, index)
    saved = flax.serialization.to_bytes(carry)
    restored = flax.serialization.from_bytes((params, tx.init(params)), saved)
    chex.assert_trees_all_equal(restored, carry)
    for index in range(3):
        carry, restored = step(*carry, index), step(*restored, index)
    chex.assert_trees_all_equal(restored, carry)


@pytest.mark.parametrize("make", [periodic, reusing])
def test_a_batch_of_runs_is_each_of_them(make):
    params, value = network()
    tx = make(LINKS["sam"](), 2)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x, 0.9 * x]), params)

    def step(carry, index):
        params, state = carry
        value_fn = lambda p: value(p, index)
        grads = jax.grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        updates = optax.tree.scale(-0.1, updates)
        return (optax.apply_updates(params, updates), state), None

    def run(params):
        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(3))[0]

    together = jax.jit(jax.vmap(run))(stacked)
    alone = jax.jit(run)
    for i in range(3):
        of_run = functools.partial(jax.tree.map, lambda x, i=i: x[i])
        chex.assert_trees_all_close(
            of_run(together), alone(of_run(stacked)), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", [pytest.param("sam", marks=slow), "secant"])
def test_the_branch_fixed_at_trace_time_is_the_same(name):
    link = reusing(LINKS[name](), 3)
    chex.assert_trees_all_close(trained(link, static=True), trained(link))


def test_a_tracker_counts_the_steps_that_perturb():
    """A refresh on every second of them is one on every sixth step."""
    link = eigen_sam(0.1, 0.5, trackers.power_iteration(2, update_interval=2))
    states = trained(periodic(link, 3), after=(1, 4, 6, 7))
    v = [own.link.tracker.eigenvector for own, *_ in states]
    chex.assert_trees_all_equal(v[0], v[1], v[2])
    assert not jnp.allclose(ravel_pytree(v[2])[0], ravel_pytree(v[3])[0])


@pytest.mark.parametrize("name", ["sam", pytest.param("secant", marks=slow)])
def test_derivatives_are_those_of_finite_differences(name):
    with jax.enable_x64(True):
        params, value = network(dtype=jnp.float64)

        def after_training(params, rho):
            tx = optax.chain(reusing(LINKS[name].func(rho), 2), SGD())

            def step(carry, index):
                params, state = carry
                value_fn = lambda p: value(p, index)
                grads = jax.grad(value_fn)(params)
                updates, state = tx.update(grads, state, params, value_fn=value_fn)
                return (optax.apply_updates(params, updates), state), None

            (params, _), _ = jax.lax.scan(
                step, (params, tx.init(params)), jnp.arange(4)
            )
            return value(params, 4)

        flat, unravel = ravel_pytree((params, jnp.float64(0.2)))
        of_flat = lambda x: after_training(*unravel(x))
        gradient = jax.jit(jax.grad(of_flat))(flat)
        forward = jax.jit(lambda x, t: jax.jvp(of_flat, (x,), (t,)))
        random = np.random.default_rng(0).normal(size=flat.size)
        for along in (jnp.asarray(random), jnp.zeros_like(flat).at[-1].set(1)):
            high, low = (
                forward(flat + sign * 1e-5 * along, along)[0] for sign in (1, -1)
            )
            exact = (high - low) / 2e-5
            assert abs(exact) > 1e-4
            np.testing.assert_allclose(gradient @ along, exact, rtol=1e-5)
            np.testing.assert_allclose(forward(flat, along)[1], exact, rtol=1e-5)


def test_flax_train_states_hand_on_the_branch():
    params, value = network()
    state = linen.TrainState.create(
        apply_fn=None, params=params, tx=optax.chain(periodic(sam(0.1), 2), SGD())
    )
    grads = jax.grad(value)(params)
    counts = []
    for perturb in (True, False, False):
        state = state.apply_gradients(
            grads=grads, value_fn=value, extra_args={"perturb": perturb}
        )
        counts.append(int(state.opt_state[0].link.num_updates))
    assert counts == [1, 1, 1]
    assert int(state.opt_state[0].num_steps) == 3


# --- what it costs --------------------------------------------------------------------


def test_steps_between_cost_one_gradient():
    gradient = operations(jax.jit(jax.grad(loss)).lower(*WIDE).compile())
    link = reusing(sam(0.1), 5)
    due, between = (compiled(WIDE, link, perturb=x) for x in (True, False))
    assert 1.99 * gradient <= operations(due) <= 2.03 * gradient
    assert 0.99 * gradient <= operations(between) <= 1.02 * gradient
    mean = (operations(due) + 4 * operations(between)) / 5
    assert mean <= 1.23 * gradient
    plain = compiled(WIDE, optax.identity())
    size = sum(4 * x.size for x in jax.tree.leaves(WIDE[0]))
    assert traffic(between) - traffic(plain) <= 4.1 * size
    bare = compiled(WIDE, periodic(sam(0.1)), perturb=False)
    assert traffic(bare) - traffic(plain) <= 0.1 * size


@pytest.mark.parametrize("make", [periodic, reusing])
def test_neither_branch_pays_for_the_other(make):
    text = compiled(WIDE, make(sam(0.1), 5)).as_text()
    always, decided = meshes.by_branch(text)
    assert decided.count(" dot(") == 8  # a gradient of three layers, inside the branch
    assert always.count(" dot(") == 8
    for perturb in (True, False):
        fixed = compiled(WIDE, make(sam(0.1), 5), perturb=perturb).as_text()
        assert " conditional(" not in fixed


def test_memory_beyond_that_of_the_link_is_one_vector():
    """In the state. The gradient at w too is kept until that at w + ε is there."""
    size = sum(4 * x.size for x in jax.tree.leaves(WIDE[0]))

    def state_bytes(link):
        state = jax.eval_shape(link.init, WIDE[0])
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))

    link = reusing(sam(0.1), 5)
    assert state_bytes(link) - state_bytes(sam(0.1)) == size + 4
    assert state_bytes(periodic(sam(0.1))) - state_bytes(sam(0.1)) == 4
    plain, of_sam = compiled(WIDE, optax.identity()), compiled(WIDE, sam(0.1))
    due, between = (compiled(WIDE, link, perturb=x) for x in (True, False))
    assert memory(due) - memory(of_sam) <= 1.2 * size
    assert memory(between) - memory(plain) <= (0.05 if FUSES else 1.05) * size


def test_a_donated_state_is_used_up():
    params, value = network()
    tx = optax.chain(reusing(LINKS["secant"](), 2), SGD())
    step = jax.jit(
        lambda g, s, p: tx.update(g, s, p, value_fn=value), donate_argnums=(0, 1)
    )
    state = tx.init(params)
    for _ in range(3):
        before = state
        _, state = step(jax.grad(value)(params), state, params)
        assert all(x.is_deleted() for x in jax.tree.leaves(before[0].orthogonal))
    assert isinstance(state[0], PeriodicState)


# --- errors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: periodic(sam(), 0), "interval must be an integer of at least 1"),
        (lambda: periodic(sam(), 2.5), "interval must be an integer"),
        (lambda: periodic(sam(), 5, -0.1), "reuse must be a finite number"),
        (lambda: periodic(sam(), 5, "much"), "reuse must be a finite number"),
        (lambda: periodic(0.05), "link must be what sam, asam or eigen_sam returns"),
        (
            lambda: periodic(optax.chain(sam(), optax.sgd(0.1))).init(jnp.ones(2)),
            "link must be .* put the other links of the chain after",
        ),
        (
            lambda: periodic(periodic(sam())).init(jnp.ones(2)),
            "link must be what sam, asam or eigen_sam returns",
        ),
    ],
)
def test_what_can_not_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_calls_that_can_not_be_are_refused():
    w, value_fn = jnp.ones(2), lambda p: jnp.sum(p**2)
    tx = reusing(sam())
    state = tx.init(w)
    with pytest.raises(ValueError, match="perturb must be True, False or None"):
        tx.update(w, state, w, value_fn=value_fn, perturb=jnp.array(True))
    with pytest.raises(ValueError, match="update needs value_fn or grad_fn"):
        tx.update(w, state, w, perturb=False)
    for other in (sam().init(w), periodic(sam()).init(w)):
        with pytest.raises(
            ValueError, match="opt_state must be the state of this periodic"
        ):
            tx.update(w, other, w, value_fn=value_fn)


def test_a_link_alone_can_pass_a_step():
    w, value_fn = jnp.array([1.0, 2.0]), lambda p: jnp.sum(p**2)
    for tx in (sam(), eigen_sam()):
        state = tx.init(w)
        grads, after = tx.update(
            jax.grad(value_fn)(w), state, w, value_fn=value_fn, perturb=False
        )
        chex.assert_trees_all_equal((grads, after), (jax.grad(value_fn)(w), state))


@pytest.mark.parametrize(("share", "kept"), [(0.025, 0.0), (0.04, 1.0)])
def test_in_bfloat16_less_than_three_percent_is_rounding(share, kept):
    w = jnp.array([1.0, 0.0], jnp.bfloat16)
    sharp = lambda p: jnp.array([1.0, share], p.dtype)
    tx = periodic(sam(0.1), reuse=0.3)
    _, state = tx.update(w, tx.init(w), w, grad_fn=sharp)
    np.testing.assert_array_equal(state.orthogonal, [0.0, kept])
