"""Every public function and every link under JAX's strict configurations.

What comes out has to be what comes out without them, dtypes included.
"""

import contextlib
import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from links import LINKS as BARE_LINKS

import eigensam_jax
from eigensam_jax import (
    diagnostics,
    eigen,
    eigen_sam,
    hessian,
    info,
    periodic,
    perturbation,
    sde,
    sharpness,
    trackers,
    tree_math,
)

CONFIGURATIONS = {
    "strict promotion": [lambda: jax.numpy_dtype_promotion("strict")],
    "strict promotion, x64": [
        lambda: jax.numpy_dtype_promotion("strict"),
        lambda: jax.enable_x64(True),
    ],
    "no rank promotion": [lambda: jax.numpy_rank_promotion("raise")],
    "debug_nans": [lambda: jax.debug_nans(True)],
    "debug_infs": [lambda: jax.debug_infs(True)],
    "tracer leaks": [lambda: jax.check_tracer_leaks(True)],
    "key reuse": [lambda: jax.debug_key_reuse(True)],
}
DTYPES = {  # of the kernel and the bias
    "float32": (jnp.float32, jnp.float32),
    "bfloat16": (jnp.bfloat16, jnp.bfloat16),
    "mixed": (jnp.bfloat16, jnp.float32),
}
MODULES = (
    eigensam_jax,
    diagnostics,
    eigen,
    hessian,
    perturbation,
    sde,
    trackers,
    tree_math,
)

# --- a problem that is itself strict --------------------------------------------------

INPUTS = np.random.default_rng(0).normal(size=(4, 8, 3)).astype(np.float32)
TARGETS = np.tanh(INPUTS[..., :2] - INPUTS[..., 1:])


def make_batches():
    return jnp.asarray(INPUTS), jnp.asarray(TARGETS)


def make_params(dtype, seed=1):
    rng, (kernel, bias) = np.random.default_rng(seed), DTYPES[dtype]
    return {
        "w": jnp.asarray(rng.normal(size=(3, 2)), kernel),
        "b": jnp.asarray(rng.normal(size=2), bias),
    }


def loss(params, batch):
    x, y = batch
    w, b = params["w"], params["b"]
    outputs = jnp.tanh((x.astype(w.dtype) @ w).astype(b.dtype) + b[None])
    return jnp.mean((outputs - y.astype(b.dtype)) ** 2)


# --- the links ------------------------------------------------------------------------

LINKS = BARE_LINKS | {
    "periodic": lambda: periodic(BARE_LINKS["secant"](), 2),
    "periodic, reuse": lambda: periodic(BARE_LINKS["secant"](), 2, 0.3),
}
VARIANTS = {
    "grad_fn": ({}, lambda f: {"grad_fn": jax.grad(f)}),
    "value and gradient": ({}, lambda f: {"grad_fn": jax.value_and_grad(f)}),
    "curvature_fn": (
        {"tracker": trackers.ritz(2)},
        lambda f: {"value_fn": f, "curvature_fn": f},
    ),
    "mask": ({"mask": {"w": True, "b": False}}, None),
    "eigenvector_dtype": ({"eigenvector_dtype": jnp.bfloat16}, None),
    "finite_difference": (
        {"tracker": trackers.lanczos(2, 2), "hvp_mode": "finite_difference"},
        None,
    ),
    "schedule": ({"rho": optax.linear_schedule(0.0, 0.1, 3)}, None),
    "zero gradient": ({}, lambda f: {"value_fn": lambda p: 0 * f(p)}),
}


def trained(name, dtype, jitted=True, guarded=False):
    """Parameters, state and loss after a few steps; the last ones without transfers."""
    kwargs, functions = VARIANTS.get(name, ({}, None))
    link = LINKS[name]() if name in LINKS else eigen_sam(**kwargs)
    functions = functions or (lambda f: {"value_fn": f})
    tx = optax.chain(link, optax.sgd(0.1))

    def step(params, state, batch):
        arguments = functions(lambda p: loss(p, batch))
        (function,) = list(arguments.values())[:1]
        value, grads = jax.value_and_grad(lambda p: loss(p, batch))(params)
        if "zero" in name:
            value, grads = jax.value_and_grad(function)(params)
        updates, state = tx.update(grads, state, params, **arguments)
        return optax.apply_updates(params, updates), state, value

    step = jax.jit(step) if jitted else step
    params, inputs = make_params(dtype), make_batches()
    state = tx.init(params)
    batches = [jax.tree.map(lambda x, i=i: x[i], inputs) for i in range(4)]
    for i, batch in enumerate(batches):
        guard = jax.transfer_guard("disallow" if guarded and i >= 2 else "allow")
        with guard:
            params, state, value = step(params, state, batch)
    return params, state, value, info(state)


# --- the functions --------------------------------------------------------------------


def product(p):
    """A product that does not hide what a solver does: H = diag(1, 2, …)."""
    spectrum = jax.tree.map(
        lambda x: 1 + jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape), p
    )
    return lambda v: jax.tree.map(jnp.multiply, spectrum, v)


def clean(p):
    return loss(p, jax.tree.map(lambda x: x[0], make_batches()))


def predict(p):
    return jnp.tanh(p["w"]).astype(p["b"].dtype) + p["b"][None]


def listed(batches):
    return lambda: [jax.tree.map(lambda x, i=i: x[i], batches) for i in range(2)]


def path(p, alpha):
    return sde.simulate(
        jax.random.key(0),
        loss,
        sde.start(p),
        make_batches(),
        rho=0.1,
        eta=0.1,
        num_steps=2,
        substeps=2,
        alpha=alpha,
        tol=1e-2,
    )


def one_step(p):
    step = sde.make_step(loss, make_batches(), rho=0.1, eta=0.1, order=2)
    return step(jax.random.key(0), sde.start(p), 0.1)


SOLVE = {"k": 2, "tol": 1e-2}
METHOD = {"rho": 0.1, "alpha": 0.5, "tol": 1e-2}

# From parameters p and a vector v like them, in float32. What stands in brackets tells
# apart the ways to call one function.
FUNCTIONS = {
    "sharpness": lambda p, v: sharpness(clean, p),
    "sharpness (start)": lambda p, v: sharpness(clean, p, v0=v),
    "sharpness (reverse)": lambda p, v: sharpness(
        clean, p, hvp_mode="reverse_over_reverse"
    ),
    "sharpness (differences)": lambda p, v: sharpness(
        clean, p, tol=0.1, hvp_mode="finite_difference", max_matvecs=25
    ),
    "diagnostics.sharpness": lambda p, v: sharpness(clean, p, tol=0.1),
    "diagnostics.sharpness_by_layer": lambda p, v: diagnostics.sharpness_by_layer(
        clean, p, tol=0.1
    ),
    "diagnostics.sam_sharpness": lambda p, v: diagnostics.sam_sharpness(clean, p, 0.1),
    "diagnostics.sam_sharpness (scaled)": lambda p, v: diagnostics.sam_sharpness(
        clean, p, 0.1, eta=0.01
    ),
    "diagnostics.worst_case_sharpness": lambda p, v: diagnostics.worst_case_sharpness(
        clean, p, 0.1, num_steps=2
    ),
    "diagnostics.average_sharpness": lambda p, v: diagnostics.average_sharpness(
        clean, p, 0.1, num_samples=2
    ),
    "diagnostics.alignment": lambda p, v: diagnostics.alignment(p, v),
    "diagnostics.alignment (zero)": lambda p, v: diagnostics.alignment(
        jax.tree.map(jnp.zeros_like, p), v
    ),
    "diagnostics.filter_normalized": lambda p, v: diagnostics.filter_normalized(0, p),
    "diagnostics.filter_normalized (key)": lambda p, v: diagnostics.filter_normalized(
        jax.random.key(0), p
    ),
    "diagnostics.loss_slice": lambda p, v: diagnostics.loss_slice(
        clean, p, [v], [np.linspace(-1, 1, 3)], path=[p, v]
    ),
    "diagnostics.loss_slice (two)": lambda p, v: diagnostics.loss_slice(
        clean, p, [v, p], [[0.0, 0.5], jnp.arange(3)], path=[v]
    ),
    "eigen.power_iteration": lambda p, v: eigen.power_iteration(product(p), v, 3),
    "eigen.power_iteration (narrow)": lambda p, v: eigen.power_iteration(
        product(p), p, 3, unroll=True
    ),
    "eigen.lanczos": lambda p, v: eigen.lanczos(product(p), v, 3),
    "eigen.lanczos (narrow)": lambda p, v: eigen.lanczos(product(p), p, 3, unroll=True),
    "eigen.top_eigenpairs": lambda p, v: eigen.top_eigenpairs(product(p), p, **SOLVE),
    "eigen.top_eigenpairs (magnitude)": lambda p, v: eigen.top_eigenpairs(
        product(p), p, **SOLVE, v0=v, which="magnitude"
    ),
    "eigen.spectral_density": lambda p, v: eigen.spectral_density(
        product(p), p, num_matvecs=3, num_samples=2
    ),
    "eigen.trace": lambda p, v: eigen.trace(product(p), p, num_matvecs=8),
    "eigen.diagonal": lambda p, v: eigen.diagonal(product(p), p, num_matvecs=8),
    "eigen.smooth_density": lambda p, v: eigen.smooth_density(
        eigen.SpectralDensity(v["w"], jnp.abs(v["w"])), jnp.linspace(-2, 2, 5), 0.1
    ),
    "hessian.hvp": lambda p, v: hessian.hvp(clean, p, v),
    "hessian.matvec": lambda p, v: hessian.matvec(jax.grad(clean), p)(v),
    "hessian.mean_matvec": lambda p, v: hessian.mean_matvec(loss, p, make_batches())(v),
    "hessian.num_batches": lambda p, v: np.int32(hessian.num_batches(make_batches())),
    "hessian.gauss_newton_matvec": lambda p, v: hessian.gauss_newton_matvec(
        predict, lambda y: jnp.sum(y**2), p
    )(v),
    "perturbation.sam": lambda p, v: perturbation.sam(p, 0.1),
    "perturbation.asam": lambda p, v: perturbation.asam(p, p, 0.1, 0.01),
    "perturbation.scaled": lambda p, v: perturbation.scaled(v, p, 0.01),
    "perturbation.eigen_sam": lambda p, v: perturbation.eigen_sam(p, v, 0.1, 0.5),
    "perturbation.eigen_sam (zero)": lambda p, v: perturbation.eigen_sam(
        jax.tree.map(jnp.zeros_like, p), v, 0.1, 0.5
    ),
    "sde.start": lambda p, v: sde.start(p),
    "sde.make_step": lambda p, v: one_step(p),
    "sde.simulate": lambda p, v: path(p, 0.0),
    "sde.simulate (Eigen-SAM)": lambda p, v: path(p, 0.5),
    "sde.drift": lambda p, v: sde.drift(loss, p, make_batches(), **METHOD),
    "sde.diffusion": lambda p, v: sde.diffusion(
        loss,
        p,
        make_batches(),
        increments=jnp.ones(4, jnp.float32),
        eigenvector=v,
        **METHOD,
    ),
    "sde.expanded_gradient": lambda p, v: sde.expanded_gradient(clean, p, v, 3),
    "sde.third_derivative": lambda p, v: sde.third_derivative(clean, p, v, v),
    "sde.eigenvalue_gradient": lambda p, v: sde.eigenvalue_gradient(
        loss, p, make_batches(), v
    ),
    "sde.eigenvalue_curvature": lambda p, v: sde.eigenvalue_curvature(
        loss, p, make_batches(), v, v, 12.0
    ),
    "sde.sharpness_rates": lambda p, v: sde.sharpness_rates(
        loss, p, make_batches(), eta=0.1, **METHOD
    ),
    "tree_math.accumulation_dtype": lambda p, v: jnp.zeros(
        (), tree_math.accumulation_dtype((p, v))
    ),
    "tree_math.widen": lambda p, v: tree_math.widen(p),
    "tree_math.cast_like": lambda p, v: tree_math.cast_like(v, p),
    "tree_math.zeros_like": lambda p, v: tree_math.zeros_like(p),
    "tree_math.vdot": lambda p, v: tree_math.vdot(p, v),
    "tree_math.vdots": lambda p, v: tree_math.vdots((p, v), (p, p)),
    "tree_math.norm": lambda p, v: tree_math.norm(p),
    "tree_math.unit": lambda p, v: tree_math.unit(p),
    "tree_math.safe_inverse": lambda p, v: tree_math.safe_inverse(p["b"]),
    "tree_math.safe_divide": lambda p, v: tree_math.safe_divide(2, p["b"]),
    "tree_math.scale": lambda p, v: tree_math.scale(2.0, p),
    "tree_math.scale (array)": lambda p, v: tree_math.scale(v["b"][0], p),
    "tree_math.add_scaled": lambda p, v: tree_math.add_scaled(p, 0.5, v),
    "tree_math.where": lambda p, v: tree_math.where(p["b"][0] > 0, v, v),
}
ON_THE_HOST = {
    "diagnostics.check_gradient": lambda p, v: np.float32(  # a number of Python
        diagnostics.check_gradient(jax.grad(clean)(p), p, value_fn=clean)
    ),
    "diagnostics.report": lambda p, v: jax.tree.map(  # numbers of Python among them
        np.float32, diagnostics.report(clean, p, num_matvecs=40)
    ),
    "sharpness (host loop)": lambda p, v: sharpness(clean, p, host_loop=True),
    "eigen.top_eigenpairs (host loop)": lambda p, v: eigen.top_eigenpairs(
        product(p), p, **SOLVE, host_loop=True
    ),
    "eigen.spectral_density (host loop)": lambda p, v: eigen.spectral_density(
        product(p), p, num_matvecs=3, num_samples=2, host_loop=True
    ),
    "hessian.mean_matvec (host)": lambda p, v: hessian.mean_matvec(
        loss, p, listed(make_batches())
    )(v),
}
COMPUTED = [x for x in FUNCTIONS if x != "hessian.num_batches"]  # which is Python's
BY_LINKS = {
    "sam": "sam",
    "asam": "asam",
    "eigen_sam": "secant",
    **{f"trackers.{x}": x for x in ("secant", "ritz", "power_iteration", "lanczos")},
    "info": "sam",
    "periodic": "periodic",
}


def public_functions(module):
    """The functions of a module: those that it lists, or else those it defines."""
    names = getattr(module, "__all__", None) or [
        name
        for name, x in vars(module).items()
        if getattr(x, "__module__", None) == module.__name__ and name[0] != "_"
    ]
    prefix = module.__name__.removeprefix("eigensam_jax").lstrip(".")
    return {
        f"{prefix}.{name}".lstrip(".")
        for name in names
        if inspect.isfunction(getattr(module, name))
    }


def test_no_public_function_is_left_out():
    public = set().union(*map(public_functions, MODULES))
    tried = {x.split(" (")[0] for x in FUNCTIONS | ON_THE_HOST} | set(BY_LINKS)
    assert public == tried
    assert set(BY_LINKS.values()) <= set(LINKS)


# --- the table ------------------------------------------------------------------------

CALLS = {
    **{
        f"{name}, {dtype}": functools.partial(trained, name, dtype)
        for name in (*LINKS, *VARIANTS)
        for dtype in DTYPES
    },
    **{
        f"{name} outside jit, {dtype}": functools.partial(trained, name, dtype, False)
        for name in ("sam", "secant")
        for dtype in DTYPES
    },
    **{
        f"{name}, {dtype}": lambda f=f, dtype=dtype: f(
            make_params(dtype), make_params("float32", seed=2)
        )
        for name, f in (FUNCTIONS | ON_THE_HOST).items()
        for dtype in DTYPES
    },
}


SEARCH = "eigen.top_eigenpairs in one program"
CALLS[SEARCH] = lambda: jax.jit(FUNCTIONS["eigen.top_eigenpairs"])(
    make_params("bfloat16"), make_params("float32", seed=2)
)


@functools.cache
def plain(call):
    return jax.block_until_ready(CALLS[call]())


def check(configuration, call):
    expected = plain(call)
    with contextlib.ExitStack() as stack:
        for manager in CONFIGURATIONS[configuration]:
            stack.enter_context(manager())
        actual = jax.block_until_ready(CALLS[call]())
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "configuration",
    [  # what mixes dtypes without x64 mixes them with it
        pytest.param(x, marks=pytest.mark.slow if x == "strict promotion" else ())
        for x in CONFIGURATIONS
    ],
)
def test_the_default_link_and_a_search(configuration):
    check(configuration, "secant, bfloat16")
    check(configuration, SEARCH)


def test_a_steady_step_moves_nothing_to_or_from_the_host():
    trained("secant", "bfloat16", guarded=True)


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_everything(configuration, call):
    check(configuration, call)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*LINKS, *VARIANTS])
def test_steady_steps_move_nothing_to_or_from_the_host(name, dtype):
    trained(name, dtype, guarded=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", COMPUTED)
def test_functions_move_nothing_to_or_from_the_host(name, dtype):
    function = jax.jit(FUNCTIONS[name])
    arguments = make_params(dtype), make_params("float32", seed=2)
    jax.block_until_ready(function(*arguments))
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(function(*arguments))


# --- shapes alone ---------------------------------------------------------------------


AS_OTHERS = (  # their results are made where those of the same function are
    # or are so in eigen/test_top_eigenpairs.py
    *("eigen.top_eigenpairs", "eigen.spectral_density"),
    *("sharpness (reverse)", "sharpness (differences)", "diagnostics.sharpness"),
    *("eigen.top_eigenpairs (magnitude)", "sde.simulate (Eigen-SAM)"),
)


@pytest.mark.parametrize(
    "dtype",  # "mixed" has leaves of both of the others
    [pytest.param(x, marks=() if x == "mixed" else pytest.mark.slow) for x in DTYPES],
)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=pytest.mark.slow if x in AS_OTHERS else ())
        for x in COMPUTED
    ],
)
def test_functions_of_shapes_alone(name, dtype):
    arguments = make_params(dtype), make_params("float32", seed=2)
    shapes = jax.eval_shape(FUNCTIONS[name], *arguments)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(shapes))
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, plain(f"{name}, {dtype}"))
