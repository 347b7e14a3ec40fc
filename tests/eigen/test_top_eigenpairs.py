from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problems import SPECTRA, dense_hessian, network, symmetric
from scipy.sparse import linalg

from eigensam_jax import eigen, hessian, sharpness
from eigensam_jax.eigen import _krylov

NAMES = {"algebraic": "LA", "magnitude": "LM"}


@partial(jax.jit, static_argnames=("k", "which", "tol"))
def solve(matrix, seed, *, k, which="algebraic", tol=1e-4):
    """The compiled loop, on a matrix that is an argument."""
    matvec = lambda v: jnp.matmul(matrix, v, precision="highest")
    like = jnp.zeros(len(matrix), matrix.dtype)
    options = {"which": which, "tol": tol, "seed": seed, "thorough": True}
    return eigen.top_eigenpairs(matvec, like, k, **options)


class Counted:
    """Products with a matrix in float64 on the host, and how many there were."""

    def __init__(self, matrix):
        self.matrix, self.count = matrix, 0

    def __call__(self, v):
        self.count += 1
        return self.matrix @ np.asarray(v, np.float64)


def on_the_host(matrix, k, thorough=True, **options):
    products, like = Counted(matrix), jnp.zeros(len(matrix))
    options |= {"thorough": thorough, "host_loop": True}
    pairs = eigen.top_eigenpairs(products, like, k, **options)
    return pairs, products.count


def random_symmetric(seed, size=400):
    """A matrix like a network's Hessian: a few large eigenvalues over a bulk."""
    rng = np.random.default_rng(seed)
    bulk = rng.exponential(0.3, size - 8) * rng.choice([1, -0.5], size - 8)
    return symmetric([*(10 * rng.random(6)), -4 - rng.random(), -3, *bulk], seed)[0]


def wanted(values, which):
    rank = np.abs(values) if which == "magnitude" else np.asarray(values)
    return np.asarray(values)[np.argsort(rank)[::-1]]


def check(pairs, matrix, values, *, rtol, tol):
    """Values, residuals and vectors are what they should be, recomputed in float64."""
    vectors, found, claimed = jax.tree.map(np.asarray, pairs)
    rounding = 10 * np.finfo(claimed.dtype).eps * np.abs(matrix).sum(1).max()
    atol = max(rtol * abs(values[0]), rounding)
    np.testing.assert_allclose(found, values, rtol=0, atol=atol)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(len(values)), atol=rtol)
    residuals = np.linalg.norm(vectors @ matrix - found[:, None] * vectors, axis=1)
    np.testing.assert_allclose(claimed, residuals, rtol=0.01, atol=rounding)
    assert max(claimed) <= tol * abs(found[0]) + rounding


@pytest.mark.parametrize("host_loop", [False, True])
def test_agrees_with_eigh_of_a_networks_hessian(host_loop):
    params, loss = network()
    matrix = np.asarray(dense_hessian(loss, params), np.float64)
    values, vectors = np.linalg.eigh(matrix)
    product = hessian.matvec(jax.grad(loss), params)
    if host_loop:
        product = jax.jit(product)
    options = {"tol": 1e-6, "thorough": True, "host_loop": host_loop}
    run = lambda p: eigen.top_eigenpairs(product, p, 4, **options)
    pairs = (run if host_loop else jax.jit(run))(params)
    assert jax.tree.map(jnp.shape, pairs.eigenvector) == jax.tree.map(
        lambda x: (4, *x.shape), params
    )
    flat = np.array(jax.vmap(lambda tree: ravel_pytree(tree)[0])(pairs.eigenvector))
    pairs = pairs._replace(eigenvector=flat)
    check(pairs, matrix, values[:-5:-1], rtol=1e-5, tol=1e-6)
    for vector, value in zip(flat, pairs.eigenvalue, strict=True):
        same = vectors[:, np.abs(values - value).argmin()]
        np.testing.assert_allclose(abs(vector @ same), 1, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("which", NAMES)
def test_agrees_with_eigsh_on_a_large_matrix(which, seed):
    matrix = random_symmetric(seed)
    values, _ = linalg.eigsh(matrix, k=5, which=NAMES[which], tol=1e-13)
    single = solve(jnp.asarray(matrix, jnp.float32), seed, k=5, which=which, tol=1e-5)
    check(single, matrix, wanted(values, which), rtol=1e-5, tol=1e-5)
    with jax.enable_x64(True):
        double = solve(jnp.asarray(matrix), seed, k=5, which=which, tol=1e-10)
    assert double.eigenvalue.dtype == double.eigenvector.dtype == jnp.float64
    check(double, matrix, wanted(values, which), rtol=1e-10, tol=1e-10)


SIZE = 40  # more than there are vectors in the basis
HARD = {
    "zero": [0.0] * SIZE,
    "identity": [2.0] * SIZE,
    "negative definite": list(-np.linspace(1, 3, SIZE)),
    "large negative end": [-50.0, *np.linspace(0, 1, SIZE - 1)],
    "zero on top": [0.0, 0.0, *-np.linspace(1, 3, SIZE - 2)],
    "few distinct": [5.0] * 2 + [3.0] * 10 + [1.0] * (SIZE - 12),
    "top repeated": [5.0, 5.0, 5.0, *np.linspace(-1, 1, SIZE - 3)],
    "second repeated": [5.0, 3.0, 3.0, *np.linspace(-1, 1, SIZE - 3)],
    "low rank": [4.0, 2.0] + [0.0] * (SIZE - 2),
    "tiny": list(1e-12 * np.linspace(-1, 5, SIZE)),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spectrum", HARD.values(), ids=HARD)
def test_degenerate_and_indefinite_spectra(spectrum, seed):
    matrix, _ = symmetric(spectrum, seed)
    for which in NAMES:
        options = {"which": which, "seed": seed, "tol": 1e-5}
        pairs, count = on_the_host(matrix, 3, **options)
        check(pairs, matrix, wanted(spectrum, which)[:3], rtol=1e-5, tol=1e-5)
        assert count < 500
    pairs, _ = on_the_host(matrix, 1, seed=seed, tol=1e-5)
    check(pairs, matrix, [max(spectrum)], rtol=1e-5, tol=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_all_eigenpairs(spectrum, seed):
    matrix, _ = symmetric(spectrum, seed)
    pairs = solve(jnp.asarray(matrix, jnp.float32), seed, k=5)
    check(pairs, matrix, wanted(spectrum, "algebraic"), rtol=1e-5, tol=1e-4)


def test_a_matrix_of_one_row():
    pairs = solve(jnp.array([[-3.0]]), 0, k=1)
    assert (pairs.eigenvalue, pairs.residual) == (-3, 0)
    assert abs(pairs.eigenvector) == 1


@pytest.mark.parametrize("seed", range(3))
def test_an_eigenvector_that_is_not_the_top_is_no_trap(seed):
    spectrum = np.linspace(0, 1, SIZE)
    matrix, basis = symmetric(spectrum, seed)
    v0 = jnp.asarray(basis[:, -2], jnp.float32)
    pairs, _ = on_the_host(matrix, 1, v0=v0, seed=seed)
    np.testing.assert_allclose(pairs.eigenvalue, 1, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("k", "most"), [(1, 16), (5, 20)])
def test_it_stops_at_the_residual_that_was_asked(k, most, seed):
    matrix = random_symmetric(seed)
    values, _ = linalg.eigsh(matrix, k=k, which="LA", tol=1e-13)
    pairs, count = on_the_host(matrix, k, thorough=False, seed=seed, tol=1e-3)
    assert count <= most
    vectors, found, claimed = jax.tree.map(np.asarray, pairs)
    np.testing.assert_allclose(found, values[::-1], rtol=0, atol=1e-5 * values[-1])
    residuals = np.linalg.norm(vectors @ matrix - found[:, None] * vectors, axis=1)
    np.testing.assert_allclose(claimed, residuals, rtol=0.05, atol=1e-5 * values[-1])
    assert max(residuals) <= 1e-3 * values[-1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spectrum", HARD.values(), ids=HARD)
def test_without_copies_values_are_eigenvalues_and_the_first_is_the_top(spectrum, seed):
    matrix, _ = symmetric(spectrum, seed)
    pairs, count = on_the_host(matrix, 3, thorough=False, seed=seed, tol=1e-4)
    scale = max(abs(np.asarray(spectrum)))
    np.testing.assert_allclose(pairs.eigenvalue[0], max(spectrum), atol=2e-4 * scale)
    for value in pairs.eigenvalue:
        assert min(abs(np.asarray(spectrum) - value)) <= 2e-4 * scale
    assert count < 300


@pytest.mark.parametrize("seed", range(3))
def test_products_are_as_few_as_arpacks(seed):
    matrix = random_symmetric(seed)
    theirs = Counted(matrix)
    operator = linalg.LinearOperator(matrix.shape, theirs, dtype=np.float64)
    v0 = np.random.default_rng(seed).normal(size=len(matrix))
    linalg.eigsh(operator, k=1, which="LA", tol=1e-4, v0=v0)
    pairs, count = on_the_host(matrix, 1, v0=jnp.asarray(v0, jnp.float32))
    assert count <= 1.2 * theirs.count
    again, count = on_the_host(matrix, 1, v0=pairs.eigenvector[0])
    assert count == 21  # a basis of 20, and the residual
    np.testing.assert_allclose(again.eigenvalue, pairs.eigenvalue, rtol=1e-5)


def test_no_more_products_than_allowed_and_residuals_that_say_so():
    matrix = random_symmetric(0)
    for k, max_matvecs in ((1, 2), (3, 6), (3, 12), (3, 18)):
        pairs, count = on_the_host(matrix, k, max_matvecs=max_matvecs, tol=1e-6)
        assert count == max_matvecs
        vectors = np.asarray(pairs.eigenvector, np.float64)
        residuals = vectors @ matrix - np.asarray(pairs.eigenvalue)[:, None] * vectors
        residuals = np.linalg.norm(residuals, axis=1)
        np.testing.assert_allclose(pairs.residual, residuals, rtol=1e-3)
        assert max(pairs.residual) > 1e-3


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("after", [0, 7])
def test_a_product_that_is_not_finite_ends_it_with_nan(after, bad, k):
    products = Counted(np.diag(np.arange(SIZE, dtype=float)))

    def matvec(v):
        return products(v) + (bad if products.count > after else 0)

    for thorough in (False, True):
        products.count, options = 0, {"thorough": thorough, "host_loop": True}
        pairs = eigen.top_eigenpairs(matvec, jnp.zeros(SIZE), k, **options)
        assert products.count == after + 1 + thorough * k
        assert jnp.isnan(pairs.eigenvalue).all()
        assert jnp.isnan(pairs.residual).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_product_that_is_not_finite_ends_the_compiled_loop_with_nan(bad):
    shape = random_symmetric(0).shape  # for which there is a program
    pairs = solve(jnp.full(shape, bad, jnp.float32), 0, k=5, tol=1e-5)
    assert jnp.isnan(pairs.eigenvalue).all()
    assert jnp.isnan(pairs.residual).all()


def test_a_tree_with_leaves_of_all_kinds():
    like = {
        "half": jnp.zeros((3, 4), jnp.bfloat16),
        "none": jnp.zeros((0, 2)),
        "scalar": jnp.zeros(()),
        "single": [jnp.zeros(20)],
    }
    spectrum = jax.tree.unflatten(
        jax.tree.structure(like),
        [
            jnp.linspace(-1, 1, 12).reshape(3, 4),
            jnp.zeros((0, 2)),
            7.0,
            jnp.arange(20.0),
        ],
    )
    matvec = lambda v: jax.tree.map(jnp.multiply, spectrum, v)
    pairs = jax.jit(lambda x: eigen.top_eigenpairs(matvec, x, 2))(like)
    np.testing.assert_allclose(pairs.eigenvalue, [19, 18], rtol=1e-5)
    assert {x.dtype for x in jax.tree.leaves(pairs)} == {jnp.dtype(jnp.float32)}
    assert jax.tree.map(lambda x: x.shape[1:], pairs.eigenvector) == jax.tree.map(
        jnp.shape, like
    )
    vectors = pairs.eigenvector["single"][0][:, [19, 18]]
    np.testing.assert_allclose(jnp.abs(vectors), jnp.eye(2), atol=1e-4)


def test_sharding_in_types_is_kept():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        spectrum = jnp.arange(32.0).reshape(16, 2)
        spectrum = jax.device_put(spectrum, NamedSharding(mesh, PartitionSpec("x")))
        matvec = lambda v: spectrum * v
        pairs = jax.jit(lambda x: eigen.top_eigenpairs(matvec, x, 2))(spectrum)
        np.testing.assert_allclose(pairs.eigenvalue, [31, 30], rtol=1e-5)
        spec = PartitionSpec(None, "x", None)
        assert jax.typeof(pairs.eigenvector).sharding.spec == spec


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be an integer of at least 1, got 0"),
        ({"k": 2.0}, "k must be an integer of at least 1, got 2.0"),
        ({"k": 6}, "k must be at most 5, .* got 6: ask for fewer"),
        (
            {"which": "LA"},
            r"which must be one of \('algebraic', 'magnitude'\), got 'LA'",
        ),
        ({"tol": -1e-3}, "tol must be a finite number of at least 0 .* got -0.001"),
        ({"tol": "small"}, "tol must be a finite number .* got 'small'"),
        ({"max_matvecs": 1}, "max_matvecs must be at least 2 for k = 2, got 1"),
        ({"max_matvecs": None}, "max_matvecs must be an integer .* got None"),
        ({"v0": jnp.zeros(4)}, "v0 must be a tree like .*Start from a tree"),
    ],
)
def test_a_bad_argument(options, message):
    with pytest.raises(ValueError, match=message):
        eigen.top_eigenpairs(lambda v: v, jnp.zeros(5), **{"k": 2, **options})


def test_shapes_alone_say_what_the_vectors_are_like():
    """`like` of `ShapeDtypeStruct`, and `eval_shape` of every solver."""
    like = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2), jnp.bfloat16)}
    shapes = jax.eval_shape(lambda: like)
    matvec = lambda v: {"a": 3 * v["a"], "b": v["b"]}
    vectors = jax.tree.map(jnp.ones_like, like)
    for solve in (
        lambda x: eigen.top_eigenpairs(matvec, x, 2),
        lambda x: eigen.spectral_density(matvec, x, num_matvecs=2, num_samples=2),
    ):
        given = jax.jit(lambda solve=solve: solve(shapes))()  # and this is one program
        chex.assert_trees_all_equal(given, jax.jit(lambda solve=solve: solve(like))())
        chex.assert_trees_all_equal_shapes_and_dtypes(
            given, jax.eval_shape(solve, like)
        )
    for solve in (eigen.power_iteration, eigen.lanczos):
        run = lambda v, solve=solve: solve(matvec, v, 2)
        chex.assert_trees_all_equal_shapes_and_dtypes(
            jax.jit(run)(vectors), jax.eval_shape(run, shapes)
        )


@pytest.mark.parametrize(
    ("host_loop", "dtypes", "leaves"),
    [(True, "ff", 1), (True, "fd", 2), (False, "ff", 2)],
    ids=["one array", "two dtypes", "in the program"],
)
def test_the_hosts_loop_is_over_one_array(host_loop, dtypes, leaves, monkeypatch):
    """So that what is around the product compiles once, and not for each leaf."""
    seen, extend = set(), _krylov.extend

    def noting(basis, *more):
        seen.add(len(jax.tree.leaves(basis)))
        return extend(basis, *more)

    monkeypatch.setattr(_krylov, "extend", noting)
    jax.clear_caches()  # it is seen where it is traced
    with jax.enable_x64(True):
        spectra = {"a": jnp.arange(6, dtype=dtypes[0]), "b": jnp.ones(3, dtypes[1])}
        matvec = lambda v: jax.tree.map(jnp.multiply, spectra, v)
        pairs = eigen.top_eigenpairs(matvec, spectra, 2, host_loop=host_loop)
    assert seen == {leaves}
    np.testing.assert_allclose(pairs.eigenvalue, [5, 4], rtol=1e-4)
    found = pairs.eigenvector
    assert {key: x.dtype.char for key, x in found.items()} == {
        "a": dtypes[0],
        "b": dtypes[1],
    }
    np.testing.assert_allclose(abs(found["a"]), np.eye(6)[[5, 4]], atol=1e-3)
    np.testing.assert_allclose(found["b"], 0, atol=1e-3)


def test_the_hosts_loop_is_refused_inside_jit():
    w, matvec = jnp.ones(3), lambda v: 2 * v
    value_fn = lambda w: jnp.sum(w**4)
    for search in (
        lambda w: eigen.top_eigenpairs(matvec, w, 1, host_loop=True),
        lambda w: eigen.trace(matvec, w, num_matvecs=4, host_loop=True),
        lambda w: eigen.spectral_density(matvec, w, host_loop=True),
        lambda w: sharpness(value_fn, w, host_loop=True),
    ):
        with pytest.raises(ValueError, match=r"host_loop=True .* can't be inside jit"):
            jax.jit(search)(w)


def test_a_second_search_of_the_hosts_loop_compiles_nothing(caplog):
    spectra = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(2, jnp.bfloat16)}
    matvec = jax.jit(lambda v: jax.tree.map(lambda x, y: x * y, spectra, v))
    for _ in range(2):
        caplog.clear()
        with jax.log_compiles():
            eigen.top_eigenpairs(matvec, spectra, 2, host_loop=True)
        compiled = [x for x in caplog.messages if x.startswith("Compiling")]
    assert not compiled
    with jax.log_compiles():
        jax.jit(lambda x: x + 1)(spectra["a"])
    assert any(x.startswith("Compiling") for x in caplog.messages)  # it is logged


@pytest.mark.parametrize("host_loop", [True, False])
def test_a_tree_of_two_dtypes_needs_no_promotion(host_loop):
    spectra = {"a": jnp.arange(6, dtype=jnp.bfloat16), "b": jnp.ones(3)}
    matvec = lambda v: {
        key: x.astype(v[key].dtype) * v[key] for key, x in spectra.items()
    }
    with jax.numpy_dtype_promotion("strict"):
        pairs = eigen.top_eigenpairs(matvec, spectra, 1, host_loop=host_loop)
    np.testing.assert_allclose(pairs.eigenvalue, [5], rtol=1e-5)


def test_a_product_that_is_another_tree_is_refused():
    like = {"a": jnp.ones((2, 3)), "b": jnp.ones(2)}
    for wrong in (
        lambda v: {"a": v["a"].T, "b": v["b"]},
        lambda v: [v["a"], v["b"]],
    ):
        with pytest.raises(ValueError, match=r"matvec\(v\) must be a tree like"):
            eigen.top_eigenpairs(wrong, like, 1, host_loop=True)


@pytest.mark.parametrize("host_loop", [True, False])
def test_a_start_in_another_dtype_is_cast(host_loop):
    with jax.enable_x64(True):
        spectra = [jnp.arange(3, dtype=jnp.float32), jnp.ones(2, jnp.float32)]
        matvec = lambda v: jax.tree.map(jnp.multiply, spectra, v)
        v0 = [jnp.ones(3), jnp.ones(2)]
        pairs = eigen.top_eigenpairs(matvec, spectra, 1, v0=v0, host_loop=host_loop)
        assert {x.dtype for x in jax.tree.leaves(pairs)} == {np.dtype("float32")}
        np.testing.assert_allclose(pairs.eigenvalue, [2], rtol=1e-5)
