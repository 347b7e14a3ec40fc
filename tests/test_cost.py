"""What a step costs: operations, bytes and memory of compiled programs."""

import functools
import itertools

import jax
import jax.numpy as jnp
import optax
import pytest
from links import LINKS
from problems import network

from eigensam_jax import eigen, eigen_sam, hessian, sam, trackers


def shapes(sizes):
    """Of a fully connected network's parameters."""
    return [
        {
            "w": jax.ShapeDtypeStruct((m, n), "float32"),
            "b": jax.ShapeDtypeStruct((n,), "float32"),
        }
        for m, n in itertools.pairwise(sizes)
    ]


def batch_of(size, inputs):
    return (
        jax.ShapeDtypeStruct((size, inputs), "float32"),
        jax.ShapeDtypeStruct((size,), "int32"),
    )


HEAD = {"frozen": False, "head": True}
WIDE = shapes((784, 1024, 1024, 10)), batch_of(256, 784)
DEEP = shapes((128,) * 9), batch_of(2048, 128)
# The compiler before takes more passes over memory, for SAM too.
FUSES = jax.__version_info__ >= (0, 10, 2)


def loss(params, batch):
    x, labels = batch
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    logits = x @ params[-1]["w"] + params[-1]["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def compiled(network, transformation, curvature_part=None, **kwargs):
    """A donated training step; the Hessian of a part of the batch, if one is given."""
    tx = optax.chain(transformation, optax.sgd(0.1, momentum=0.9))

    def step(params, state, batch):
        value_fn = lambda p: loss(p, batch)
        functions = {"value_fn": value_fn}
        if curvature_part is not None:
            part = jax.tree.map(lambda x: x[::curvature_part], batch)
            functions["curvature_fn"] = lambda p: loss(p, part)
        grads = jax.grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, **functions, **kwargs)
        return optax.apply_updates(params, updates), state

    params, batch = network
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(step, donate_argnums=(0, 1))
    return step.lower(params, state, batch).compile()


def operations(program):
    return program.cost_analysis()["flops"]


def traffic(program):
    return program.cost_analysis()["bytes accessed"]


def memory(program):
    return program.memory_analysis().temp_size_in_bytes


def test_sam_costs_two_gradients():
    gradient = operations(jax.jit(jax.grad(loss)).lower(*WIDE).compile())
    assert 1.99 * gradient <= operations(compiled(WIDE, sam(0.1))) <= 2.01 * gradient


def test_secant_costs_hardly_more_than_sam():
    plain = compiled(WIDE, sam(0.1))
    every_5 = eigen_sam(0.1, 0.2, trackers.secant(decay=0.9, update_interval=5))
    observed, skipped = (
        compiled(WIDE, every_5, refresh=refresh) for refresh in (True, False)
    )
    assert operations(observed) <= 1.012 * operations(plain)
    bounds = (1.25, 1.46) if FUSES else (1.28, 1.55)
    of_five = traffic(observed) + 4 * traffic(skipped)
    assert of_five <= 5 * bounds[0] * traffic(plain)
    by_default = compiled(WIDE, eigen_sam(0.1, 0.2))
    assert operations(by_default) <= 1.012 * operations(plain)
    assert traffic(by_default) <= bounds[1] * traffic(plain)
    one_copy = sum(4 * x.size for x in jax.tree.leaves(WIDE[0]))
    if FUSES:
        assert traffic(by_default) - traffic(plain) <= 10.1 * one_copy
    # The gradient is read once more at the end, when one activation is there still.
    activation = 4 * 256 * 1024
    assert memory(by_default) <= memory(plain) + one_copy + activation


@pytest.mark.skipif(not FUSES, reason="the compiler before takes more passes")
def test_ritz_takes_eleven_more_passes_than_the_secant():
    one_copy = sum(4 * x.size for x in jax.tree.leaves(WIDE[0]))
    ritz, secant = (
        traffic(compiled(WIDE, eigen_sam(0.1, 0.2, tracker), refresh=False))
        for tracker in (trackers.ritz(), trackers.secant())
    )
    assert 10.9 * one_copy <= ritz - secant <= 11.1 * one_copy


M = 12


@pytest.mark.parametrize(
    ("solve", "vectors"),
    [
        (lambda f, d: eigen.lanczos(f, d, num_matvecs=M), M + 3),
        (lambda f, d: eigen.top_eigenpairs(f, d, k=2), 2 * M + 2 + 2),
        (lambda f, d: eigen.spectral_density(f, d, num_matvecs=M), M + 5),
        (lambda f, d: eigen.trace(f, d, rank=0), 8),
        (lambda f, d: eigen.trace(f, d, rank=M), M + 8),
        (lambda f, d: eigen.diagonal(f, d, rank=M), M + 8 + 3),
    ],
    ids=["lanczos", "top_eigenpairs", "density", "hutchinson", "trace", "diagonal"],
)
def test_solvers_hold_as_many_vectors_as_they_say(solve, vectors):
    size = 100_000
    program = jax.jit(lambda d: solve(lambda v: d * v, d))
    found = program.lower(jax.ShapeDtypeStruct((size,), "float32")).compile()
    found = found.memory_analysis()
    held = found.temp_size_in_bytes + found.output_size_in_bytes
    assert vectors - 2 <= held / (4 * size) <= vectors + 0.1


def test_power_iteration_costs_its_products():
    params, batch = WIDE
    product = jax.jit(lambda p, v, b: hessian.hvp(lambda p: loss(p, b), p, v))
    product = operations(product.lower(params, params, batch).compile())
    link = eigen_sam(0.1, 0.2, trackers.power_iteration(5, update_interval=100))
    due, plain = (
        operations(compiled(WIDE, link, refresh=refresh)) for refresh in (True, False)
    )
    two_gradients = operations(compiled(WIDE, sam(0.1)))
    # The body of a loop counts once, and runs five times.
    assert product <= due - plain <= 1.03 * product
    assert plain <= 1.01 * two_gradients


@functools.cache
def memory_of_sam():
    return memory(compiled(DEEP, sam(0.1)))


@pytest.mark.parametrize(
    ("tracker", "part"),
    [
        pytest.param(trackers.secant(), None, id="secant"),
        pytest.param(trackers.power_iteration(), 2, id="power_iteration"),
        # Its product is made as those of power iteration, and Lanczos' are in a loop.
        pytest.param(trackers.ritz(), 2, id="ritz", marks=pytest.mark.slow),
        pytest.param(trackers.lanczos(), 4, id="lanczos", marks=pytest.mark.slow),
    ],
)
def test_part_of_the_batch_bounds_the_memory_of_products(tracker, part):
    plain = memory_of_sam()
    link = eigen_sam(0.1, 0.2, tracker)
    whole = memory(compiled(DEEP, link))
    in_part = whole if part is None else memory(compiled(DEEP, link, part))
    assert in_part <= 1.5 * plain
    # Of the whole batch a product needs two or three times that, not once for each.
    assert whole <= 3 * plain


def narrow_or_not(tracker):
    return [
        memory(compiled(WIDE, eigen_sam(0.1, 0.2, tracker, eigenvector_dtype=dtype)))
        for dtype in (None, "bfloat16")
    ]


def test_a_narrow_eigenvector_is_not_widened_between_its_steps():
    plain, narrow = narrow_or_not(trackers.secant(0.9, update_interval=5))
    assert narrow <= 1.001 * plain


@pytest.mark.parametrize("link", [sam(0.1, mask=HEAD), eigen_sam(0.1, 0.2, mask=HEAD)])
def test_frozen_parameters_are_neither_read_nor_written(link):
    params = {"frozen": jax.ShapeDtypeStruct((1000, 1000), "float32")}
    params["head"] = jax.ShapeDtypeStruct((10,), "float32")
    value_fn = lambda p: jnp.sum(p["head"] ** 4)

    def step(grads, state, params):
        return link.update(grads, state, params, value_fn=value_fn)[1]

    state = jax.eval_shape(link.init, params)
    program = jax.jit(step, donate_argnums=1).lower(params, state, params).compile()
    assert traffic(program) < 100_000  # bytes; a frozen leaf has 4,000,000


def test_programs_grow_in_proportion_to_the_leaves():
    length = lambda depth: (
        compiled((shapes((16,) * depth), batch_of(8, 16)), eigen_sam(0.1, 0.2))
        .as_text()
        .count("\n")
    )
    shallow, middle, deep = (length(depth) for depth in (3, 5, 9))
    assert deep - middle <= 2.2 * (middle - shallow)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=pytest.mark.slow if x in ("asam", "secant_2") else ())
        for x in LINKS
    ],
)
def test_outside_jit_only_the_first_steps_compile(name, caplog):
    """On every kind of step: what is due on some alone is decided in Python."""
    params, network_loss = network()
    value_fn = lambda p: network_loss(p, 0)
    tx = LINKS[name]()
    state = tx.init(params)
    for i in range(6):
        grads = jax.grad(value_fn)(params)
        caplog.clear()
        with jax.log_compiles():
            _, state = tx.update(grads, state, params, value_fn=value_fn)
        compiled = [x for x in caplog.messages if x.startswith("Compiling")]
        if i >= 4:  # each kind of step was there once with v, and once without
            assert not compiled
    with jax.log_compiles():
        jax.jit(lambda x: x + 1)(state[0])
    assert any(x.startswith("Compiling") for x in caplog.messages)  # it is logged
