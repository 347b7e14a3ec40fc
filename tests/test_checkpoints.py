"""The optimizer's state in checkpoints, by flax.serialization and by orbax."""

import random
import signal
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import chex
import flax.linen as nn
import interrupted
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from eigensam_jax import asam, eigen_sam, sam, trackers, tree_math
from eigensam_jax.linen import TrainState
from eigensam_jax.nnx import value_fn

LINKS = {
    "sam": lambda: sam(0.1),
    "asam": lambda: asam(0.5),
    "secant": lambda: eigen_sam(0.1, 0.5, trackers.secant()),
    "power_iteration": lambda: eigen_sam(0.1, 0.5, trackers.power_iteration(2, 2)),
    "lanczos": lambda: eigen_sam(0.1, 0.5, trackers.lanczos(2, 2)),
    "ritz": lambda: eigen_sam(0.1, 0.5, trackers.ritz(update_interval=2)),
}
BATCHES = meshes.batches(4)
QUICKLY = {"xla_backend_optimization_level": 0}  # half as long to compile


def chain(name):
    return optax.chain(LINKS[name](), optax.sgd(0.05, momentum=0.9))


@cache
def trained(name):
    """A chain, its compiled step, and parameters and state after three of them."""
    tx, params = chain(name), meshes.parameters()
    at, batch = (params, tx.init(params)), meshes.part(BATCHES, 0)
    lowered = jax.jit(partial(meshes.step, tx)).lower(*at, batch)
    step = lowered.compile(QUICKLY)
    for i in range(3):
        at = step(*at, meshes.part(BATCHES, i))
    return tx, step, at


def assert_same(got, expected):
    """Structure, dtypes and every bit, of NaN too."""
    chex.assert_trees_all_equal_structs(got, expected)
    for (path, x), y in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        x, y, where = np.asarray(x), np.asarray(y), jax.tree_util.keystr(path)
        assert (x.dtype, x.shape) == (y.dtype, y.shape), where
        assert x.tobytes() == y.tobytes(), where


def by_flax(tree, like, folder):
    (folder / "checkpoint").write_bytes(serialization.to_bytes(tree))
    return serialization.from_bytes(like, (folder / "checkpoint").read_bytes())


def by_orbax(tree, like, folder):
    with ocp.CheckpointManager(folder) as manager:
        manager.save(3, args=ocp.args.StandardSave(tree))
    with ocp.CheckpointManager(folder) as manager:
        args = ocp.args.StandardRestore(like)
        return manager.restore(manager.latest_step(), args=args)


ways = pytest.mark.parametrize("way", [by_flax, by_orbax], ids=["flax", "orbax"])


# --- the state ------------------------------------------------------------------------


@ways
@pytest.mark.parametrize(
    "name",  # the states of "asam" and "lanczos" are those of others
    [
        pytest.param(x, marks=pytest.mark.slow if x in ("asam", "lanczos") else ())
        for x in LINKS
    ],
)
def test_a_restored_state_is_the_same_and_so_is_the_next_step(name, way, tmp_path):
    tx, step, at = trained(name)
    params = meshes.parameters()
    restored = way(at, (params, tx.init(params)), tmp_path)
    assert_same(restored, at)
    assert_same(
        step(*restored, meshes.part(BATCHES, 3)), step(*at, meshes.part(BATCHES, 3))
    )


@ways
def test_bfloat16_and_a_mask_keep_their_dtypes(way, tmp_path):
    params = meshes.parameters(jnp.bfloat16)
    mask = {"hidden": {"w": True, "b": False}, "out": True}
    tx = optax.chain(eigen_sam(mask=mask), optax.sgd(0.05, momentum=0.9))
    at = params, jax.tree.map(lambda x: x + 1, tx.init(params))
    dtypes = {x.dtype.name for x in jax.tree.leaves(at)}
    assert dtypes == {"bfloat16", "float32", "int32"}
    assert_same(way(at, (params, tx.init(params)), tmp_path), at)


# --- other devices --------------------------------------------------------------------


def over(devices, tree):
    """The tree on a mesh of so many devices, the first axis of each leaf divided."""
    mesh = jax.make_mesh(
        (devices,),
        (meshes.AXIS,),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[:devices],
    )
    return jax.device_put(tree, NamedSharding(mesh, P(meshes.AXIS)))


def like_on(tx, params):
    """What orbax is to restore, and where: as the parameters, and scalars everywhere.

    `tx.init` leaves scalars on the first device, from where `jit` may move them; orbax
    would put them there for good.
    """
    everywhere = NamedSharding(jax.tree.leaves(params)[0].sharding.mesh, P())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=x.sharding if x.committed else everywhere
        ),
        (params, tx.init(params)),
    )


@pytest.mark.parametrize(("before", "after"), [(8, 4), (8, 2), (8, 1), (1, 8)])
def test_a_state_is_restored_onto_another_number_of_devices(before, after, tmp_path):
    tx, step, trained_on_one = trained("secant")
    params = over(before, meshes.parameters())
    where = jax.tree.map(lambda x: x.sharding, like_on(tx, params))
    at = jax.device_put(trained_on_one, where)
    params = over(after, meshes.parameters())
    restored = by_orbax(at, like_on(tx, params), tmp_path)
    assert_same(restored, at)
    for name in ("eigenvector", "trace"):
        vector = optax.tree.get(restored[1], name)
        for x, p in zip(jax.tree.leaves(vector), jax.tree.leaves(params), strict=True):
            assert x.sharding.is_equivalent_to(p.sharding, p.ndim)
    if (before, after) not in ((8, 4), (1, 8)):
        return  # restored as it should be: two compilations show that it goes on
    batch = meshes.part(BATCHES, 3)
    onwards = jax.jit(partial(meshes.step, tx), compiler_options=QUICKLY)
    for x, y in zip(
        jax.tree.leaves(onwards(*restored, batch)),
        jax.tree.leaves(step(*trained_on_one, batch)),
        strict=True,
    ):
        off = np.linalg.norm(np.asarray(x) - np.asarray(y))
        assert off <= 1e-5 * np.linalg.norm(y)  # sums are split in other ways


# --- Flax -----------------------------------------------------------------------------


def squares(y):
    return jnp.mean((y - 1) ** 2)


def test_a_train_state_of_linen(tmp_path):
    model, x = nn.Dense(3), jnp.arange(8.0).reshape(4, 2)
    tx = chain("secant")

    def fresh():
        return TrainState.create(
            apply_fn=model.apply,
            params=model.init(jax.random.key(0), x)["params"],
            tx=tx,
            batch_stats={"mean": jnp.ones(3)},
        )

    @jax.jit
    def step(state):
        loss = lambda p: squares(model.apply({"params": p}, x))
        grads = jax.grad(loss)(state.params)
        return state.apply_gradients(grads=grads, value_fn=loss)

    state = step(fresh())
    for way in (by_orbax, by_flax):
        restored = way(state, fresh(), tmp_path)
        assert_same(restored.replace(step=jnp.asarray(restored.step)), state)
    assert_same(step(restored), step(state))


def test_an_optimizer_of_nnx(tmp_path):
    x = jnp.arange(8.0).reshape(4, 2)

    def fresh():
        model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, chain("secant"), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: squares(model(x))
        at_clean_pass = value_fn(model, loss)
        optimizer.update(model, nnx.grad(loss)(model), value_fn=at_clean_pass)

    pair, other = fresh(), fresh()
    step(*pair)
    nnx.update(other, by_orbax(nnx.state(pair), nnx.state(other), tmp_path))
    assert_same(nnx.state(other), nnx.state(pair))
    step(*pair)
    step(*other)
    assert_same(nnx.state(other), nnx.state(pair))


# --- a checkpoint without v -----------------------------------------------------------


@cache
def by_hand(tracker):
    """A step of a link alone, with the momentum that a loop keeps for itself."""
    link = LINKS[tracker]()

    @partial(jax.jit, compiler_options=QUICKLY)
    def step(params, state, momentum, batch):
        value_fn = lambda p: meshes.loss(p, batch)
        grads = jax.grad(value_fn)(params)
        grads, state = link.update(grads, state, params, value_fn=value_fn)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
        params = jax.tree.map(lambda w, m: w - 0.05 * m, params, momentum)
        return params, state, momentum

    return link.init, step


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("sgd", "secant"),
        ("power_iteration", "secant"),
        ("sam", "power_iteration"),
    ],
)
def test_a_checkpoint_without_v_is_gone_on_with(before, after):
    """The first link anew and the rest as it was: the loop by hand, momentum too."""
    if before == "sgd":
        params = meshes.parameters()
        updates, state = optax.sgd(0.05, momentum=0.9).update(
            jax.grad(meshes.loss)(params, meshes.part(BATCHES, 0)),
            optax.sgd(0.05, momentum=0.9).init(params),
        )
        params, rest = optax.apply_updates(params, updates), (state,)
    else:
        _, _, (params, state) = trained(before)
        rest = state[1:]
    tx, step, _ = trained(after)
    got = params, (tx.init(params)[0], *rest)
    init, step_by_hand = by_hand(after)
    expected = params, init(params), optax.tree.get(state, "trace")
    for i in range(4):
        batch = meshes.part(BATCHES, i)
        got, expected = step(*got, batch), step_by_hand(*expected, batch)
        chex.assert_trees_all_close(got[0], expected[0], rtol=1e-6, atol=1e-7)
    v = optax.tree.get(got[1], "eigenvector")
    np.testing.assert_allclose(tree_math.norm(v), 1, rtol=1e-5)


@ways
def test_a_checkpoint_of_another_tracker_is_refused_as_it_is(way, tmp_path):
    _, _, at = trained("power_iteration")
    params = meshes.parameters()
    with pytest.raises(ValueError, match="do not match"):
        way(at, (params, chain("secant").init(params)), tmp_path)


# --- a run that is killed -------------------------------------------------------------


@pytest.mark.parametrize(
    ("tracker", "backend", "seed"),
    [
        ("secant", "flax", 0),
        *(
            pytest.param(tracker, backend, seed, marks=pytest.mark.slow)
            for tracker in interrupted.TRACKERS
            for backend in interrupted.BACKENDS
            for seed in (1, 2, 3)
        ),
    ],
)
def test_a_run_that_was_killed_ends_as_one_that_was_not(
    tracker, backend, seed, tmp_path
):
    command = [sys.executable, "-W", "error", Path(interrupted.__file__)]
    command += [tracker, backend, tmp_path]
    last = random.Random(seed).randrange(1, interrupted.STEPS - 10)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) == last:
                break
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    resumed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 1 <= int(resumed.stdout.split()[0]) <= interrupted.STEPS
    with np.load(tmp_path / "end.npz") as end:
        got = list(end.values())
    assert_same(got, list(jax.tree.leaves(interrupted.train(tracker, None))))
