"""One training run on one device and on eight, in every way that JAX has for it."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

DEVICES = 8
AXIS = "data"
REPLICATED = P()


def parameters(dtype=jnp.float32):
    """A small tanh network whose every leaf divides among eight devices."""
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "hidden": {
            "w": 0.4 * jax.random.normal(keys[0], (8, 16), dtype),
            "b": jnp.zeros(16, dtype),
        },
        "out": 0.4 * jax.random.normal(keys[1], (16, 8), dtype),
    }


def batches(steps, dtype=jnp.float32, seed=1):
    """Inputs and labels of `steps` batches of 32, an axis of steps before them."""
    rng = np.random.default_rng(seed)
    inputs = jnp.asarray(rng.normal(size=(steps, 32, 8)), dtype)
    return inputs, jnp.asarray(rng.integers(0, 8, (steps, 32)))


def split(batches):
    """An axis of devices after that of steps."""
    return jax.tree.map(lambda x: x.reshape(len(x), DEVICES, -1, *x.shape[2:]), batches)


def part(batches, step, group=None):
    """The batch of a step, or what one of the devices gets of it."""
    if group is None:
        return jax.tree.map(lambda x: x[step], batches)
    return jax.tree.map(lambda x: x[step, group], split(batches))


def loss(params, batch):
    inputs, labels = batch
    hidden = jnp.tanh(inputs @ params["hidden"]["w"] + params["hidden"]["b"])
    logits = hidden @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def gathering_loss(params, batch):
    """What Explicit meshes want to be told: the weights are gathered for their use."""
    whole = lambda x: jax.sharding.reshard(x, P(*(None,) * x.ndim))
    return loss(jax.tree.map(whole, params), batch)


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((DEVICES,), (AXIS,), axis_types=(kind,))


def step(
    tx, params, state, batch, axes=(), *, per_device=False, own=True, loss=loss, **extra
):
    """One update; `own` casts the parameters as shard_map's check wants them."""
    value_fn = lambda p: loss(p, batch)
    at = jax.lax.pcast(params, axes, to="varying") if axes and own else params
    grads = jax.grad(value_fn)(at)
    if axes and not per_device:
        grads = jax.lax.pmean(grads, axes)
    updates, state = tx.update(grads, state, params, value_fn=value_fn, **extra)
    return optax.apply_updates(params, updates), state


def run(step, params, state, batches):
    """All steps under `scan`."""
    body = lambda carry, batch: (step(*carry, batch), None)
    return jax.lax.scan(body, (params, state), batches)[0]


def one_device(make, params, batches, **extra):
    tx = make()
    train = partial(run, partial(step, tx, **extra))
    return jax.jit(train)(params, tx.init(params), batches)


def by_pmap(make, params, batches, per_device=False, **extra):
    """With a leading axis of devices on what comes out."""
    tx = make(axis_name=AXIS)
    kwargs = {"axes": (AXIS,), "per_device": per_device, "own": False, **extra}
    train = partial(run, partial(step, tx, **kwargs))
    return jax.pmap(train, axis_name=AXIS, in_axes=(None, None, 1))(
        params, tx.init(params), split(batches)
    )


def by_shard_map(make, params, batches, check_vma=True, per_device=False, **extra):
    """As `by_pmap` without the check of varying values, for there it can differ."""
    tx = make(axis_name=AXIS)
    train = partial(
        run, partial(step, tx, axes=(AXIS,), per_device=per_device, **extra)
    )
    stacked = lambda *args: jax.tree.map(lambda x: x[None], train(*args))
    mapped = jax.shard_map(
        train if check_vma else stacked,
        mesh=mesh(),
        in_specs=(P(), P(), P(None, AXIS)),
        out_specs=P() if check_vma else P(AXIS),
        check_vma=check_vma,
    )
    return jax.jit(mapped)(params, tx.init(params), batches)


def by_jit(make, params, batches, params_spec=REPLICATED, kind=AxisType.Auto, **extra):
    """Data parallel, or with sharded parameters, and the rest left to the compiler."""
    tx, of_mesh = make(), partial(NamedSharding, mesh(kind))
    params = jax.device_put(params, of_mesh(params_spec))
    batches = jax.device_put(batches, of_mesh(P(None, AXIS)))
    of_kind = loss if kind == AxisType.Auto else gathering_loss
    train = partial(run, partial(step, tx, loss=of_kind, **extra))
    with jax.set_mesh(mesh(kind)):
        state = jax.jit(tx.init)(params)
        return jax.jit(train)(params, state, batches)


def by_vmap(make, params, batches, per_device=False, **extra):
    """On one device, groups of the batch in place of devices."""
    tx = make(axis_name=AXIS)
    kwargs = {"axes": (AXIS,), "per_device": per_device, "own": False, **extra}
    train = partial(run, partial(step, tx, **kwargs))
    mapped = jax.vmap(train, in_axes=(None, None, 1), out_axes=None, axis_name=AXIS)
    return jax.jit(mapped)(params, tx.init(params), split(batches))


MODES = {
    "pmap": by_pmap,
    "shard_map": by_shard_map,
    "shard_map unchecked": partial(by_shard_map, check_vma=False),
    "jit, data parallel": by_jit,
    "jit, sharded, Auto": partial(by_jit, params_spec=P(AXIS)),
    "jit, sharded, Explicit": partial(
        by_jit, params_spec=P(AXIS), kind=AxisType.Explicit
    ),
    "vmap": by_vmap,
}


def by_branch(text):
    """Of an optimized HLO module, what always runs, and what conditionals decide on."""
    computation = r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}"
    computations = dict(re.findall(computation, text, re.M | re.S))
    called = r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)"
    branches = r"(?:branch_computations=\{(.*?)\}|(?:true|false)_computation=(\S+),?)"
    names = lambda text: re.findall(r"[\w.\-]+", text)
    inside = {
        name
        for body in computations.values()
        for groups in re.findall(branches, body)
        for name in names(" ".join(groups))
    }
    size = -1
    while size < len(inside):
        size = len(inside)
        for name in tuple(inside):
            inside |= set(re.findall(called, computations.get(name, "")))
    return [
        "\n".join(body for name, body in computations.items() if (name in inside) == at)
        for at in (False, True)
    ]
