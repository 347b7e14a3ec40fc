import functools
import gc
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from jax.flatten_util import ravel_pytree
from problems import (
    SPECTRA,
    LossOnABatch,
    dense_hessian,
    dense_hessian_of_sines,
    flatten,
    network,
    quadratic,
    sines,
    symmetric,
)

from eigensam_jax import diagnostics, eigen, hessian, sam, sharpness, tree_math
from eigensam_jax._update import programs

# --- sharpness ------------------------------------------------------------------------


@pytest.mark.parametrize("host_loop", [False, True], ids=["compiled", "host loop"])
def test_sharpness_of_a_quadratic_is_the_largest_eigenvalue(host_loop):
    def measure(matrix):
        value_fn, to_tree = quadratic(matrix, jnp.float32)
        return sharpness(value_fn, to_tree(jnp.zeros(5)), host_loop=host_loop)

    concave, zero = [-4.0, -3.0, -2.0, -1.0, -0.5], [0.0, 0.0, 0.0, 0.0, 0.0]
    measure = measure if host_loop else jax.jit(measure)
    for seed in range(3):
        for spectrum in (*SPECTRA.values(), concave, zero):
            matrix, basis = symmetric(spectrum, seed)
            top = measure(matrix)
            np.testing.assert_allclose(top.eigenvalue, max(spectrum), rtol=1e-5)
            v = flatten(top.eigenvector)
            np.testing.assert_allclose(np.linalg.norm(v), 1, rtol=1e-5)
            at_the_top = np.isclose(spectrum, max(spectrum))  # one or several
            inside = np.linalg.norm(basis[:, at_the_top].T @ v)
            np.testing.assert_allclose(inside, 1, atol=1e-4)
            assert {x.dtype for x in jax.tree.leaves(top)} == {jnp.dtype("float32")}


def test_sharpness_of_a_network_is_that_of_the_dense_hessian():
    with jax.enable_x64(True):
        _, loss = network(dtype=jnp.float64)

        @jax.jit
        def measure(params, tol):
            top = sharpness(loss, params, tol=tol)
            return top, hessian.hvp(loss, params, top.eigenvector)

        for seed in range(3):
            params, _ = network(seed, jnp.float64)
            values, vectors = np.linalg.eigh(dense_hessian(loss, params))
            gap = values[-1] - values[-2]
            for tol in (1e-3, 1e-8):
                top, product = measure(params, tol)
                chex.assert_trees_all_equal_shapes_and_dtypes(top.eigenvector, params)
                assert top.residual <= tol * top.eigenvalue
                rest = tree_math.add_scaled(product, -top.eigenvalue, top.eigenvector)
                np.testing.assert_allclose(
                    top.residual, tree_math.norm(rest), rtol=1e-6, atol=1e-14
                )
                # Kato and Temple's bound on λ, Davis and Kahan's on v.
                off = values[-1] - top.eigenvalue
                assert -1e-12 <= off <= top.residual**2 / (gap - top.residual) + 1e-12
                cosine = min(abs(flatten(top.eigenvector) @ vectors[:, -1]), 1)
                sine = np.sqrt(1 - cosine**2)
                assert sine <= top.residual / (gap - top.residual) + 1e-7


@pytest.mark.parametrize(
    ("name", "jitted"),
    [
        *(("bias", False), ("out", False), ("all", False), ("bias", True)),
        pytest.param("out", True, marks=pytest.mark.slow),
        pytest.param("all", True, marks=pytest.mark.slow),
    ],
)
def test_sharpness_of_a_layer_is_that_of_its_block(name, jitted):
    params, loss = network()
    matrix = dense_hessian(loss, params)
    mask = {
        "bias": {"hidden": {"w": False, "b": True}, "out": False},
        "out": {"hidden": False, "out": True},
        "all": None,
    }[name]
    names, _ = ravel_pytree({"hidden": {"b": 6 * [0], "w": 24 * [1]}, "out": 18 * [2]})
    inside = {"bias": [0], "out": [2], "all": [0, 1, 2]}
    measure = lambda p: sharpness(loss, p, mask=mask, tol=1e-5)
    top = (jax.jit(measure) if jitted else measure)(params)
    chosen = np.isin(names, inside[name])
    values, vectors = np.linalg.eigh(matrix[chosen][:, chosen])
    np.testing.assert_allclose(top.eigenvalue, values[-1], rtol=1e-5)
    v = flatten(top.eigenvector)
    assert not v[~chosen].any()
    np.testing.assert_allclose(abs(v[chosen] @ vectors[:, -1]), 1, atol=1e-4)


def test_sharpness_compiles_its_product_once_and_sees_the_batch_of_now():
    loss, w = LossOnABatch(), jnp.ones(3)
    np.testing.assert_allclose(sharpness(loss, w).eigenvalue, 8, rtol=1e-5)
    (program,) = programs_of(loss).values()
    loss.batch = jnp.array([3.0, 1.0, 1.0])
    np.testing.assert_allclose(sharpness(loss, w).eigenvalue, 6, rtol=1e-5)
    assert list(programs_of(loss).values()) == [program]
    assert program._cache_size() == 1
    loss.batch = jnp.array([3.0])  # other shapes are another program
    np.testing.assert_allclose(sharpness(loss, w).eigenvalue, 6, rtol=1e-5)
    assert len(programs_of(loss)) == 2


def test_sharpness_sees_the_batch_of_now_where_programs_hold_it():
    loss, w = LossOnABatch(), jnp.ones(3)
    name = "jax_use_simplified_jaxpr_constants"
    jax.config.update(name, True)
    try:
        for top in (4.0, 5.0, 7.0):
            loss.batch = jnp.array([1.0, 2.0, top])
            found = sharpness(loss, w).eigenvalue
            np.testing.assert_allclose(found, 2 * top, rtol=1e-5)
    finally:
        jax.config.update(name, False)


def test_a_batch_behind_a_reference_is_that_of_now():
    """Of every measure that loops in Python around a compiled function."""
    batch, w = jax.new_ref(jnp.array([1.0, 2.0, 4.0])), jnp.ones(3)
    loss = lambda w: jnp.sum(batch[...] * w**2)
    mean = hessian.mean_matvec(lambda w, b: b * loss(w), w, lambda: [1.0, 3.0])
    for factor in (1, 10):
        batch[...] = factor * jnp.array([1.0, 2.0, 4.0])
        found = {
            "sharpness": sharpness(loss, w).eigenvalue,
            "of a layer": diagnostics.sharpness_by_layer(loss, w)[""].eigenvalue,
            "in the worst case": diagnostics.worst_case_sharpness(loss, 0 * w, 2).value,
            "in the mean": diagnostics.average_sharpness(loss, 0 * w, 3).value,
            "of a slice": diagnostics.loss_slice(loss, w, [w], [[1.0]]).values,
            "of the data set": mean(w)[2],
        }
        expected = dict(zip(found, (8, 8, 16, 21, 28, 16), strict=True))
        for name, value in found.items():
            rtol = 0.5 if name == "in the mean" else 0.01  # of 32 pairs at random
            np.testing.assert_allclose(value, factor * expected[name], rtol, 0, name)


def programs_of(loss):
    return dict(programs._PROGRAMS[loss])


def test_programs_are_given_up_with_their_function():
    count = len(programs._PROGRAMS)
    loss = LossOnABatch()
    sharpness(loss, jnp.ones(3))
    assert len(programs._PROGRAMS) == count + 1
    del loss
    gc.collect()
    assert len(programs._PROGRAMS) <= count


def test_sharpness_of_a_batch_that_is_traced_loops_in_the_program():
    w = jnp.ones(3)
    measure = jax.jit(lambda batch: sharpness(lambda p: jnp.sum(batch * p**2), w))
    for batch in (jnp.array([1.0, 2.0, 4.0]), jnp.array([7.0, 2.0, 4.0])):
        top = measure(batch)
        np.testing.assert_allclose(top.eigenvalue, 2 * max(batch), rtol=1e-5)


@pytest.mark.parametrize("mode", hessian.HVP_MODES[1:])
def test_sharpness_in_each_mode_of_the_product(mode):
    params, loss = network()
    top = jax.jit(lambda p: sharpness(loss, p, hvp_mode=mode))(params)
    largest = np.linalg.eigvalsh(dense_hessian(loss, params))[-1]
    rtol = 1e-3 if mode == "finite_difference" else 1e-5
    np.testing.assert_allclose(top.eigenvalue, largest, rtol=rtol)
    assert top.residual < 1e-3 * top.eigenvalue


@pytest.mark.parametrize("host_loop", [False, True])
def test_the_mode_reaches_every_product(host_loop):
    w, mode = jnp.array([0.3, 1.2, -2.0]), "reverse_over_reverse"
    highest = dense_hessian_of_sines(w).max()
    top = sharpness(sines, w, hvp_mode=mode, host_loop=host_loop)
    np.testing.assert_allclose(top.eigenvalue, highest, rtol=1e-4)
    layers = diagnostics.sharpness_by_layer(
        sines, w, hvp_mode=mode, host_loop=host_loop
    )
    np.testing.assert_allclose(layers[""].eigenvalue, highest, rtol=1e-4)
    if host_loop:
        found = diagnostics.report(sines, w, hvp_mode=mode)
        np.testing.assert_allclose(found.top.eigenvalue, highest, rtol=1e-4)


def test_the_residual_says_so_when_the_products_run_out():
    params, loss = network()
    top = jax.jit(lambda p: sharpness(loss, p, tol=1e-6, max_matvecs=3))(params)
    assert top.residual > 1e-3 * top.eigenvalue
    product = hessian.hvp(loss, params, top.eigenvector)
    rest = tree_math.add_scaled(product, -top.eigenvalue, top.eigenvector)
    np.testing.assert_allclose(top.residual, tree_math.norm(rest), rtol=1e-3)


def test_sharpness_starts_where_it_is_told_to():
    params, loss = network()
    values, vectors = np.linalg.eigh(dense_hessian(loss, params))
    v0 = ravel_pytree(params)[1](jnp.asarray(vectors[:, -1]))
    top = jax.jit(lambda p: sharpness(loss, p, max_matvecs=3, v0=v0))(params)
    np.testing.assert_allclose(top.eigenvalue, values[-1], rtol=1e-5)


def test_sharpness_of_bfloat16_parameters_is_float32():
    params, loss = network(dtype=jnp.bfloat16)
    top = jax.jit(lambda p: sharpness(loss, p, tol=0.02, max_matvecs=40))(params)
    assert {x.dtype for x in jax.tree.leaves(top)} == {jnp.dtype("float32")}
    wide = tree_math.widen(params)
    largest = np.linalg.eigvalsh(dense_hessian(loss, wide))[-1]
    np.testing.assert_allclose(top.eigenvalue, largest, rtol=0.02)


def test_sharpness_of_a_data_set_that_stays_on_the_host():
    params, loss = network()
    whole = lambda p: sum(loss(p, i) for i in range(5)) / 5
    matvec = hessian.mean_matvec(loss, params, lambda: range(5))
    top = eigen.top_eigenpairs(matvec, params, k=2, host_loop=True)
    values = np.linalg.eigvalsh(dense_hessian(whole, params))
    np.testing.assert_allclose(top.eigenvalue, values[:-3:-1], rtol=1e-4)


def test_the_sharpness_of_a_layer_that_the_loss_ignores_is_zero():
    f = lambda p: jnp.sum(p["used"] ** 2)
    params = {"used": jnp.ones(3), "unused": jnp.ones(2)}
    top = sharpness(f, params, mask={"used": False, "unused": True})
    assert top.eigenvalue == 0


def test_sharpness_refuses_what_it_cannot_use():
    params, loss = network()
    with pytest.raises(ValueError, match="hvp_mode must be one of"):
        sharpness(loss, params, hvp_mode="reverse")
    with pytest.raises(ValueError, match="value_fn must return a scalar"):
        sharpness(lambda p: p["hidden"]["b"], params)
    with pytest.raises(ValueError, match="value_fn ignores its argument"):
        sharpness(lambda p: loss(params), params)
    with pytest.raises(ValueError, match=r"params\['w'\] must be real floating-point"):
        sharpness(loss, {"w": jnp.ones(2, jnp.int32)})
    with pytest.raises(ValueError, match="v0 must be a tree like params"):
        sharpness(loss, params, v0=params["out"])
    with pytest.raises(ValueError, match="value_fn must be a function of the param"):
        sharpness(params, loss)
    for nothing in ({}, {"w": jnp.ones((0, 2))}):
        with pytest.raises(ValueError, match="params must have an entry"):
            sharpness(lambda p: jnp.zeros(()), nothing)


def test_sharpness_by_layer_is_that_of_the_dense_blocks():
    params, loss = network()
    dense = np.asarray(dense_hessian(loss, params))
    value_fn = lambda p: loss(p)  # which no other test has
    found = diagnostics.sharpness_by_layer(value_fn, params, tol=1e-5)
    assert [*found] == ["hidden", "out"]
    assert len(programs._PROGRAMS[value_fn]) == 1  # of the product, for all layers
    sizes = [30, 18]  # the leaves are raveled in the same order
    for top, size, start in zip(found.values(), sizes, (0, 30), strict=True):
        values, vectors = np.linalg.eigh(dense[start : start + size, start:][:, :size])
        np.testing.assert_allclose(top.eigenvalue, values[-1], rtol=1e-4)
        np.testing.assert_allclose(
            abs(flatten(top.eigenvector) @ vectors[:, -1]), 1, atol=1e-4
        )


@pytest.mark.parametrize(
    ("params", "names"),
    [
        ([{"w": 1.0, "b": 2.0}, {"w": 3.0}], ["0", "1"]),
        ({"w": 1.0, "b": 2.0}, ["b", "w"]),
        ({"params": {"a": {"c": {"w": 1.0}}, "d": 2.0}}, ["params/a/c", "params"]),
        (nnx.state(nnx.List([nnx.Linear(1, 1, rngs=nnx.Rngs(0))])), ["0"]),
        (1.0, [""]),
        ({"none": jnp.ones((0, 2)), "w": 1.0}, ["w"]),
    ],
)
def test_layers_are_named_by_what_holds_them(params, names):
    params = jax.tree.map(jnp.asarray, params)
    f = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p))
    found = diagnostics.sharpness_by_layer(f, params)
    assert [*found] == names
    np.testing.assert_allclose([x.eigenvalue for x in found.values()], 2, rtol=1e-6)


# --- seeds ----------------------------------------------------------------------------


def of_few_products(solve, **options):
    spectrum = jnp.linspace(1.0, 2.0, 30)
    return lambda seed: solve(lambda v: spectrum * v, spectrum, seed=seed, **options)


def worst_case(seed):
    """From a point without a slope the first step goes along a random vector."""
    bowl = lambda w: jnp.sum(jnp.linspace(1.0, 2.0, 30) * w**2)
    w, options = jnp.zeros(30), {"num_steps": 1, "seed": seed}
    return diagnostics.worst_case_sharpness(bowl, w, 0.1, **options).value


@pytest.mark.parametrize(
    "find",
    [
        of_few_products(eigen.top_eigenpairs, k=1, max_matvecs=3),
        of_few_products(eigen.top_eigenpairs, k=1, max_matvecs=3, host_loop=True),
        of_few_products(eigen.spectral_density, num_matvecs=3),
        worst_case,
    ],
    ids=["top_eigenpairs", "host loop", "spectral_density", "worst case"],
)
def test_a_seed_repeats_itself_and_another_is_another(find):
    first, again, other = map(find, (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    assert not np.allclose(jax.tree.leaves(first)[-1], jax.tree.leaves(other)[-1])


# --- alignment ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_alignment_is_the_absolute_cosine(dtype):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        a, b = ([jnp.asarray(rng.normal(size=n), dtype) for n in (5, 3)] for _ in "ab")
        x, y = (flatten(t).astype(np.float64) for t in (a, b))
        expected = abs(x @ y) / (np.linalg.norm(x) * np.linalg.norm(y))
        for c in (1, -1e6, 1e-12):
            scaled = jax.tree.map(lambda x, c=c: x.astype(jnp.float32) * c, a)
            actual = jax.jit(diagnostics.alignment)(scaled, b)
            np.testing.assert_allclose(actual, expected, rtol=1e-5)
            assert 0.999999 < diagnostics.alignment(scaled, a) <= 1
        zeros = jax.tree.map(jnp.zeros_like, a)
        assert diagnostics.alignment(a, zeros) == 0
        assert diagnostics.alignment(zeros, a) == 0


def test_alignment_of_trees_in_other_containers():
    """As a v in the state of an optimizer of nnx, and one like the model's."""
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.trace(0.9), wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    optimizer.update(model, params)
    trace = optax.tree.get(optimizer.opt_state, "trace")
    assert jax.tree.structure(trace) != jax.tree.structure(params)
    np.testing.assert_allclose(diagnostics.alignment(trace, params), 1, rtol=1e-6)
    with pytest.raises(ValueError, match=r"b must be a tree .* of the same parameters"):
        diagnostics.alignment(params, {"kernel": jnp.ones(3)})


# --- the gradient that is handed in ---------------------------------------------------


def checked():
    """A link that checks what reaches it, where `sam` would be."""

    def update(updates, state, params, *, value_fn, **_):
        diagnostics.check_gradient(updates, params, value_fn=value_fn)
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def step(before, params, grads, value_fn):
    tx = optax.chain(before, checked(), sam(), optax.sgd(0.1))
    return tx.update(grads, tx.init(params), params, value_fn=value_fn)


def kernels_alone(params):
    return jax.tree.map(lambda w: w.ndim > 1, params)


def numbers_and_leaf(error):
    """Relative difference, cosine, ratio of norms and worst leaf in an error."""
    number = r"(inf|nan|-?[\d.]+(?:e[+-]?\d+)?)"
    found = re.search(
        f"difference {number}, cosine {number}, ratio of norms {number}; the leaf that "
        r"differs most is (updates[^.]*)\. A cosine of 1 or -1 means",
        str(error.value),
    )
    *numbers, leaf = found.groups()
    return [float(x) for x in numbers], leaf


def expected_numbers(updates, gradient):
    u, g = (flatten(x).astype(np.float64) for x in (updates, gradient))
    sizes = np.linalg.norm(u), np.linalg.norm(g)
    return np.linalg.norm(u - g) / sizes[1], u @ g / np.prod(sizes), sizes[0] / sizes[1]


@pytest.mark.parametrize(
    ("before", "cosine"),
    [
        (optax.clip_by_global_norm(0.01), 1),
        (optax.scale(128), 1),
        (optax.sgd(0.1), -1),
        (optax.add_decayed_weights(0.01), None),
        (optax.add_decayed_weights(0.01, kernels_alone), None),
        (optax.adam(0.1), None),
        (optax.clip(0.01), None),
    ],
)
def test_a_link_before_is_found_out(before, cosine):
    params, loss = network()
    params["hidden"]["b"] += 0.3
    grads = jax.grad(loss)(params)
    step(optax.identity(), params, grads, loss)
    with pytest.raises(ValueError, match="not the gradient of value_fn") as error:
        step(before, params, grads, loss)
    numbers, _ = numbers_and_leaf(error)
    updates, _ = before.update(grads, before.init(params), params)
    np.testing.assert_allclose(numbers, expected_numbers(updates, grads), rtol=5e-3)
    if cosine is not None:  # a multiple, and so it reads
        assert numbers[1] == cosine


@pytest.mark.parametrize("seed", range(3))
def test_another_batch_or_dropout_mask_is_found_out(seed):
    params, loss = network(seed)

    def dropout_loss(params, key):
        kept = jax.random.bernoulli(key, 0.8, params["out"]["w"].shape)
        return loss(params | {"out": {"w": params["out"]["w"] * kept / 0.8}})

    keys = jax.random.split(jax.random.key(seed))
    for f, mine, other in ((loss, 0, 1), (dropout_loss, *keys)):
        value_fn = lambda p, f=f, mine=mine: f(p, mine)
        step(optax.identity(), params, jax.grad(f)(params, mine), value_fn)
        with pytest.raises(ValueError, match="updates are not the gradient") as error:
            step(optax.identity(), params, jax.grad(f)(params, other), value_fn)
        assert abs(numbers_and_leaf(error)[0][1]) < 0.99  # another vector


def test_a_penalty_or_a_scale_in_the_loss_alone_is_found_out():
    params, loss = network()
    grads = jax.grad(loss)(params)
    with_penalty = lambda p: loss(p) + 0.005 * tree_math.vdot(p, p)
    for f in (with_penalty, lambda p: 1000 * loss(p)):
        with pytest.raises(ValueError, match="updates are not the gradient") as error:
            step(optax.identity(), params, grads, f)
        expected = expected_numbers(grads, jax.grad(f)(params))
        np.testing.assert_allclose(numbers_and_leaf(error)[0], expected, rtol=5e-3)


@pytest.mark.parametrize("key", [("hidden", "w"), ("hidden", "b"), ("out", "w")])
def test_the_message_names_the_leaf_that_differs_most(key):
    params, loss = network()
    grads = jax.grad(loss)(params)
    other = jax.tree.map(lambda x: 1.01 * x, grads)
    other[key[0]][key[1]] = -2 * grads[key[0]][key[1]]
    with pytest.raises(ValueError, match="updates are not") as error:
        diagnostics.check_gradient(other, params, value_fn=loss)
    numbers, leaf = numbers_and_leaf(error)
    assert leaf == f"updates['{key[0]}']['{key[1]}']"
    np.testing.assert_allclose(numbers, expected_numbers(other, grads), rtol=0.01)


@functools.cache
def mean_of_batches(dtype):
    """The loss of a batch, the mean of five and the gradient, compiled once for all."""
    loss = jax.jit(network(dtype=jnp.dtype(dtype))[1])
    whole = jax.jit(lambda p: sum(loss(p, i) for i in range(5)) / 5)
    return loss, whole, jax.jit(jax.grad(loss))


@jax.jit
def five_percent_off(grads, seed):
    """In length, and in a direction of chance."""
    noise = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(seed), x.shape), grads
    )
    factor = 0.05 * tree_math.norm(grads) / tree_math.norm(noise)
    return (
        tree_math.scale(1.05, grads),
        tree_math.scale(0.95, grads),
        tree_math.add_scaled(grads, factor, noise),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("seed", range(3))
def test_the_tolerance_follows_the_dtype(seed, dtype):
    """The mean of rounded gradients is right; what is 5% off is not."""
    params, _ = network(seed, jnp.dtype(dtype))
    loss, whole, gradient = mean_of_batches(dtype)
    each = [gradient(params, i) for i in range(5)]
    grads = jax.tree.map(lambda *x: sum(x) / 5, *each)
    difference = diagnostics.check_gradient(grads, params, value_fn=whole)
    assert isinstance(difference, float)
    if dtype == "bfloat16":
        assert difference > 1e-3  # what float32 is held to
    diagnostics.check_gradient(freeze(grads), params, value_fn=whole)
    for off in five_percent_off(tree_math.widen(grads), seed):
        for updates in (off, tree_math.cast_like(off, params)):
            with pytest.raises(ValueError, match="updates are not the gradient"):
                diagnostics.check_gradient(updates, params, value_fn=whole)
    with pytest.raises(ValueError, match="updates are not the gradient"):
        diagnostics.check_gradient(each[0], params, value_fn=lambda p: loss(p, 1))


def test_updates_alone_that_are_narrow_are_held_to_less():
    params, loss = network()
    grads = tree_math.scale(1.01, jax.grad(loss)(params))
    with pytest.raises(ValueError, match="updates are not the gradient"):
        diagnostics.check_gradient(grads, params, value_fn=loss)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), grads)
    difference = diagnostics.check_gradient(narrow, params, value_fn=loss)
    np.testing.assert_allclose(difference, 0.01, rtol=0.3)


def test_the_relative_difference_comes_back():
    params, loss = network()
    grads = jax.grad(loss)(params)
    assert diagnostics.check_gradient(grads, params, value_fn=loss) == 0
    off = tree_math.scale(1.0005, grads)
    difference = diagnostics.check_gradient(off, params, value_fn=loss)
    np.testing.assert_allclose(difference, 0.0005, rtol=1e-2)
    with pytest.raises(ValueError, match=r"relative difference 0\.0005, cosine 1"):
        diagnostics.check_gradient(off, params, value_fn=loss, rtol=1e-4)
    doubled = lambda p: tree_math.scale(2.0, jax.grad(loss)(p))  # as in `update`
    twice = doubled(params)
    kwargs = {"value_fn": loss, "grad_fn": doubled}
    assert diagnostics.check_gradient(twice, params, **kwargs) == 0
    with pytest.raises(ValueError, match="gradient of grad_fn at params"):
        diagnostics.check_gradient(grads, params, **kwargs)


def test_gradients_that_are_zero_or_not_finite():
    w, zero = jnp.ones(3), jnp.zeros(3)
    flat = lambda w: 0 * jnp.sum(w)
    assert diagnostics.check_gradient(zero, w, value_fn=flat) == 0
    for updates, f, expected in (
        (jnp.arange(3.0), flat, [np.inf, 0, np.inf]),
        (zero, jnp.sum, [1, 0, 0]),
        (w.at[1].set(jnp.inf), jnp.sum, [np.inf, np.nan, np.inf]),
        (w, lambda w: jnp.sum(jnp.log(w - 1)), [np.nan, np.nan, 0]),
    ):
        with pytest.raises(ValueError, match="one of both is zero or not fin") as error:
            diagnostics.check_gradient(updates, w, value_fn=f)
        np.testing.assert_equal(numbers_and_leaf(error)[0], expected)


def test_a_function_that_returns_the_value_too():
    params, loss = network()
    grads = jax.grad(loss)(params)
    both = jax.value_and_grad(loss)
    assert diagnostics.check_gradient(grads, params, grad_fn=both) == 0


def test_misuse_of_the_check():
    params, loss = network()
    with pytest.raises(ValueError, match="needs value_fn or grad_fn"):
        diagnostics.check_gradient(params, params)
    with pytest.raises(ValueError, match="updates must be a tree like params"):
        diagnostics.check_gradient(params["out"], params, value_fn=loss)
    with pytest.raises(ValueError, match="rtol must be a finite number"):
        diagnostics.check_gradient(params, params, value_fn=loss, rtol=-1)
    check = lambda p: diagnostics.check_gradient(p, params, value_fn=loss)
    for transform in (jax.jit, lambda f: lambda p: jax.eval_shape(f, p)):
        with pytest.raises(ValueError, match="outside jit and eval_shape"):
            transform(check)(params)
    closed = lambda c: diagnostics.check_gradient(
        params, params, value_fn=lambda p: c * loss(p)
    )
    with pytest.raises(ValueError, match="outside jit and eval_shape"):
        jax.jit(closed)(1.0)
    shapes = jax.eval_shape(lambda p: p, params)
    with pytest.raises(ValueError, match="needs values, got traced arrays or shapes:"):
        diagnostics.check_gradient(params, shapes, value_fn=loss)
