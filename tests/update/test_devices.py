"""Eight devices and one: the same global batch gives the same parameters and state."""

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import AXIS, DEVICES, MODES

from eigensam_jax import (
    asam,
    diagnostics,
    eigen_sam,
    perturbation,
    sam,
    sde,
    trackers,
    tree_math,
)
from eigensam_jax.experiments.training import collectives

TRACKERS = {
    "secant": trackers.secant(),
    "power_iteration": trackers.power_iteration(update_interval=10),
    "secant every 5": trackers.secant(0.9, update_interval=5),
    "lanczos": trackers.lanczos(update_interval=10),
    "ritz": trackers.ritz(update_interval=5),
}
MANUAL = {
    "pmap": meshes.by_pmap,
    "shard_map": meshes.by_shard_map,
    "shard_map unchecked": partial(meshes.by_shard_map, check_vma=False),
    "vmap": meshes.by_vmap,
}
STACKED = ("pmap", "shard_map unchecked")


def chain(tracker, **kwargs):
    return optax.chain(
        eigen_sam(0.1, 0.5, tracker, **kwargs), optax.sgd(0.05, momentum=0.9)
    )


def one_of_each(tree):
    """What each device has, which has to be the same to the last bit."""
    tree = jax.tree.map(np.asarray, tree)
    for x in jax.tree.leaves(tree):
        np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))
    return jax.tree.map(lambda x: x[0], tree)


def assert_close(got, expected, rtol):
    """Leaf by leaf, relative to the norm of the leaf."""
    chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
    for (path, x), y in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        off = np.linalg.norm(np.asarray(x) - np.asarray(y))
        assert off <= rtol * np.linalg.norm(y), (jax.tree_util.keystr(path), off)


# --- one semantics --------------------------------------------------------------------


# All of them take minutes; two differ in everything that matters here.
FEW = ("pmap", "shard_map", "jit, sharded, Explicit")
FAST = [("secant", False, FEW), ("power_iteration", True, tuple(MODES))]
AGREEMENT = FAST + [
    pytest.param(name, x64, tuple(MODES), marks=pytest.mark.slow)
    for name in TRACKERS
    for x64 in (False, True)
    if (name, x64, tuple(MODES)) not in FAST
]


@pytest.mark.parametrize(("name", "x64", "modes"), AGREEMENT)
def test_all_ways_to_run_agree_with_one_device(name, x64, modes):
    with jax.enable_x64(x64):
        dtype, rtol = (jnp.float64, 1e-11) if x64 else (jnp.float32, 1e-5)
        params, batches = meshes.parameters(dtype), meshes.batches(20, dtype)
        make = partial(chain, TRACKERS[name])
        expected = meshes.one_device(make, params, batches)
        v = optax.tree.get(expected[1], "eigenvector")
        np.testing.assert_allclose(tree_math.norm(v), 1, rtol=1e-5)
        for mode in modes:
            got = MODES[mode](make, params, batches)
            got = one_of_each(got) if mode in STACKED else got
            assert_close(got, expected, rtol)


@pytest.mark.parametrize(
    "check_vma", [True, pytest.param(False, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("mode", ["reverse_over_reverse", "finite_difference"])
def test_other_products_agree_under_the_check_of_varying_values(mode, check_vma):
    with jax.enable_x64(True):
        params, batches = meshes.parameters(float), meshes.batches(4, float)
        tracker = trackers.power_iteration(2, update_interval=2)
        make = partial(chain, tracker, hvp_mode=mode)
        expected = meshes.one_device(make, params, batches)
        got = meshes.by_shard_map(make, params, batches, check_vma)
        got = got if check_vma else one_of_each(got)
        assert_close(got, expected, 1e-9)


def test_layers_split_among_devices_train_alike():
    params, batches = meshes.parameters(), meshes.batches(10)
    mesh = meshes.mesh()
    spec = {"hidden": {"w": P(None, AXIS), "b": P(AXIS)}, "out": P(AXIS)}
    sharded = jax.tree.map(
        lambda w, s: jax.device_put(w, NamedSharding(mesh, s)), params, spec
    )
    tx = chain(trackers.secant())
    train = jax.jit(partial(meshes.run, partial(meshes.step, tx)))
    got = train(sharded, jax.jit(tx.init)(sharded), batches)
    make = partial(chain, trackers.secant())
    assert_close(got, meshes.one_device(make, params, batches), 1e-5)


def by_shard_map_of(step, tx, params, batches):
    mapped = jax.shard_map(
        partial(meshes.run, partial(step, tx)),
        mesh=meshes.mesh(),
        in_specs=(P(), P(), P(None, AXIS)),
        out_specs=P(),
    )
    return jax.jit(mapped)(params, tx.init(params), batches)


def test_a_curvature_function_is_averaged_as_well():
    params, batches = meshes.parameters(), meshes.batches(3)

    def step(tx, params, state, batch, axes=()):
        half = jax.tree.map(lambda x: x[::2], batch)
        of_half = lambda p: meshes.loss(p, half)
        return meshes.step(tx, params, state, batch, axes, curvature_fn=of_half)

    make = partial(chain, trackers.power_iteration(2, 1))
    on_each = partial(step, axes=(AXIS,))
    got = by_shard_map_of(on_each, make(axis_name=AXIS), params, batches)
    alone = partial(meshes.run, partial(step, make()))
    expected = jax.jit(alone)(params, make().init(params), batches)
    assert_close(got, expected, 1e-5)


products_or_slow = pytest.mark.parametrize(
    "name", [pytest.param("secant", marks=pytest.mark.slow), "power_iteration"]
)


@products_or_slow
def test_a_gradient_function_is_averaged_and_a_mask_kept(name):
    params, batches = meshes.parameters(), meshes.batches(10)
    mask = {"hidden": {"w": True, "b": False}, "out": True}

    def step(tx, params, state, batch, axes=()):
        grad_fn = lambda p: jax.grad(meshes.loss)(p, batch)
        at = jax.lax.pcast(params, axes, to="varying") if axes else params
        grads = jax.lax.pmean(grad_fn(at), axes) if axes else grad_fn(at)
        updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    make = partial(chain, TRACKERS[name], mask=mask)
    on_each = partial(step, axes=(AXIS,))
    got = by_shard_map_of(on_each, make(axis_name=AXIS), params, batches)
    alone = partial(meshes.run, partial(step, make()))
    expected = jax.jit(alone)(params, make().init(params), batches)
    assert_close(_with_value_zero(got), _with_value_zero(expected), 1e-5)
    v = optax.tree.get(got[1], "eigenvector")
    assert jnp.all(v["hidden"]["b"] == 0)
    assert tree_math.norm(v) > 0.99


def _with_value_zero(trained):
    """`perturbed_value` is 0 where `grad_fn` returns gradients alone."""
    params, (state, rest) = trained
    assert state.info.perturbed_value == 0
    return params, (state, rest)


@products_or_slow
def test_a_loss_that_is_a_mean_over_devices_needs_no_axis_name(name):
    params, batches = meshes.parameters(), meshes.batches(10)

    def mean_loss(params, batch):
        return jax.lax.pmean(meshes.loss(params, batch), AXIS)

    make = partial(chain, TRACKERS[name])
    step = partial(meshes.step, loss=mean_loss)
    got = by_shard_map_of(step, make(), params, batches)
    assert_close(got, meshes.one_device(make, params, batches), 1e-5)
    with pytest.raises(ValueError, match=r"value_fn is the same on all.*own batch"):
        by_shard_map_of(
            partial(meshes.step, axes=(AXIS,), own=False, loss=mean_loss),
            make(axis_name=AXIS),
            params,
            batches,
        )


# --- m-sharpness ----------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def one_by_hand(perturb, params, batch, v):
    """ε, the gradient at w + ε, and s = sign⟨v,ε⟩ with s·d, of one device."""
    g = jax.grad(meshes.loss)(params, batch)
    epsilon = perturb(g, params, v).epsilon
    after = jax.grad(meshes.loss)(jax.tree.map(jnp.add, params, epsilon), batch)
    sign = jnp.where(tree_math.vdot(v, epsilon) < 0, -1.0, 1.0)
    d = jax.tree.map(jnp.subtract, after, g)
    return epsilon, after, sign, tree_math.scale(sign, d)


def mean(trees):
    return jax.tree.map(lambda *x: sum(x) / len(x), *trees)


def by_hand(perturb, params, batches):
    """The definition, with the secant's rule for v and plain gradient descent."""
    v = tree_math.zeros_like(params)
    unit = lambda x: tree_math.scale(1 / tree_math.norm(x), x)
    for step in range(len(batches[0])):
        devices = [
            one_by_hand(perturb, params, meshes.part(batches, step, i), v)
            for i in range(DEVICES)
        ]
        epsilons, after, _, turned = zip(*devices, strict=True)
        v = tree_math.add_scaled(tree_math.scale(0.95, v), 0.05, unit(mean(turned)))
        v = unit(v)
        params = tree_math.add_scaled(params, -0.05, mean(after))
    radius = np.mean([tree_math.norm(epsilon) for epsilon in epsilons])
    return params, v, radius


RULES = {
    "sam": (sam, (0.1,), lambda g, w, v: perturbation.sam(g, 0.1)),
    "asam": (asam, (0.3, 0.1), lambda g, w, v: perturbation.asam(g, w, 0.3, 0.1)),
    "eigen_sam": (
        eigen_sam,
        (0.1, 1.0),
        lambda g, w, v: perturbation.eigen_sam(g, v, 0.1, 1.0),
    ),
}


@pytest.mark.parametrize(
    ("rule", "mode"),
    [
        *(("sam", "shard_map"), ("asam", "vmap")),
        *(("eigen_sam", "pmap"), ("eigen_sam", "shard_map")),
        # Of these, what the tracker sees is compared below.
        pytest.param("eigen_sam", "shard_map unchecked", marks=pytest.mark.slow),
        pytest.param("eigen_sam", "vmap", marks=pytest.mark.slow),
    ],
)
def test_each_device_perturbs_by_itself(rule, mode):
    params, batches = meshes.parameters(), meshes.batches(4)
    link, hyperparameters, perturb = RULES[rule]

    def make(**kwargs):
        return optax.chain(link(*hyperparameters, **kwargs), optax.sgd(0.05))

    got = MANUAL[mode](partial(make, per_device=True), params, batches, per_device=True)
    got, state = one_of_each(got) if mode in STACKED else got
    expected, v, radius = by_hand(perturb, params, batches)
    assert_close(got, expected, 1e-5)
    np.testing.assert_allclose(
        optax.tree.get(state, "perturbation_norm"), radius, rtol=1e-5
    )
    if rule == "eigen_sam":
        assert_close(optax.tree.get(state, "eigenvector"), v, 2e-5)
    # The perturbation of the whole batch is another one.
    together, _ = meshes.one_device(make, params, batches)
    assert tree_math.norm(tree_math.add_scaled(together, -1, got)) > 1e-4


def test_products_are_those_of_the_whole_batch_where_each_device_perturbs():
    params, batches = meshes.parameters(), meshes.batches(1)
    tracker = trackers.lanczos(update_interval=1)
    make = partial(chain, tracker, per_device=True)
    _, state = meshes.by_shard_map(make, params, batches, per_device=True)
    _, expected = meshes.one_device(partial(chain, tracker), params, batches)
    for name in ("eigenvector", "eigenvalue"):
        got, want = (optax.tree.get(s, name) for s in (state, expected))
        assert_close(got, want, 1e-5)


class Seen(NamedTuple):
    """State of a tracker that keeps what it is shown."""

    eigenvector: list
    eigenvalue: jax.Array
    residual: jax.Array
    given: tuple
    usable: jax.Array


def observer(v):
    """A tracker with a fixed v."""

    def init(params):
        zero = jnp.zeros(())
        return Seen(jax.tree.leaves(v), zero, zero, (params, zero, zero), zero == 0)

    observe = lambda state, *given: state._replace(given=given)
    return trackers.Tracker(init, lambda state, _: state, observe)


@pytest.mark.parametrize("mode", MANUAL)
def test_trackers_see_the_mean_change_turned_one_way(mode):
    params, batches = meshes.parameters(), meshes.batches(1)
    keys = {"hidden": {"w": 0, "b": 1}, "out": 2}
    normal = lambda key, w: jax.random.normal(jax.random.key(key), w.shape)
    v = jax.tree.map(normal, keys, params)
    v = tree_math.scale(1 / tree_math.norm(v), v)
    make = partial(chain, observer(v), per_device=True)
    got = MANUAL[mode](make, params, batches, per_device=True)
    _, state = one_of_each(got) if mode in STACKED else got
    perturb = lambda g, w, v: perturbation.eigen_sam(g, v, 0.1, 0.5)
    devices = [
        one_by_hand(perturb, params, meshes.part(batches, 0, i), v)
        for i in range(DEVICES)
    ]
    given = [
        (jax.tree.leaves(d), sign * tree_math.vdot(epsilon, v), tree_math.norm(epsilon))
        for epsilon, _, sign, d in devices
    ]
    signs = {float(sign) for _, _, sign, _ in devices}
    assert signs == {-1, 1}  # else none would be turned
    assert_close(state[0].tracker.given, mean(given), 1e-5)


@pytest.mark.parametrize(
    ("mode", "per_device"),
    [
        ("pmap", True),
        ("shard_map unchecked", False),
        pytest.param("pmap", False, marks=pytest.mark.slow),
        pytest.param("shard_map unchecked", True, marks=pytest.mark.slow),
    ],
)
def test_replicas_stay_identical_for_a_thousand_steps(mode, per_device):
    params = meshes.parameters()
    batches = jax.tree.map(
        lambda x: jnp.tile(x, (50, *[1] * (x.ndim - 1))), meshes.batches(20)
    )
    make = partial(chain, trackers.secant(), per_device=per_device)
    out = MANUAL[mode](make, params, batches, per_device=per_device)
    _, state = one_of_each(out)
    assert state[0].num_updates == 1000
    assert np.isfinite(optax.tree.get(state, "eigenvalue"))


@pytest.mark.parametrize("per_device", [False, True])
def test_a_bad_batch_on_one_device_leaves_all_finite_and_alike(per_device):
    params, (inputs, labels) = meshes.parameters(), meshes.batches(6)
    inputs = inputs.at[3, :4].set(jnp.nan)

    def make(**axis):
        link = eigen_sam(0.1, 0.5, trackers.secant(), per_device=per_device, **axis)
        return optax.chain(link, optax.apply_if_finite(optax.sgd(0.05), 5))

    out = meshes.by_pmap(make, params, (inputs, labels), per_device=per_device)
    trained, state = one_of_each(out)
    assert state[1].total_notfinite == 1
    numbers = (trained, state[0].tracker, state[1].inner_state)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(numbers))


# --- placement ------------------------------------------------------------------------


def of_trackers(other, others, *, all_trackers_of):
    """Every tracker with one of the `others`, the rest in `pytest -m slow` only.

    "secant every 5" has the state and the products of "secant".
    """
    in_short = [(name, all_trackers_of) for name in TRACKERS if "every" not in name]
    in_short += [(name, x) for name in ("secant", "ritz") for x in others]
    rows = [(name, x) for name in TRACKERS for x in others]
    marks = {row: () if row in in_short else pytest.mark.slow for row in rows}
    params = [pytest.param(*row, marks=marks[row]) for row in rows]
    return pytest.mark.parametrize(("name", other), params, ids=str)


@of_trackers("kind", (AxisType.Auto, AxisType.Explicit), all_trackers_of=AxisType.Auto)
def test_the_state_lies_where_the_parameters_do(name, kind):
    mesh = meshes.mesh(kind)
    # Written as what is computed has it: with another spec for the same, jit compiles
    # the step again.
    in_full = lambda x: P(AXIS, *(None,) * (x.ndim - 1))
    spec = lambda x: NamedSharding(
        mesh, in_full(x) if kind == AxisType.Explicit else P(AXIS)
    )
    params = meshes.parameters()
    params = jax.device_put(params, jax.tree.map(spec, params))
    batches = jax.device_put(meshes.batches(3), NamedSharding(mesh, P(None, AXIS)))
    # Of optax's own states, momentum would lose its sharding on an Auto mesh.
    tx = optax.chain(eigen_sam(0.1, 0.5, TRACKERS[name]), optax.sgd(0.05))
    loss = meshes.loss if kind == AxisType.Auto else meshes.gathering_loss
    step = jax.jit(partial(meshes.step, tx, loss=loss), donate_argnums=(0, 1))
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(params)
        placed = jax.tree.map(lambda x: x.sharding, state)
        vectors = [x for x in jax.tree.leaves(state) if x.size > 9]
        assert len(vectors) >= 3
        assert all(x.sharding.spec[0] == AXIS for x in vectors)
        total = sum(x.nbytes for x in jax.tree.leaves(state))
        on_one = sum(
            x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state)
        )
        scalars = sum(x.nbytes for x in jax.tree.leaves(state) if x.size <= 9)
        assert on_one == (total - scalars) / DEVICES + scalars
        for i in range(3):
            tracked = state[0].tracker
            if name.startswith("secant"):  # its λ is only looked at: it is no input
                tracked = tracked.eigenvector, tracked.moments
            before = (params, tracked)
            params, state = step(params, state, meshes.part(batches, i))
            assert all(x.is_deleted() for x in jax.tree.leaves(before))
    assert step._cache_size() == 1
    after = jax.tree.map(lambda x: x.sharding, state)
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b, x: a.is_equivalent_to(b, x.ndim), placed, after, state
        )
    )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_outside_jit_the_whole_chains_state_lies_where_the_parameters_do(kind):
    mesh = meshes.mesh(kind)
    params = jax.device_put(meshes.parameters(), NamedSharding(mesh, P(AXIS)))
    for tracker in TRACKERS.values():
        state = chain(tracker).init(params)  # with momentum
        vectors = [x for x in jax.tree.leaves(state) if x.size > 9]
        assert len(vectors) >= 6
        assert all(x.sharding.spec[0] == AXIS for x in vectors)


@of_trackers("spec", (P(AXIS), P(None, AXIS)), all_trackers_of=P(None, AXIS))
def test_no_parameter_is_gathered(name, spec):
    params = jax.device_put(
        {"a": jnp.ones((64, 512)), "b": jnp.ones((8, 4096))},
        NamedSharding(meshes.mesh(), spec),
    )
    tx = chain(TRACKERS[name])
    apart = lambda p, _: sum(jnp.sum(jnp.cos(x)) for x in p.values())  # by element
    step = partial(meshes.step, tx, loss=apart)
    state = jax.jit(tx.init)(params)
    text = jax.jit(step).lower(params, state, None).compile().as_text()
    sent = collectives.sizes(text)
    assert sent  # the norms
    # Partial sums of rows, at the most, one for each device.
    assert max(sent) <= 4 * 64 * DEVICES * 6


# --- what is sent ---------------------------------------------------------------------


def sent(make, per_device=False, **extra):
    """Bytes of gradients that a data-parallel step sends, in copies of the parameters.

    Outside conditionals, and inside them.
    """
    tx = make(axis_name=AXIS, per_device=per_device)
    params = {"w": jnp.ones((64, 256))}
    loss = lambda p, batch: jnp.mean(jnp.cos(batch @ p["w"]))
    step = partial(
        meshes.step, tx, axes=(AXIS,), per_device=per_device, loss=loss, **extra
    )
    mapped = jax.shard_map(
        step, mesh=meshes.mesh(), in_specs=(P(), P(), P(AXIS)), out_specs=P()
    )
    compiled = (
        jax.jit(mapped).lower(params, tx.init(params), jnp.ones((32, 64))).compile()
    )
    branches = meshes.by_branch(compiled.as_text())
    sizes = [sum(collectives.sizes(text)) for text in branches]
    return [round(size / params["w"].nbytes, 2) for size in sizes]


def test_a_step_sends_no_more_gradients_than_it_must():
    of_sam = lambda **kw: sam(0.1, **kw)
    of = lambda tracker: lambda **kw: eigen_sam(0.1, 0.5, tracker, **kw)
    assert sent(of_sam) == [2, 0]
    assert sent(of_sam, per_device=True) == [1, 0]
    every_5 = of(trackers.secant(0.9, update_interval=5))
    assert sent(of(trackers.secant())) == [2, 0]
    assert sent(every_5) == [2, 0]
    assert sent(of(trackers.secant()), per_device=True) == [2, 0]
    assert sent(every_5, per_device=True) == [1, 1]
    assert sent(every_5, per_device=True, refresh=False) == [1, 0]
    assert sent(of(trackers.power_iteration(3)), refresh=False) == [2, 0]
    # A loop's body counts once.
    assert sent(of(trackers.power_iteration(3)), refresh=True) == [3, 0]
    assert sent(of(trackers.power_iteration(3))) == [2, 1]
    assert sent(of(trackers.lanczos(3)), per_device=True) == [1, 1]
    assert sent(of(trackers.ritz())) == [2, 1]
    assert sent(of(trackers.ritz()), per_device=True) == [2, 1]


# --- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize("make", [sam, asam, eigen_sam])
def test_bad_axes_are_refused_where_they_are_given(make):
    for bad in (0, (), ("a", 1), ("a", "a"), ["a"], {}):
        with pytest.raises(ValueError, match="axis_name must be a string, a tuple"):
            make(axis_name=bad)
    with pytest.raises(ValueError, match=r"per_device=True needs axis_name.*jax\.vmap"):
        make(per_device=True)


def test_an_axis_that_is_none_is_refused():
    tx, w = sam(axis_name="nowhere"), jnp.ones(3)
    with pytest.raises(
        ValueError, match=r"'nowhere' is not an axis here.*leave axis_name"
    ):
        tx.update(w, tx.init(w), w, value_fn=jnp.sum)


def test_what_shard_map_knows_to_be_wrong_is_refused():
    params, batches = meshes.parameters(), meshes.batches(1)
    local = partial(chain, trackers.secant(), per_device=True)
    whole = partial(chain, trackers.secant())
    with pytest.raises(ValueError, match=r"updates are the same on all.*to='varying'"):
        meshes.by_shard_map(local, params, batches, per_device=True, own=False)
    with pytest.raises(ValueError, match=r"updates differ between.*pmean"):
        meshes.by_shard_map(whole, params, batches, per_device=True)


@pytest.mark.parametrize("name", ["value_fn", "curvature_fn", "grad_fn"])
def test_the_sum_over_devices_is_not_taken_for_the_mean(name):
    """What a loss of one device's batch has for a gradient at shared parameters."""
    params, batches = meshes.parameters(), meshes.batches(1)
    tx = chain(trackers.power_iteration())

    def updated(params, batch):
        mean = lambda p: jax.lax.pmean(meshes.loss(p, batch), AXIS)
        own = lambda p: meshes.loss(p, batch)
        wrong = jax.value_and_grad(own) if name == "grad_fn" else own
        functions = {"value_fn": mean, name: wrong}
        grads = jax.grad(mean)(params)
        return tx.update(grads, tx.init(params), params, **functions)[0]

    mapped = jax.shard_map(
        updated, mesh=meshes.mesh(), in_specs=(P(), P(AXIS)), out_specs=P()
    )
    with pytest.raises(ValueError, match=rf"{name} differs .*'data'.*sum.*pmean"):
        mapped(params, meshes.part(batches, 0))


MEASURES = {
    "sharpness": lambda f, w, _: diagnostics.sharpness(f, w),
    "worst_case": lambda f, w, _: diagnostics.worst_case_sharpness(f, w, 0.1),
    "drift": lambda _, w, batches: sde.drift(meshes.loss, w, batches, 0.1, order=2),
}


@pytest.mark.parametrize("name", MEASURES)
def test_no_measure_takes_the_sum_over_devices_for_the_mean(name):
    params, batches = meshes.parameters(), meshes.batches(2)

    def measured(params, batches):
        own = lambda p: meshes.loss(p, meshes.part(batches, 0))
        return MEASURES[name](own, params, batches)

    mapped = jax.shard_map(
        measured, mesh=meshes.mesh(), in_specs=(P(), P(None, AXIS)), out_specs=P()
    )
    with pytest.raises(ValueError, match=r"value_fn differs .*'data'.*sum.*pmean"):
        mapped(params, batches)


def test_each_device_may_train_parameters_of_its_own():
    params, batches = meshes.parameters(), meshes.batches(3)
    tx = chain(trackers.secant())

    def train(params, batches):
        carry = params, tx.init(params)
        for number in range(3):
            carry = meshes.step(tx, *carry, meshes.part(batches, number))
        return carry

    def mapped(params, batches):
        own = jax.lax.pcast(params, AXIS, to="varying")
        return jax.tree.map(lambda x: x[None], train(own, batches))

    mapped = jax.shard_map(
        mapped, mesh=meshes.mesh(), in_specs=(P(), P(None, AXIS)), out_specs=P(AXIS)
    )
    got, by_itself = jax.jit(mapped)(params, batches), jax.jit(train)
    for device in (0, 7):
        alone = jax.tree.map(lambda x, i=device: x[:, i], meshes.split(batches))
        expected = by_itself(params, alone)
        assert_close(jax.tree.map(lambda x, i=device: x[i], got), expected, 1e-5)


def test_two_axes_are_one_when_both_are_named():
    params, batches = meshes.parameters(), meshes.batches(3)
    axes = ("host", "chip")
    mesh = jax.make_mesh((2, 4), axes, axis_types=(AxisType.Auto,) * 2)
    tx = chain(trackers.secant(), axis_name=axes)
    train = partial(meshes.run, partial(meshes.step, tx, axes=axes))
    mapped = jax.shard_map(
        train, mesh=mesh, in_specs=(P(), P(), P(None, axes)), out_specs=P()
    )
    got = jax.jit(mapped)(params, tx.init(params), batches)
    make = partial(chain, trackers.secant())
    assert_close(got, meshes.one_device(make, params, batches), 1e-5)
