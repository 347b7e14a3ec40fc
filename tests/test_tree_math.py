import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eigensam_jax import tree_math


def random_tree(seed, dtype):
    rng = np.random.default_rng(seed)
    shapes = {"a": (3, 4), "b": [(), (5,)], "empty": (0, 2)}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def concatenate(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize("seed", range(3))
def test_vdot_and_norm_are_those_of_the_concatenated_leaves(seed):
    a, b = random_tree(seed, jnp.float32), random_tree(seed + 10, jnp.float32)
    flat_a, flat_b = (concatenate(x).astype(np.float64) for x in (a, b))
    np.testing.assert_allclose(tree_math.vdot(a, b), flat_a @ flat_b, rtol=1e-5)
    np.testing.assert_allclose(tree_math.norm(a), np.linalg.norm(flat_a), rtol=1e-6)


def test_low_precision_leaves_are_summed_in_float32():
    ones = jnp.ones(1_000_000, jnp.bfloat16)
    assert tree_math.vdot(ones, ones) == 1_000_000
    large = jnp.full(4, 6e4, jnp.float16)  # squares overflow float16
    np.testing.assert_allclose(tree_math.norm(large), 2 * float(large[0]), rtol=1e-6)
    assert tree_math.norm(large).dtype == jnp.float32


def test_float64_stays_float64():
    with jax.enable_x64(True):
        tree = {"a": jnp.ones(3, jnp.float64), "b": jnp.ones(2, jnp.float32)}
        assert tree_math.accumulation_dtype(tree) == jnp.float64
        assert tree_math.vdot(tree, tree).dtype == jnp.float64
        scaled = tree_math.scale(jnp.float64(1 / 3), tree)
        assert [x.dtype for x in jax.tree.leaves(scaled)] == [jnp.float64, jnp.float32]


def test_complex_trees_are_refused():
    for tree in (jnp.ones(2, jnp.complex64), {"a": jnp.ones(2), "b": 1j * jnp.ones(2)}):
        with pytest.raises(ValueError, match="real arrays, got complex"):
            tree_math.norm(tree)


def test_a_tree_without_leaves_has_norm_zero():
    assert tree_math.norm({"nothing": None}) == 0


def test_trees_of_different_structure_are_refused():
    with pytest.raises(ValueError, match=r"structure|keys"):
        tree_math.vdot({"a": jnp.ones(2)}, {"b": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"leaves of \(2,\) and a dict"):
        tree_math.vdots((jnp.ones(2), {"a": jnp.ones(2)}))


def test_leaves_are_not_broadcast():
    row, column = jnp.ones((1, 4)), jnp.ones((4, 1))
    with pytest.raises(ValueError, match=r"got leaves of \(1, 4\) and \(4, 1\)"):
        tree_math.vdot(row, column)
    with pytest.raises(ValueError, match="same shapes"):
        tree_math.vdots((row, row), (row, column))


@pytest.mark.parametrize(
    ("x", "expected"),
    [(4.0, 0.25), (0.0, 0.0), (-1.0, 0.0), (jnp.inf, 0.0), (jnp.nan, 0.0)],
)
def test_safe_inverse(x, expected):
    assert tree_math.safe_inverse(jnp.float32(x)) == expected
    of_infinity = tree_math.safe_divide(jnp.inf, jnp.float32(x))
    assert of_infinity == (jnp.inf if expected else 0)


@pytest.mark.parametrize("x", [1e-40, 1.1e-38, 1.2e-38])
def test_no_inverse_is_infinite(x):
    """Below the smallest normal number, 1.18e-38, it would be."""
    for function in (tree_math.safe_inverse, jax.jit(tree_math.safe_inverse)):
        inverse = function(jnp.float32(x))
        np.testing.assert_allclose(inverse, 1 / x if x > 1.18e-38 else 0, rtol=1e-6)


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1.0, 1e30])
def test_a_unit_vector_and_its_length(factor):
    tree = {"a": factor * jnp.array([3.0, 0.0]), "b": factor * jnp.array(-4.0)}
    unit, length = tree_math.unit(tree)
    expected = {"a": np.array([0.6, 0.0]), "b": -0.8} if factor else tree
    chex.assert_trees_all_close(unit, expected, rtol=1e-6)
    np.testing.assert_allclose(length, 5 * factor, rtol=1e-6)


def test_scale_and_add_scaled():
    tree = {"x": jnp.array([1.0, 2.0]), "y": jnp.array(3.0, jnp.bfloat16)}
    scaled = tree_math.scale(2.0, tree)
    np.testing.assert_array_equal(scaled["x"], [2.0, 4.0])
    assert scaled["y"].dtype == jnp.float32
    np.testing.assert_array_equal(tree_math.add_scaled(tree, -1, tree)["x"], [0, 0])


def test_where_does_not_let_the_other_tree_through():
    bad = {"x": jnp.array([jnp.nan, jnp.inf])}
    good = {"x": jnp.array([1.0, 2.0])}
    taken = jax.jit(tree_math.where)(jnp.array(False), bad, good)
    np.testing.assert_array_equal(taken["x"], good["x"])


@pytest.mark.parametrize("seed", range(3))
def test_vdots_are_the_inner_products_of_each_pair(seed):
    with jax.enable_x64(True):
        shapes = {
            "matrix": (7, 5),
            "kernel": (3, 3, 2, 4),
            "empty": (0, 4),
            "scalar": (),
        }
        rng = np.random.default_rng(seed)
        a, b = ({k: rng.normal(size=s) for k, s in shapes.items()} for _ in range(2))
        products = tree_math.vdots((a, a), (a, b))
        expected = [sum((a[k] * x[k]).sum() for k in shapes) for x in (a, b)]
        np.testing.assert_allclose(products, expected, rtol=1e-13)


@pytest.mark.parametrize(
    "shape", [(1024, 1024), (1_000_000,), (2, 1_000_000), (20, 50_000)]
)
def test_vdots_of_a_million_are_as_right_as_vdot(shape):
    x = jax.random.uniform(jax.random.key(0), shape)
    exact = np.sum(np.asarray(x, np.float64) ** 2)
    rtol = 3e-6 if shape[-1] != 50_000 else 6e-6  # a row is summed in one go
    np.testing.assert_allclose(tree_math.vdots((x, x), (x, x)), exact, rtol=rtol)
    (ones,) = tree_math.vdots((jnp.ones(shape, jnp.bfloat16),) * 2)
    assert ones.dtype == jnp.float32
    np.testing.assert_allclose(ones, np.prod(shape), rtol=1e-6)


def test_vdots_of_pairs_of_different_dtypes():
    with jax.enable_x64(True):
        a, b = jnp.ones((4, 3), jnp.float32), 2 * jnp.ones((4, 3), jnp.float64)
        products = tree_math.vdots((a, a), (a, b))
        assert [x.dtype for x in products] == [jnp.dtype("float64")] * 2
        np.testing.assert_array_equal(products, [12, 24])


@pytest.mark.parametrize("factor", [0, 1e-30, 1e-20, 1, 1e18, 1e20, 1e36])
def test_a_norm_is_right_over_the_whole_range(factor):
    tree = {"a": jnp.array([3.0, 0.0]), "b": jnp.full((2, 2), -2.0, jnp.bfloat16)}
    scale = lambda x: tree_math.scale(jnp.float32(factor), x)
    with jax.enable_x64(False):
        norms = [
            tree_math.norm(scale(tree)),
            jax.jit(tree_math.norm)(scale(tree)),
            jax.jit(lambda: tree_math.norm(scale(tree)))(),  # of known constants
            jax.jit(jax.vmap(tree_math.norm))(
                jax.tree.map(lambda x: x[None], scale(tree))
            )[0],
        ]
        np.testing.assert_allclose(norms, 5 * np.float32(factor), rtol=1e-6)
        assert {x.dtype for x in norms} == {jnp.dtype("float32")}
        # The derivative is the unit vector, at 0 it is 0.
        for derivative in (jax.grad, jax.jacfwd):
            rate = derivative(tree_math.norm)(scale(tree)["a"])
            np.testing.assert_allclose(rate, [float(factor > 0), 0], rtol=1e-6)


@pytest.mark.parametrize("factor", [0, 1e-300, 1e-60, 1, 1e60, 1e300])
@pytest.mark.parametrize("narrow", ["bfloat16", "float32"])
def test_a_norm_is_right_where_some_leaves_are_narrower(narrow, factor):
    """What is tiny or huge for them is in the range of the others."""
    with jax.enable_x64(True):
        tree = {"a": jnp.zeros(2, narrow), "b": factor * jnp.array([3.0, -4.0])}
        for norm in (tree_math.norm, jax.jit(tree_math.norm)):
            np.testing.assert_allclose(norm(tree), 5 * factor, rtol=1e-14)
            beside = tree | {"a": jnp.array([12.0], narrow)}
            expected = np.hypot(12, 5 * factor)
            np.testing.assert_allclose(norm(beside), expected, rtol=1e-14)
        unit = tree_math.scale(tree_math.safe_inverse(norm(tree)), tree)
        np.testing.assert_array_equal(unit["a"], [0, 0])
        np.testing.assert_allclose(unit["b"], np.sign(factor) * np.array([0.6, -0.8]))
        assert unit["a"].dtype == jnp.float32


def test_a_norm_that_is_not_finite_is_not():
    for bad in (jnp.inf, -jnp.inf, jnp.nan):
        for norm in (tree_math.norm, jax.jit(tree_math.norm)):
            assert not jnp.isfinite(norm(jnp.array([1.0, bad])))


def test_a_second_pass_for_the_norm_is_only_where_it_must_be():
    """Counted by the loop that it is: the body of the first attempt's program."""
    x = jnp.ones((512, 512))
    compiled = jax.jit(tree_math.norm).lower(x).compile()
    assert compiled.as_text().count(" while(") == 1
    # The loop's body counts once, whether it runs or not. (The compiler before copies
    # what a loop reads.)
    reads = 2.05 if jax.__version_info__ >= (0, 10, 2) else 3.05
    assert compiled.cost_analysis()["bytes accessed"] < reads * x.nbytes


@pytest.mark.parametrize("shape", [(512, 512), (8, 50_000), (3, 4, 50_000)])
def test_vdots_read_each_array_once(shape):
    v, g, h = (jnp.ones(shape) for _ in range(3))
    inner_products = lambda v, g, h: tree_math.vdots((v, g), (v, h - g), (h - g, h - g))
    compiled = jax.jit(inner_products).lower(v, g, h).compile()
    assert compiled.cost_analysis()["bytes accessed"] < 1.05 * 3 * v.nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < 0.05 * v.nbytes
