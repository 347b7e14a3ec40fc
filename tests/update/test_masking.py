"""Masks: what one may be, for trees of every kind, and what is refused."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from problems import mask_by_path

import eigensam_jax
from eigensam_jax import eigen_sam, info, sam
from eigensam_jax._update import arguments, masking

PARAMS = {"body": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, "head": jnp.ones(4)}


@pytest.mark.parametrize(
    ("mask", "selected"),
    [
        (None, (True, True, True)),
        ({"body": True, "head": False}, (True, True, False)),
        ({"body": {"w": True, "b": False}, "head": False}, (False, True, False)),
        ({"body": np.bool_(False), "head": np.bool_(True)}, (False, False, True)),
        (lambda p: jax.tree.map(lambda x: x.ndim > 1, p), (False, True, False)),
        (lambda p: {"body": False, "head": True}, (False, False, True)),
    ],
)
def test_a_mask_is_a_prefix_or_a_function(mask, selected):
    masking.check(mask)
    assert masking.subspace(mask, PARAMS).selected == selected  # leaves b, w, head


def test_select_embed_and_merge():
    space = masking.subspace({"body": {"w": False, "b": True}, "head": True}, PARAMS)
    leaves = space.select(PARAMS)
    assert [x.shape for x in leaves] == [(3,), (4,)]
    twice = [2 * x for x in leaves]
    merged = space.merge(twice, PARAMS)
    np.testing.assert_array_equal(merged["body"]["w"], np.ones((2, 3)))
    np.testing.assert_array_equal(merged["head"], np.full(4, 2))
    embedded = space.embed(twice, PARAMS)
    np.testing.assert_array_equal(embedded["body"]["w"], np.zeros((2, 3)))
    np.testing.assert_array_equal(embedded["body"]["b"], np.full(3, 2))


@pytest.mark.parametrize("factory", [sam, eigen_sam])
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (True, "bare bool, got True"),
        ("head", "mask must be a bool, got 'head'"),
        ({"body": 1, "head": False}, r"mask\['body'\] must be a bool, got 1"),
    ],
)
def test_what_can_be_no_mask_is_refused_by_the_factory(factory, mask, message):
    with pytest.raises(ValueError, match=message):
        factory(mask=mask)


@pytest.mark.parametrize("factory", [sam, eigen_sam])
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            {"tail": True},
            "not a prefix.*no bool for body/b, body/w, head, and no parameter for tail",
        ),
        (
            {"body": {"w": True}, "head": False},
            "not a prefix.*no bool for body/b, and no parameter for none",
        ),
        (
            {"body": True, "head": {"w": True}},
            "not a prefix.*no bool for head, and no parameter for head/w",
        ),
        ({"body": False, "head": False}, "selects no parameter"),
        (lambda p: True, "bare bool, got True"),
        (lambda p: {"body": "yes", "head": True}, r"mask\['body'\] .* got 'yes'"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_by_init(factory, mask, message):
    with pytest.raises(ValueError, match=message):
        factory(mask=mask).init(PARAMS)


# --- by name, for trees of every kind -------------------------------------------------


class Pair(NamedTuple):
    body: Any
    head: Any


class Network(nnx.Module):
    def __init__(self):
        self.body = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(2, 4, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.head(jnp.tanh(self.body(x)))


def nnx_state():
    return nnx.state(Network(), nnx.Param)


def equinox_module():
    eqx = pytest.importorskip("equinox")

    class Module(eqx.Module):
        body: eqx.nn.Linear
        head: eqx.nn.MLP

        def __call__(self, x):
            return self.head(self.body(x))

    key = jax.random.key(0)
    module = Module(eqx.nn.Linear(3, 2, key=key), eqx.nn.MLP(2, 4, 3, 1, key=key))
    return eqx.filter(module, eqx.is_inexact_array)


W, B, H = jnp.ones((2, 3)), jnp.ones(3), jnp.ones((3, 4))
IN_BODY, MATRICES = (True, True, False), (True, False, True)
TREES = {  # of which in the body, and matrices, leaf by leaf
    "dict": (lambda: {"body": {"a": W, "b": B}, "head": H}, IN_BODY, MATRICES),
    "frozen dict": (
        lambda: FrozenDict({"body": {"a": W, "b": B}, "head": H}),
        *(IN_BODY, MATRICES),
    ),
    "list": (lambda: [[W, B], H], IN_BODY, MATRICES),
    "tuple": (lambda: ((W, B), H), IN_BODY, MATRICES),
    "NamedTuple": (lambda: Pair([W, B], H), IN_BODY, MATRICES),
    "equinox module": (
        equinox_module,
        (True, True, False, False, False, False),
        (True, False, True, False, True, False),
    ),
    "nnx state": (nnx_state, (True, True, False, False), (False, True, False, True)),
    "pure nnx state": (
        lambda: nnx.as_pure(nnx_state()),
        *((True, True, False, False), (False, True, False, True)),
    ),
}


@pytest.mark.parametrize("as_function", [True, False])
@pytest.mark.parametrize("kind", TREES)
def test_one_recipe_masks_by_name_in_trees_of_every_kind(kind, as_function):
    make, in_body, matrices = TREES[kind]
    params = make()
    by_name = mask_by_path(lambda names, x: names[0] in ("body", "0"))
    by_shape = mask_by_path(lambda names, x: x.ndim > 1)
    for mask, selected in ((by_name, in_body), (by_shape, matrices)):
        tx = eigen_sam(mask=mask if as_function else mask(params))
        sizes = [x.size for x in jax.tree.leaves(params)]
        space = masking.subspace(mask if as_function else mask(params), params)
        assert space.selected == selected
        value_fn = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p))
        grads = jax.tree.map(jnp.ones_like, params)
        _, state = tx.update(grads, tx.init(params), params, value_fn=value_fn)
        perturbed = sum(n for n, on in zip(sizes, selected, strict=True) if on)
        np.testing.assert_allclose(info(state).grad_norm, perturbed**0.5, rtol=1e-6)


def test_a_module_of_bools_is_a_tree_though_it_can_be_called():
    params = equinox_module()
    mask = jax.tree.map(lambda x: x.ndim > 1, params)
    assert callable(mask)
    for given in (mask, lambda _: mask):
        masking.check(given)
        selected = masking.subspace(given, params).selected
        assert selected == TREES["equinox module"][2]


def is_variable(x):
    return isinstance(x, nnx.Variable)


NNX_MASKS = {
    "variables of bools": lambda: jax.tree.map(lambda x: x.ndim > 1, nnx_state()),
    "bools by type": lambda: jax.tree.map(
        lambda x: isinstance(x, nnx.Param) and x.ndim > 1,
        nnx_state(),
        is_leaf=is_variable,
    ),
    "pure dict": lambda: {
        "body": {"kernel": True, "bias": False},
        "head": {"kernel": True, "bias": False},
    },
    "prefix": lambda: {"body": {"kernel": True, "bias": True}, "head": False},
    "function": lambda: lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
}


@pytest.mark.parametrize("kind", NNX_MASKS)
def test_masks_of_an_nnx_model_of_every_kind(kind):
    """In `nnx.Optimizer`, which hands over variables to init, and arrays to update."""
    model = Network()
    link = eigen_sam(0.1, mask=NNX_MASKS[kind]())
    optimizer = nnx.Optimizer(model, optax.chain(link, optax.sgd(0.1)), wrt=nnx.Param)
    loss = lambda model: jnp.mean((model(jnp.ones((2, 3))) - 1) ** 2)
    at_clean_pass = eigensam_jax.nnx.value_fn(model, loss)
    grads = nnx.grad(loss)(model)
    optimizer.update(model, grads, value_fn=at_clean_pass)
    chosen = {
        "prefix": [grads["body"]["kernel"], grads["body"]["bias"]],
    }.get(kind, [grads["body"]["kernel"], grads["head"]["kernel"]])
    expected = optax.tree.norm([x[...] for x in chosen])
    got = info(optimizer.opt_state).grad_norm
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_what_is_no_mask_of_an_nnx_model_is_told_how_to_make_one():
    for not_a_mask in (nnx.Param, ...):
        with pytest.raises(
            ValueError, match=r"filter of Flax nnx is not a mask: .*bools"
        ):
            sam(mask=not_a_mask)
    params = nnx_state()
    for a_filter in (nnx.PathContains("body"), nnx.All(nnx.Param)):
        with pytest.raises(TypeError, match="missing 1") as error:
            sam(mask=a_filter).init(params)
        assert "filter of Flax nnx is not a mask" in "".join(error.value.__notes__)
    with pytest.raises(ValueError, match=r"mask\['body'\].*must be a bool, got"):
        sam(mask=nnx.state(Network(), nnx.PathContains("body")))
    more = {"body": True, "head": True, "norm": {"mean": False, "var": False}}
    with pytest.raises(ValueError, match=r"no bool for none, .* norm/mean, norm/var"):
        sam(mask=more).init(params)


# --- what can be a parameter ----------------------------------------------------------


@pytest.mark.parametrize("factory", [sam, eigen_sam])
def test_float8_is_refused_where_it_is_perturbed_and_else_left_alone(factory):
    params = {"a": jnp.full(2, 2.0, jnp.float8_e4m3fn), "b": jnp.ones(3)}
    for mask in (None, {"a": True, "b": False}):
        with pytest.raises(
            ValueError, match=r"params\['a'\] must be .* got float8_e4m3"
        ):
            factory(mask=mask).init(params)
    value_fn = lambda p: jnp.sum(p["a"].astype(jnp.float32)) * jnp.sum(p["b"] ** 2)
    tx = factory(0.1, mask={"a": False, "b": True})
    grads = jax.grad(value_fn)(params)
    perturbed, state = tx.update(
        grads, tx.init(params), params, grad_fn=lambda p: p, curvature_fn=value_fn
    )
    np.testing.assert_array_equal(
        *(x["a"].astype(jnp.float32) for x in (perturbed, params))
    )
    norm = jnp.linalg.norm(perturbed["b"] - params["b"])
    np.testing.assert_allclose(norm, 0.1, rtol=1e-5)
    np.testing.assert_allclose(info(state).grad_norm, 8 * 3**0.5, rtol=1e-6)


@pytest.mark.parametrize("mask", [None, {"a": True, "b": False}])
def test_holes_are_told_before_the_mask_is_looked_at(mask):
    params = {"a": jnp.ones(2), "b": optax.MaskedNode()}
    with pytest.raises(ValueError, match=r"params have holes"):
        sam(mask=mask).init(params)


def test_what_can_be_no_parameter_is_told_which_filter_to_apply():
    eqx = pytest.importorskip("equinox")
    key = jax.random.key(0)
    model = Network()
    model.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    for params, where in (
        (eqx.nn.MLP(2, 2, 2, 1, key=key), r"params\.activation"),
        (eqx.nn.Dropout(0.5, inference=True), r"params\.(p|inference)"),
        ({"name": "b"}, r"params\['name'\]"),
        (nnx.state(model), r"params\['dropout'\]\['rngs'\]\['count'\]"),
        (nnx.state(model, nnx.RngKey), r"params\['dropout'\]\['rngs'\]\['key'\]"),
    ):
        with pytest.raises(ValueError, match=where + ".* must be real fl") as error:
            eigen_sam().init(params)
        assert "eqx.partition(model, eqx.is_inexact_array)" in str(error.value)
        assert "wrt=nnx.Param" in str(error.value)
    arrays, _ = eqx.partition(eqx.nn.MLP(2, 2, 2, 1, key=key), eqx.is_inexact_array)
    eigen_sam().init(arrays)
    with pytest.raises(ValueError, match=r"got complex64: .*by jax\.lax\.complex"):
        sam().init({"w": jnp.ones(2, jnp.complex64)})


def test_shapes_pass_for_parameters():
    shapes = {"w": jax.ShapeDtypeStruct((2,), jnp.bfloat16), "b": 1.0}
    arguments.check_params(shapes)
    by_rank = masking.subspace(lambda p: {"w": p["w"].ndim == 1, "b": False}, shapes)
    assert by_rank.selected == (False, True)
    with pytest.raises(ValueError, match=r"params\['w'\] must be .* got int32"):
        arguments.check_params({"w": jax.ShapeDtypeStruct((2,), jnp.int32)})
