"""Networks with batch normalisation and dropout: what a step may move, and how."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

from eigensam_jax import eigen_sam, perturbation, sam, trackers, tree_math
from eigensam_jax.linen import TrainState
from eigensam_jax.nnx import value_fn

IMAGES = jax.random.normal(jax.random.key(1), (4, 16, 5))
LABELS = jnp.arange(64).reshape(4, 16) % 3
CHAINS = {
    "sam": lambda: optax.chain(sam(0.1), optax.sgd(0.1)),
    "secant": lambda: optax.chain(eigen_sam(0.1, 0.5), optax.sgd(0.1)),
    "power_iteration": lambda: optax.chain(
        eigen_sam(0.1, 0.5, trackers.power_iteration(2, update_interval=2)),
        optax.sgd(0.1),
    ),
}
each_chain = pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS)


def cross_entropy(logits, i):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS[i])
    return losses.mean()


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b):
    allclose = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(allclose, a, b)


def raw(state):
    """An `nnx.State` of arrays, without the variables around them."""
    is_variable = lambda x: isinstance(x, nnx.Variable)
    return jax.tree.map(lambda x: x[...], state, is_leaf=is_variable)


# --- linen ----------------------------------------------------------------------------


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, momentum=0.9)(nn.Dense(8)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=False)(nn.relu(x)))


MODEL = Network()
KEYS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
VARIABLES = jax.jit(MODEL.init)(KEYS, IMAGES[0])


def linen_loss(params, stats, i):
    logits, new = MODEL.apply(
        {"params": params, "batch_stats": stats},
        IMAGES[i],
        rngs={"dropout": jax.random.key(i)},
        mutable=["batch_stats"],
    )
    return cross_entropy(logits, i), new["batch_stats"]


def linen_state(tx, kind=TrainState):
    return kind.create(
        apply_fn=MODEL.apply,
        params=VARIABLES["params"],
        tx=tx,
        **({"batch_stats": VARIABLES["batch_stats"]} if kind is TrainState else {}),
    )


@jax.jit
def linen_step(state, i):
    loss = partial(linen_loss, stats=state.batch_stats, i=i)
    grads, stats = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(
        grads=grads, value_fn=lambda p: loss(p)[0], batch_stats=stats
    )


@each_chain
def test_linen_is_the_loop_by_hand(make):
    state, tx = linen_state(make()), make()
    params, stats = VARIABLES["params"], VARIABLES["batch_stats"]
    opt_state = tx.init(params)

    @jax.jit
    def by_hand(params, stats, opt_state, i):
        loss = partial(linen_loss, stats=stats, i=i)
        grads, new = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(
            grads, opt_state, params, value_fn=lambda p: loss(p)[0]
        )
        return optax.apply_updates(params, updates), new, opt_state

    for i in range(4):
        _, of_a_plain_step = linen_loss(state.params, state.batch_stats, i)
        state = linen_step(state, i)
        params, stats, opt_state = by_hand(params, stats, opt_state, i)
        assert_equal((state.params, state.opt_state), (params, opt_state))
        assert_close(state.batch_stats, of_a_plain_step)
        assert_equal(state.batch_stats, stats)
    assert state.step == 4


@pytest.mark.parametrize("whole", [True, False])
def test_linen_on_a_mesh_compiles_once_if_the_whole_state_is_there(whole):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.NamedSharding(mesh, jax.P())
    state = linen_state(CHAINS["secant"]())
    if whole:
        state = jax.device_put(state, replicated)
    else:
        state = state.replace(params=jax.device_put(state.params, replicated))
    step = jax.jit(lambda state, i: linen_step(state, i))  # a cache of its own
    for i in range(3):
        state = step(state, i)
    assert step._cache_size() == (1 if whole else 2)


def test_linen_hands_extra_arguments_to_the_transformation_and_fields_to_replace():
    seen = {}

    def update(updates, state, params=None, **extra_args):
        seen.update(extra_args)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
    state = linen_state(tx)
    grads = jax.tree.map(jnp.zeros_like, state.params)
    functions = {name: lambda p: p for name in ("value_fn", "grad_fn", "curvature_fn")}
    state = state.apply_gradients(
        grads=grads,
        **functions,
        extra_args={"refresh": True, "value": 3.0},
        batch_stats=None,
    )
    assert seen == {**functions, "refresh": True, "value": 3.0}
    assert state.batch_stats is None
    assert state.step == 1


def test_linen_says_where_arguments_of_the_transformation_go():
    state = linen_state(optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"got value, .* as extra_args=\{'value': …\}"):
        state.apply_gradients(grads=state.params, value=1.0)


def test_linen_without_a_loss_is_flaxs_own():
    tx = optax.adam(0.1)
    state, own = linen_state(tx), linen_state(tx, train_state.TrainState)
    grads = jax.tree.map(jnp.ones_like, state.params)
    for _ in range(2):
        state, own = (x.apply_gradients(grads=grads) for x in (state, own))
    assert_equal((state.params, state.opt_state), (own.params, own.opt_state))


def test_linen_without_a_loss_overwrites_what_flax_overwrites():
    params = {"params": jnp.ones(2), OVERWRITE_WITH_GRADIENT: {"scale": jnp.ones(3)}}
    grads = jax.tree.map(lambda x: 2 * x, params)
    ends = [
        cls.create(apply_fn=None, params=params, tx=optax.sgd(0.1)).apply_gradients(
            grads=grads
        )
        for cls in (TrainState, train_state.TrainState)
    ]
    assert_equal(*((end.params, end.opt_state) for end in ends))
    assert isinstance(ends[0], TrainState)


@pytest.mark.filterwarnings("ignore:The Fp8DotGeneralOp is deprecated")
@pytest.mark.parametrize(
    ("op", "given"),
    [
        (nn.Fp8DirectDotGeneralOp, "value"),
        (nn.Fp8DirectDotGeneralOp, "gradient"),
        (nn.Fp8DotGeneralOp, "value and gradient"),
        *(
            pytest.param(op, given, marks=pytest.mark.slow)
            for op, given in [
                (nn.Fp8DirectDotGeneralOp, "value and gradient"),
                (nn.Fp8DotGeneralOp, "value"),
                (nn.Fp8DotGeneralOp, "gradient"),
            ]
        ),
    ],
)
def test_linen_perturbs_no_scales_and_histories_of_fp8(op, given):
    """The weights descend along ∇L(w + ε); the rest is what Flax's own makes of it."""

    class Low(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(8, dot_general_cls=op)(x))
            return nn.Dense(3, dot_general_cls=op)(x)

    model, rho = Low(), 0.1
    tx = optax.chain(eigen_sam(rho, 0.5), optax.sgd(1.0))
    create = partial(TrainState.create, apply_fn=model.apply)
    start = model.init(jax.random.key(0), IMAGES[0])
    state = create(params=start, tx=tx)

    @jax.jit
    def step(state, i):
        loss = lambda params: cross_entropy(model.apply(params, IMAGES[i]), i)
        function = {
            "value": {"value_fn": loss},
            "gradient": {"grad_fn": jax.grad(loss)},
            "value and gradient": {"grad_fn": jax.value_and_grad(loss)},
        }[given]
        grads = jax.grad(loss)(state.params)
        new = state.apply_gradients(grads=grads, **function)
        plain = train_state.TrainState.create(
            apply_fn=model.apply, params=state.params, tx=optax.sgd(1.0)
        ).apply_gradients(grads=grads)
        return new, plain.params, grads

    def sharp(w):
        return cross_entropy(model.apply(start | {"params": w}, IMAGES[0]), 0)

    w, gradient = start["params"], jax.jit(jax.grad(sharp))
    g = gradient(w)  # the first step is SAM's, as there is no v yet
    at = jax.tree.map(lambda x, d: x + rho * d / optax.tree.norm(g), w, g)
    expected = jax.tree.map(lambda x, d: x - d, w, gradient(at))
    assert_close(step(state, 0)[0].params["params"], expected)

    for i in range(3):
        state, plain, grads = step(state, i)
        overwritten = state.params[OVERWRITE_WITH_GRADIENT]
        assert_equal(overwritten, plain[OVERWRITE_WITH_GRADIENT])
        assert_equal(overwritten, grads[OVERWRITE_WITH_GRADIENT])
        assert all(jnp.all(x >= 0) for x in jax.tree.leaves(overwritten))
        assert jax.tree.structure(state.params) == jax.tree.structure(start)
        norm = optax.tree.norm(grads["params"])
        assert_close(optax.tree.get(state.opt_state, "grad_norm"), norm)
        v = optax.tree.get(state.opt_state, "eigenvector")
        assert jax.tree.structure(v) == jax.tree.structure(grads["params"])
    assert any(jnp.any(x > 0) for x in jax.tree.leaves(overwritten))


def test_linen_takes_fields_without_defaults_in_subclasses():
    """As Flax's ImageNet example has them, and with `batch_stats` declared anew."""

    class Scaled(TrainState):
        dynamic_scale: object

    class Anew(TrainState):
        batch_stats: object
        dynamic_scale: object

    for kind in (Scaled, Anew):
        state = kind.create(
            apply_fn=MODEL.apply,
            params=VARIABLES["params"],
            tx=CHAINS["secant"](),
            batch_stats=VARIABLES["batch_stats"],
            dynamic_scale=None,
        )
        state = linen_step(state, 0)
        assert_equal(
            state.params, linen_step(linen_state(CHAINS["secant"]()), 0).params
        )
        assert isinstance(state, kind)
        restored = serialization.from_bytes(state, serialization.to_bytes(state))
        assert_equal(restored.batch_stats, state.batch_stats)
    create = partial(TrainState.create, apply_fn=None, params=jnp.ones(2), tx=sam())
    assert create().batch_stats is None


def test_linen_says_what_is_missing():
    state = linen_state(CHAINS["secant"]())
    grads = jax.tree.map(jnp.ones_like, state.params)
    with pytest.raises(ValueError, match="update needs value_fn or grad_fn"):
        state.apply_gradients(grads=grads)


# --- nnx ------------------------------------------------------------------------------


class NnxNetwork(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(5, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


def nnx_loss(model, i):
    return cross_entropy(model(IMAGES[i]), i)


@nnx.jit
def nnx_step(model, optimizer, i):
    loss = partial(nnx_loss, i=i)
    at_clean_pass = value_fn(model, loss)
    grads = nnx.grad(loss)(model)
    optimizer.update(model, grads, value_fn=at_clean_pass)


@each_chain
def test_nnx_moves_statistics_and_counts_as_a_plain_step_does(make):
    model = NnxNetwork(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make(), wrt=nnx.Param)
    tx = make()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest = raw(params), jax.tree.map(jnp.copy, rest)  # not the live model's
    opt_state = tx.init(params)

    @jax.jit
    def by_hand(params, rest, opt_state, i):
        def loss(params):
            model = nnx.merge(graphdef, params, rest, copy=True)
            value = nnx_loss(model, i)
            return value, nnx.state(model, nnx.Not(nnx.Param))

        grads, moved = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(
            grads, opt_state, params, value_fn=lambda p: loss(p)[0]
        )
        return optax.apply_updates(params, updates), moved, opt_state

    for i in range(4):
        nnx_step(model, optimizer, i)
        params, rest, opt_state = by_hand(params, rest, opt_state, i)
        assert_close(raw(nnx.state(model, nnx.Param)), params)
        moved = nnx.filter_state(rest, nnx.BatchStat)
        assert_equal(nnx.state(model, nnx.BatchStat), moved)
        assert model.dropout.rngs.count[...] == i + 1


def test_nnx_value_fn_leaves_the_live_model_alone_and_repeats_itself():
    model = NnxNetwork(nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, raw(nnx.state(model, nnx.Not(nnx.RngKey))))
    of_batch = value_fn(model, partial(nnx_loss, i=0))
    params = nnx.state(model, nnx.Param)
    first, again = of_batch(params), of_batch(raw(params))
    assert first == again  # the same mask, from Param nodes and from arrays
    assert_equal(raw(nnx.state(model, nnx.Not(nnx.RngKey))), before)
    assert nnx_loss(model, 0) == first  # the clean pass draws it as well
    assert nnx_loss(model, 0) != first
    assert of_batch(params) == first  # whatever the live model has done since


@pytest.mark.parametrize("swap", [True, False])
def test_nnx_value_fn_refuses_what_is_no_loss(swap):
    model = NnxNetwork(nnx.Rngs(0))
    given = (nnx_loss, model) if swap else (model, nnx_loss(model, 0))
    with pytest.raises(ValueError, match="loss_fn must be a function of the model"):
        value_fn(*given)


def test_nnx_parameters_of_another_kind():
    model = NnxNetwork(nnx.Rngs(0))
    only_last = nnx.All(nnx.Param, nnx.PathContains("last"))
    optimizer = nnx.Optimizer(model, CHAINS["secant"](), wrt=only_last)
    first = jnp.copy(model.first.kernel[...])
    loss = partial(nnx_loss, i=0)
    of_batch = value_fn(model, loss, wrt=only_last)
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, only_last))(model)
    last = jnp.copy(model.last.kernel[...])
    at_first = nnx.state(model, only_last)
    clean = jax.grad(of_batch)(at_first)
    perturbed = tree_math.add_scaled(at_first, 1, perturbation.sam(clean, 0.1).epsilon)
    sharp = raw(jax.grad(of_batch)(perturbed))
    optimizer.update(model, grads, value_fn=of_batch)
    assert_equal(model.first.kernel[...], first)
    moved = last - 0.1 * sharp["last"]["kernel"]  # there is no v yet: a step of SAM
    assert_close(model.last.kernel[...], moved)
    assert (
        jnp.linalg.norm(sharp["last"]["kernel"] - raw(clean)["last"]["kernel"]) > 0.01
    )


class GivenRngs(nnx.Module):
    """Dropout by the random numbers of each call, as in Flax's MNIST example."""

    def __init__(self, rngs):
        self.first = nnx.Linear(5, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x, rngs):
        return self.last(self.dropout(nnx.relu(self.first(x)), rngs=rngs))


def test_nnx_loss_that_is_given_rngs_draws_the_same_masks_in_both_passes():
    def loss_fn(model, rngs, batch):
        logits = model(batch["image"], rngs)
        return cross_entropy(logits, batch["index"])

    @nnx.jit
    def step(model, optimizer, rngs, batch):
        at_clean_pass = value_fn(model, loss_fn, rngs, batch)
        loss, grads = nnx.value_and_grad(loss_fn)(model, rngs, batch)
        optimizer.update(model, grads, value_fn=at_clean_pass)
        return loss

    model, rngs = GivenRngs(nnx.Rngs(0)), nnx.Rngs(dropout=1)
    tx = optax.chain(sam(0.0), optax.sgd(0.1))  # the passes differ in nothing else
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    plain = GivenRngs(nnx.Rngs(0)), nnx.Rngs(dropout=1)
    for i in range(3):
        batch = {"image": IMAGES[i], "index": i}
        expected = loss_fn(*plain, batch)
        loss = step(model, optimizer, rngs, batch)
        assert_close(loss, expected)
        assert loss == optax.tree.get(optimizer.opt_state, "perturbed_value")[...]
        assert rngs.dropout.count[...] == i + 1
        nnx.update(plain[0], nnx.state(model))
    same_mask = value_fn(model, loss_fn, nnx.Rngs(dropout=1), batch)
    other_mask = value_fn(model, loss_fn, rngs, batch)
    params = nnx.state(model, nnx.Param)
    assert same_mask(params) == same_mask(params)
    assert same_mask(params) != other_mask(params)
