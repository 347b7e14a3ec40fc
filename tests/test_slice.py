"""Slices of a loss, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import SPECTRA, LossOnABatch, flatten, network, quadratic, symmetric

from eigensam_jax import tree_math
from eigensam_jax._update import programs
from eigensam_jax.diagnostics import LossSlice, filter_normalized, loss_slice

# --- the direction --------------------------------------------------------------------

SHAPES = {"conv": (3, 3, 16, 24), "dense": (400, 10), "bias": (24,), "scale": ()}


def layers(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    params = {k: rng.normal(2, 3, size) for k, size in SHAPES.items()}
    params["dense"][:, 4] = 0  # a filter that is dead
    return {k: jnp.asarray(x, dtype) for k, x in params.items()}


def filters(leaf):
    return np.asarray(leaf, np.float64).reshape(-1, leaf.shape[-1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_filters_are_as_long_as_those_of_the_parameters(dtype):
    for seed in range(3):
        params = layers(seed, dtype)
        direction = jax.jit(filter_normalized, static_argnums=0)(seed, params)
        assert {k: x.shape for k, x in direction.items()} == SHAPES
        assert {x.dtype for x in direction.values()} == {jnp.dtype("float32")}
        for name in ("conv", "dense"):
            expected = np.linalg.norm(filters(params[name]), axis=0)
            found = np.linalg.norm(filters(direction[name]), axis=0)
            np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert not direction["bias"].any()
        assert not direction["scale"].any()


def test_filters_are_gaussian_directions():
    params = layers(0)
    direction = filter_normalized(1, params)
    units = filters(direction["conv"])
    units /= np.linalg.norm(units, axis=0)
    size, number = units.shape
    gram = units.T @ units - np.eye(number)
    assert np.sqrt((gram**2).sum() / number / (number - 1) * size) < 1.2
    np.testing.assert_allclose((units**4).mean() * size**2, 3, rtol=0.1)
    others = filters(params["conv"])
    cosines = (units * others).sum(0) / np.linalg.norm(others, axis=0)
    assert np.sqrt((cosines**2).mean() * size) < 1.5  # 1, of directions at random


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_filters_may_be_of_any_length(scale):
    params = layers(0)
    expected = scale * flatten(filter_normalized(1, params))
    found = filter_normalized(1, jax.tree.map(lambda x: scale * x, params))
    np.testing.assert_allclose(flatten(found), expected, rtol=1e-5)
    assert filter_normalized(0, jnp.zeros((0, 3))).shape == (0, 3)


@pytest.mark.parametrize("spec", [P(None, "d"), P("d", None)])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_direction_is_sharded_as_the_parameters(kind, spec):
    params = jax.random.normal(jax.random.key(0), (6, 8))
    mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,))
    sharded = jax.device_put(params, NamedSharding(mesh, spec))
    direction = filter_normalized(1, sharded)
    assert direction.sharding.is_equivalent_to(sharded.sharding, 2)
    expected = filter_normalized(1, params)
    np.testing.assert_allclose(direction, expected, rtol=1e-5)


def test_a_seed_stands_for_its_key():
    params = layers(0)
    one, two = (
        filter_normalized(1, params),
        filter_normalized(jax.random.key(1), params),
    )
    np.testing.assert_array_equal(flatten(one), flatten(two))
    of_jax = filter_normalized(jnp.int32(1), params)
    np.testing.assert_array_equal(flatten(one), flatten(of_jax))
    assert (flatten(filter_normalized(2, params)) != flatten(one)).mean() > 0.9
    with pytest.raises(ValueError, match=r"key_or_seed must be .* got 0.5: give"):
        filter_normalized(0.5, params)


# --- the slice ------------------------------------------------------------------------


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_the_slice_of_a_quadratic_is_closed_form(jitted, count):
    for seed in range(3):
        matrix, _ = symmetric(SPECTRA["indefinite"], seed)
        value_fn, to_tree = quadratic(matrix, jnp.float32)
        rng = np.random.default_rng(seed)
        w, *d = rng.normal(size=(1 + count, 5))
        grid = [np.linspace(-1, 2, 4), np.array([-0.5, 0.0, 3.0])][:count]

        def take(w, d, grid, value_fn=value_fn):
            return loss_slice(value_fn, w, d, grid)

        take = jax.jit(take) if jitted else take
        found = take(to_tree(w), [*map(to_tree, d)], grid)
        moved = w + np.moveaxis(np.meshgrid(*grid, indexing="ij"), 0, -1) @ d
        expected = np.einsum("...i,ij,...j", moved, matrix, moved) / 2
        assert isinstance(found, LossSlice)
        assert found.values.dtype == jnp.float32
        np.testing.assert_allclose(found.values, expected, rtol=1e-4, atol=1e-5)
        for x, y in zip(found.distances, grid, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6)
        assert found.path is None


def test_a_bfloat16_network_is_evaluated_at_parameters_of_its_dtypes():
    params, loss = network(dtype=jnp.bfloat16)
    direction = filter_normalized(0, params)
    found = loss_slice(loss, params, [direction], [[0.0, 0.5]]).values
    moved = tree_math.add_scaled(params, 0.5, direction)
    expected = [loss(params), loss(tree_math.cast_like(moved, params))]
    np.testing.assert_allclose(found, jnp.stack(expected), rtol=0.02)
    assert found.dtype == loss(params).dtype


def test_it_compiles_once_and_sees_the_batch_of_now():
    loss, w, d = LossOnABatch(), jnp.ones(3), jnp.array([1.0, 0.0, 0.0])
    first = loss_slice(loss, w, [d], [[0.0, 1.0]])
    np.testing.assert_allclose(first.values, [7, 10])
    (program,) = programs._PROGRAMS[loss].values()
    loss.batch = jnp.array([2.0, 0.0, 0.0])
    second = loss_slice(loss, w, [d], [[0.0, 1.0, 2.0]])
    np.testing.assert_allclose(second.values, [2, 8, 18])
    assert list(programs._PROGRAMS[loss].values()) == [program]
    assert program._cache_size() == 1


def test_a_batch_that_is_traced():
    w, d = jnp.ones(3), jnp.array([1.0, 0.0, 0.0])
    take = jax.jit(
        lambda x: loss_slice(lambda p: jnp.sum(x * p**2), w, [d], [[0.0, 1.0]]).values
    )
    np.testing.assert_allclose(take(jnp.array([1.0, 2.0, 4.0])), [7, 10])


# --- the path -------------------------------------------------------------------------


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_a_path_has_the_coordinates_that_made_it(jitted, count):
    value_fn, to_tree = quadratic(np.eye(5), jnp.float32)
    take = lambda w, d, path: loss_slice(
        value_fn, w, d, [jnp.arange(2.0)] * count, path=path
    )
    take = jax.jit(take) if jitted else take
    for seed in range(3):
        rng = np.random.default_rng(seed)
        w, *d = rng.normal(size=(1 + count, 5))
        d = np.array(d) * np.array([[100.0], [0.01]])[:count]  # not orthogonal either
        coordinates = rng.normal(size=(4, count))
        outside = rng.normal(size=(4, 5))
        outside -= outside @ np.linalg.pinv(d) @ d  # what a projection drops
        points = w + coordinates @ d + 0.001 * outside
        path = [*map(to_tree, points)]
        found = take(to_tree(w), [*map(to_tree, d)], path).path
        assert found.dtype == jnp.float32
        rounding = 1e-6 * np.abs(points).max() / np.linalg.norm(d, axis=1)
        assert (abs(found - coordinates) < 1e-4 + 20 * rounding).all()


def test_a_path_along_directions_that_are_no_plane():
    f, w, x = (lambda w: jnp.sum(w)), jnp.zeros(2), jnp.array([2.0, 0.0])
    for other, expected in ((0 * x, [3, 0]), (x, [1.5, 1.5]), (-x, [1.5, -1.5])):
        found = loss_slice(f, w, [x, other], [[0.0, 1.0]] * 2, path=[3 * x]).path
        np.testing.assert_allclose(found, [expected], rtol=1e-5)


# --- what it refuses ------------------------------------------------------------------


def test_it_refuses_what_it_cannot_use():
    f, w, t = (lambda w: jnp.sum(w["a"] ** 2)), {"a": jnp.ones(3)}, jnp.arange(3.0)
    for directions, distances, match in (
        ([w, w, w], [t, t, t], "list of one or two trees like params, got 3 trees"),
        ([], [], "directions must be a list of trees like params, got an empty one"),
        (w, [t], "directions must be a list of trees like params, got a dict"),
        ([{"a": jnp.ones(2)}], [t], r"directions\[0\] must be a tree like params"),
        ([w], t, "distances must be a list .* 1 directions, got a ArrayImpl: give"),
        ([w], [t, t], r"got shapes \[\(3,\), \(3,\)\]: give \[jnp.linspace\(-1, 1, 51"),
        ([w, w], [0.0, 1.0], r"got shapes \[\(\), \(\)\]: give"),
        ([w], [[]], r"got shapes \[\(0,\)\]"),
    ):
        with pytest.raises(ValueError, match=match):
            loss_slice(f, w, directions, distances)
    with pytest.raises(
        ValueError, match=r"path must be a list of .*, got an empty one"
    ):
        loss_slice(f, w, [w], [t], path=[])
    with pytest.raises(ValueError, match=r"path\[1\] must be a tree like params"):
        loss_slice(f, w, [w], [t], path=[w, jnp.ones(3)])
    with pytest.raises(ValueError, match="value_fn must be a function of the param"):
        loss_slice(w, f, [w], [t])
    with pytest.raises(ValueError, match="value_fn must return a scalar"):
        loss_slice(lambda w: w["a"], w, [w], [t])
    with pytest.raises(ValueError, match=r"params\['a'\] must be real floating-point"):
        loss_slice(f, {"a": jnp.ones(3, jnp.int32)}, [w], [t])
