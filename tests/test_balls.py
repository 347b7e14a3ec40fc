"""Three senses of sharpness in a ball, against closed forms and brute force."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import dense_hessian, flatten, network, quadratic, symmetric

from eigensam_jax import diagnostics, perturbation, tree_math
from eigensam_jax._update import programs

ALL = pytest.mark.parametrize(
    "measure",
    [
        diagnostics.sam_sharpness,
        diagnostics.worst_case_sharpness,
        diagnostics.average_sharpness,
    ],
)
HIDDEN = {"hidden": True, "out": False}


def first(result):
    return result if isinstance(result, jax.Array) else result[0]


@pytest.mark.parametrize("eta", [None, 0.01])
@pytest.mark.parametrize("mask", [None, HIDDEN])
def test_sam_sharpness_is_the_rise_at_the_perturbation_of_the_link(mask, eta):
    params, loss = network()
    grads = jax.grad(loss)(params)
    if mask:
        grads = grads | {"out": tree_math.zeros_like(grads["out"])}
    if eta is None:
        epsilon = perturbation.sam(grads, 0.3).epsilon
    else:
        epsilon = perturbation.asam(grads, params, 0.3, eta).epsilon
    expected = loss(tree_math.add_scaled(params, 1, epsilon)) - loss(params)
    found = diagnostics.sam_sharpness(loss, params, 0.3, eta=eta, mask=mask)
    assert expected > 0.05
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("scale_biases", [False, True])
def test_each_measure_is_told_whether_to_scale_biases(scale_biases):
    """Of a linear loss with slope c, in closed form: its largest rise is ρ‖Tc‖."""
    w = {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([3.0])}
    slope = {"kernel": jnp.array([[0.5, 1.0]]), "bias": jnp.array([2.0])}
    loss, rho, eta = (lambda p: tree_math.vdot(slope, p)), 0.3, 0.1
    options = {"eta": eta, "scale_biases": scale_biases}
    scale = np.array([3.1 if scale_biases else 1.0, 1.1, 2.1])
    largest = rho * np.linalg.norm(scale * flatten(slope))
    found = diagnostics.sam_sharpness(loss, w, rho, **options)
    np.testing.assert_allclose(found, largest, rtol=1e-5)
    worst = diagnostics.worst_case_sharpness(loss, w, rho, **options)
    np.testing.assert_allclose(worst.value, largest, rtol=1e-5)
    square = lambda p: tree_math.vdot(p, p) / 2
    mean = diagnostics.average_sharpness(square, w, rho, num_samples=400, **options)
    expected = rho**2 / 2 * np.mean(scale**2)
    assert abs(mean.value - expected) < 4 * mean.standard_error < expected / 2


def landscape(seed):
    """A function of the plane with several maxima in a ball of radius 1."""
    rng = np.random.default_rng(seed)
    waves, phases, heights = rng.normal(size=(4, 2)), rng.normal(size=4), rng.random(4)
    return lambda w: jnp.sum(heights * jnp.sin(2 * w @ waves.T + phases), -1)


@pytest.mark.parametrize("eta", [None, 0.5])
def test_the_worst_case_is_that_of_brute_force_in_the_plane(eta):
    radii, angles = np.meshgrid(np.linspace(0, 1, 101), np.linspace(0, 2 * np.pi, 721))
    ball = np.stack([radii * np.cos(angles), radii * np.sin(angles)], -1)
    shares = []
    for seed in range(20):
        f, w = landscape(seed), np.random.default_rng(seed).normal(size=(1, 2))
        value_fn = lambda p, f=f: f(p["w"])[0]
        params = {"w": jnp.asarray(w, jnp.float32)}
        scale = 1 if eta is None else np.abs(w) + eta
        highest = np.max(f(w + 0.5 * scale * ball)) - f(w)[0]
        worst = diagnostics.worst_case_sharpness(
            value_fn, params, 0.5, eta=eta, num_starts=8
        )
        delta = np.asarray(worst.perturbation["w"])
        assert np.linalg.norm(delta / scale) <= 0.5 * (1 + 1e-6)
        rise = f(w + delta)[0] - f(w)[0]
        np.testing.assert_allclose(worst.value, rise, atol=1e-5)
        own = diagnostics.sam_sharpness(value_fn, params, 0.5, eta=eta)
        assert worst.value >= own - 1e-6
        assert worst.value <= highest + 1e-4
        one = diagnostics.worst_case_sharpness(value_fn, params, 0.5, eta=eta)
        shares.append([one.value / highest, worst.value / highest])
    by_one, by_eight = np.transpose(shares)
    assert np.all(by_eight > 0.99), by_eight
    assert np.sum(by_one > 0.99) >= 14, by_one  # the others are at another maximum


@pytest.mark.parametrize("seed", range(3))
def test_the_worst_case_of_a_quadratic(seed):
    """Its maximum on the ball solves (μ − H) x = g for the μ > λ_max with ‖x‖ = ρ."""
    matrix, _ = symmetric([-3.0, -1.0, 0.5, 2.0, 4.0], seed)
    with jax.enable_x64(True):
        value_fn, to_tree = quadratic(matrix, jnp.float64)
        w = np.random.default_rng(seed).normal(size=5)
        g, low, high = matrix @ w, 4.0 + 1e-9, 1e3
        for _ in range(200):
            middle = (low + high) / 2
            x = np.linalg.solve(middle * np.eye(5) - matrix, g)
            low, high = (middle, high) if np.linalg.norm(x) > 2 else (low, middle)
        worst = diagnostics.worst_case_sharpness(
            value_fn, to_tree(w), 2.0, num_steps=100
        )
        delta, rise = flatten(worst.perturbation), float(worst.value)
    np.testing.assert_allclose(rise, g @ x + x @ matrix @ x / 2, rtol=1e-4)
    np.testing.assert_allclose(delta, x, atol=0.03)


def test_where_the_gradient_is_zero_the_worst_case_is_the_top_eigenvector():
    matrix, basis = symmetric([-3.0, 1.0, 5.0], 0)
    value_fn, to_tree = quadratic(matrix, jnp.float32)
    at = to_tree(jnp.zeros(3))
    assert diagnostics.sam_sharpness(value_fn, at, 0.1) == 0
    worst = diagnostics.worst_case_sharpness(value_fn, at, 0.1)
    np.testing.assert_allclose(worst.value, 0.5 * 5 * 0.1**2, rtol=1e-4)
    cosine = abs(flatten(worst.perturbation) @ basis[:, 2]) / 0.1
    np.testing.assert_allclose(cosine, 1, atol=1e-4)


@pytest.mark.parametrize("eta", [None, 0.1])
@pytest.mark.parametrize("mask", [None, HIDDEN])
def test_the_average_is_that_of_the_trace(mask, eta):
    with jax.enable_x64(True):
        params, loss = network(dtype=jnp.float64)
        dense = np.asarray(dense_hessian(loss, params))
        scale = np.ones(len(dense))
        if eta:
            ones = jax.tree.map(jnp.ones_like, params)
            scale = flatten(perturbation.scaled(ones, params, eta))
        if mask:
            chosen = {
                k: jax.tree.map(lambda x, k=k: jnp.full_like(x, mask[k]), params[k])
                for k in params
            }
            scale = scale * flatten(chosen)
        size, rho = np.sum(scale > 0), 1e-3
        expected = rho**2 / 2 * np.sum(np.diag(dense) * scale**2) / size
        found = diagnostics.average_sharpness(
            loss, params, rho, num_samples=400, eta=eta, mask=mask
        )
    value, error = map(float, found)
    spread = rho**2 / 2 * np.linalg.norm(dense * np.outer(scale, scale)) / size
    assert error < 0.1 * spread
    assert abs(value - expected) < 3 * error


def test_the_average_of_a_linear_function_is_exactly_zero():
    found = diagnostics.average_sharpness(jnp.sum, jnp.zeros(8), 1.0, num_samples=4)
    np.testing.assert_allclose(found, (0, 0), atol=1e-6)


def test_standard_errors_of_the_average():
    f = lambda w: jnp.sum(w**2) + w[0] ** 4
    estimate = lambda seed: diagnostics.average_sharpness(
        f, jnp.ones(4), 1.0, num_samples=50, seed=seed
    )
    values, errors = jax.jit(jax.vmap(estimate))(jnp.arange(200))
    np.testing.assert_allclose(np.std(values), np.mean(errors), rtol=0.2)


@ALL
@pytest.mark.parametrize("eta", [None, 0.1])
def test_loops_of_the_host_and_of_the_program_agree(measure, eta):
    params, loss = network()
    one = partial(measure, loss, rho=0.2, eta=eta)
    for a, b in zip(
        jax.tree.leaves(one(params)), jax.tree.leaves(jax.jit(one)(params)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


@ALL
def test_m_sharpness_is_the_mean_over_parts(measure):
    params, loss = network()
    part = lambda i: first(measure(lambda p: loss(p, i), params, 0.2))
    mean = jnp.mean(jax.jit(partial(jax.lax.map, part))(jnp.arange(5)))
    np.testing.assert_allclose(mean, np.mean([part(i) for i in range(5)]), rtol=1e-4)


@ALL
def test_parameters_of_numpy_are_as_those_of_jax(measure):
    params, loss = network()
    numpy = jax.tree.map(np.asarray, params)
    found = (first(measure(loss, p, 0.2)) for p in (numpy, params))
    np.testing.assert_array_equal(*found)


@ALL
def test_a_batch_that_changes_is_not_stale(measure):
    data = {"x": jnp.array([1.0, 2.0])}
    value_fn = lambda w: jnp.sum(data["x"] * w**2)
    before = first(measure(value_fn, jnp.ones(2), 0.1))
    data["x"] = 10 * data["x"]
    after = first(measure(value_fn, jnp.ones(2), 0.1))
    np.testing.assert_allclose(after, 10 * before, rtol=1e-4)


@ALL
def test_a_batch_within_a_jit_that_changes_is_not_stale(measure):
    data = {"x": np.array([1.0, 2.0])}
    of = lambda data: jax.jit(lambda w: jax.jit(lambda w: jnp.sum(data * w**2))(w))
    value_fn = lambda w: of(data["x"])(w)
    before = first(measure(value_fn, jnp.ones(2), 0.1))
    data["x"] = 10 * data["x"]
    after = first(measure(value_fn, jnp.ones(2), 0.1))
    np.testing.assert_allclose(after, 10 * before, rtol=1e-4)


def test_a_loss_that_is_jitted_over_its_batch_is_compiled_once():
    data = jnp.array([1.0, 2.0])
    loss = jax.jit(lambda w: jnp.sum(data * w**2))
    value_fn = lambda w: loss(w)
    compiled = [
        programs.compiled(value_fn, jax.grad(value_fn), jnp.full(2, x))
        for x in (1.0, 2.0)
    ]
    for x, function in zip((1.0, 2.0), compiled, strict=True):
        np.testing.assert_allclose(function(jnp.full(2, x)), 2 * x * data)
    (program,) = programs._PROGRAMS[value_fn].values()
    assert program._cache_size() == 1


def counted(loss):
    """`loss`, and its values and gradients so far; a gradient's value is none."""
    counts = {"value": 0, "gradient": 0}
    add = lambda key, by: counts.update({key: counts[key] + by})

    @jax.custom_vjp
    def probe(x):
        jax.debug.callback(lambda: add("value", 1))
        return x

    def backward(_, g):
        jax.debug.callback(lambda: (add("gradient", 1), add("value", -1)))
        return (g,)

    probe.defvjp(lambda x: (probe(x), None), backward)
    return (lambda p: probe(loss(p))), counts


@pytest.mark.parametrize(
    ("measure", "options", "gradients", "values"),
    [
        (diagnostics.sam_sharpness, {}, 1, 1),
        (
            diagnostics.worst_case_sharpness,
            {"num_starts": 2, "num_steps": 3},
            2 * (3 + 1) + 2,
            0,
        ),
        (diagnostics.average_sharpness, {"num_samples": 4}, 0, 2 * 4 + 2),
    ],
    ids=["sam", "worst", "average"],
)
def test_a_measure_costs_what_it_says(measure, options, gradients, values):
    params, loss = network()
    loss, counts = counted(loss)
    measure(loss, params, 0.1, **options)
    jax.effects_barrier()
    assert counts == {"value": values, "gradient": gradients}


@pytest.mark.parametrize("rho", [0.003, 0.05])
def test_narrow_weights_move_as_by_sam(rho):
    """The loss of weights in bfloat16, whose spacing is often larger than ε."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (32, 64), (64, 64), (64, 10)
    wide = [
        jax.random.normal(k, s) / s[0] ** 0.5
        for k, s in zip(keys[:3], shapes, strict=True)
    ]
    params = [w.astype(jnp.bfloat16) for w in wide]
    images = jax.random.normal(keys[3], (256, 32))

    def loss(params):
        x = images
        for w in params:
            x = jnp.tanh(x @ w.astype(jnp.float32))
        return jnp.mean((x - images[:, :10]) ** 2)

    same = [w.astype(jnp.float32) for w in params]
    for measure in (
        diagnostics.sam_sharpness,
        lambda *x: diagnostics.worst_case_sharpness(*x).value,
    ):
        expected = measure(loss, same, rho)
        np.testing.assert_allclose(measure(loss, params, rho), expected, rtol=0.3)


@ALL
def test_a_frozen_parameter_is_not_checked(measure):
    frozen = jnp.ones(2, jnp.float8_e4m3fn)
    params, mask = {"a": jnp.ones(2), "b": frozen}, {"a": True, "b": False}
    loss = lambda p: jnp.sum(p["a"] ** 2)
    found = first(partial(measure, mask=mask)(loss, params, 0.1))
    np.testing.assert_allclose(
        found, first(measure(loss, {"a": params["a"]}, 0.1)), rtol=1e-5
    )


@ALL
def test_a_radius_of_zero_and_a_loss_that_is_not_finite(measure):
    params, loss = network()
    np.testing.assert_allclose(first(measure(loss, params, 0.0)), 0, atol=1e-6)
    broken = lambda p: jnp.nan * loss(p)
    assert np.isnan(first(measure(broken, params, 0.1)))


def test_a_value_that_is_not_finite_is_not_the_worst_case():
    for bad in (jnp.inf, jnp.nan):
        loss = lambda w, bad=bad: jnp.where(w[0] > 0.05, bad, jnp.sum(w))
        found = diagnostics.worst_case_sharpness(loss, jnp.zeros(2), 0.1)
        assert 0 < found.value < 0.15
        assert found.perturbation[0] <= 0.05


def test_a_slope_that_is_not_finite_at_w_does_not_end_the_search():
    loss = lambda w: jnp.sqrt(jnp.abs(w[0])) + w[1] ** 2
    found = diagnostics.worst_case_sharpness(loss, jnp.array([0.0, 1.0]), 0.1)
    corner = jnp.array([0.05, 0.0866])
    assert found.value > loss(jnp.array([0.0, 1.0]) + corner) - 1
    assert found.value > 0.2


def test_a_batch_of_numpy_is_moved_once():
    data = np.ones(3, np.float32)
    value_fn = lambda w: jnp.sum(data * w**2)
    product = programs.compiled(value_fn, jax.grad(value_fn), jnp.ones(3))
    x = jnp.ones(3)
    with jax.transfer_guard("disallow"):
        found = product(x)
    np.testing.assert_array_equal(found, 2 * data)


@ALL
def test_narrow_parameters(measure):
    f = lambda w: jnp.sum(w.astype(jnp.float32) ** 2)
    found = measure(f, jnp.ones(100, jnp.bfloat16), 5.0)
    wide = measure(f, jnp.ones(100), 5.0)
    assert first(found).dtype == jnp.float32
    np.testing.assert_allclose(first(found), first(wide), rtol=0.02)


@ALL
def test_bad_arguments(measure):
    f, w = (lambda w: jnp.sum(w**2)), jnp.ones(2)
    with pytest.raises(ValueError, match=r"rho must be .* got -1"):
        measure(f, w, -1)
    with pytest.raises(ValueError, match=r"eta must be .* got -0.1"):
        measure(f, w, 1, eta=-0.1)
    with pytest.raises(ValueError, match=r"value_fn must be a function .* got Array"):
        measure(w, f, 1)
    with pytest.raises(ValueError, match=r"value_fn must return a scalar"):
        measure(lambda w: w, w, 1)
    with pytest.raises(ValueError, match=r"mask must not be a bare bool"):
        measure(f, w, 1, mask=True)


def test_bad_numbers():
    f, w = (lambda w: jnp.sum(w**2)), jnp.ones(2)
    for number in (0, 2.5, True):
        for name in ("num_steps", "num_starts"):
            with pytest.raises(ValueError, match=f"{name} must be .* got {number}"):
                diagnostics.worst_case_sharpness(f, w, 1, **{name: number})
    for number in (0, 1, 2.5):
        with pytest.raises(ValueError, match=f"num_samples must be .* got {number}"):
            diagnostics.average_sharpness(f, w, 1, num_samples=number)
