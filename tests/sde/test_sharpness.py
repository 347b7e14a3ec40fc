import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import dense_hessian, flatten, network

from eigensam_jax import perturbation, sde, tree_math
from eigensam_jax.eigen import Eigenpair
from eigensam_jax.sde import _sharpness

BATCHES, RHO = jnp.arange(5), 0.05


def loss(params, index):
    return network(0, jnp.float64)[1](params, index)


@jax.jit
def spectrum(params):
    """Eigenvalues, ascending, and eigenvectors of the mean loss's dense Hessian."""
    losses = lambda p: jax.vmap(lambda i: loss(p, i))(BATCHES)
    return jnp.linalg.eigh(dense_hessian(lambda p: jnp.mean(losses(p)), params))


@jax.jit
def slope_of(params, v):
    return sde.eigenvalue_gradient(loss, params, BATCHES, v)


@jax.jit
def curvature_of(params, direction, v, eigenvalue):
    return sde.eigenvalue_curvature(
        loss, params, BATCHES, direction, v, eigenvalue, tol=1e-10
    )


@jax.jit
def rates_of(params, pair, eta, alpha):
    """The parts of the rate, and the drift of each order."""
    kwargs = {"alpha": alpha, "eigenvector": pair.eigenvector}
    drifts = [
        sde.drift(loss, params, BATCHES, RHO, order, **kwargs) for order in (1, 2, 3)
    ]
    rates = sde.sharpness_rates(
        *(loss, params, BATCHES),
        rho=RHO,
        eta=eta,
        alpha=alpha,
        eigenpair=pair,
        curvature_tol=1e-8,
    )
    return rates, drifts


@jax.jit
def perturbed_gradients(params, v, alpha):
    """∇f_γ(w + ε_γ) of every batch, and ε_γ, with a leading axis."""

    def of(index):
        gradient = jax.grad(lambda p: loss(p, index))
        step = perturbation.eigen_sam(gradient(params), v, RHO, alpha)
        moved = tree_math.add_scaled(params, 1, step.epsilon)
        return gradient(moved), step.epsilon

    return jax.vmap(of)(BATCHES)


def top(params):
    values, vectors = spectrum(params)
    v = ravel_pytree(params)[1](jnp.asarray(vectors[:, -1]))
    return Eigenpair(v, values[-1], jnp.zeros(()))


def along(params, direction):
    """λ_max(w + t·a) as a function of t, by a dense eigendecomposition."""
    moved = lambda t: tree_math.add_scaled(params, t, direction)
    return lambda t: float(spectrum(moved(t))[0][-1])


def first_difference(function, h):
    return (8 * (function(h) - function(-h)) - function(2 * h) + function(-2 * h)) / (
        12 * h
    )


def second_difference(function, h):
    return (function(h) - 2 * function(0.0) + function(-h)) / h**2


@pytest.mark.parametrize("seed", range(3))
def test_derivatives_of_the_eigenvalue_are_those_of_converged_eigenvalues(seed):
    with jax.enable_x64(True):
        params, _ = network(seed, jnp.float64)
        pair = top(params)
        flat, unravel = ravel_pytree(params)
        slope = slope_of(params, pair.eigenvector)
        for a in np.random.default_rng(seed).normal(size=(3, flat.size)):
            a = unravel(jnp.asarray(a / np.linalg.norm(a)))
            value = along(params, a)
            np.testing.assert_allclose(
                tree_math.vdot(slope, a), first_difference(value, 1e-3), rtol=1e-6
            )
            ours = curvature_of(params, a, pair.eigenvector, pair.eigenvalue)
            theirs = second_difference(value, 1e-3)
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
            twice = tree_math.scale(2, a)
            quadratic = curvature_of(params, twice, pair.eigenvector, pair.eigenvalue)
            np.testing.assert_allclose(quadratic, 4 * ours, rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_the_parts_of_the_rate_are_derivatives_of_converged_eigenvalues(alpha, seed):
    eta = 0.01
    with jax.enable_x64(True):
        params, _ = network(seed, jnp.float64)
        pair = top(params)
        rates, drifts = rates_of(params, pair, eta, alpha)
        assert rates.eigenvalue == pair.eigenvalue
        changes = [first_difference(along(params, b), 1e-2) for b in drifts]
        parts = [rates.first, rates.second, rates.third]
        np.testing.assert_allclose(np.cumsum(parts), changes, rtol=1e-6)
        gradients, epsilons = perturbed_gradients(params, pair.eigenvector, alpha)
        mean = jax.tree.map(lambda g: g.mean(0), gradients)
        trace = 0.0
        for i in range(len(BATCHES)):
            one = jax.tree.map(lambda g, i=i: g[i], gradients)
            centred = tree_math.add_scaled(one, -1, mean)
            scaled = tree_math.scale(1 / tree_math.norm(centred), centred)
            trace += second_difference(along(params, scaled), 1e-3) * float(
                tree_math.vdot(centred, centred)
            )
        np.testing.assert_allclose(rates.ito, eta / 2 * trace / 5, rtol=1e-3)
        slope = slope_of(params, pair.eigenvector)
        np.testing.assert_allclose(rates.gradient_norm, tree_math.norm(slope))
        squares = jax.vmap(lambda e: tree_math.vdot(e, e))(epsilons)
        np.testing.assert_allclose(
            rates.aligned, -squares.mean() * rates.gradient_norm**2 / 2, rtol=1e-9
        )
        v = flatten(pair.eigenvector)
        rows = np.asarray(jax.vmap(lambda e: ravel_pytree(e)[0])(epsilons))
        cosines = abs(rows @ v) / np.linalg.norm(rows, axis=1)
        np.testing.assert_allclose(rates.perturbation_alignment, cosines.mean())
        if alpha > 0:
            assert rates.perturbation_alignment > rates.alignment
        else:
            np.testing.assert_allclose(rates.perturbation_alignment, rates.alignment)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_parts_add_up_to_what_a_step_does(alpha):
    """The mean change of λ_max by a step on a random batch, exact over all batches.

    Beside the equation's parts, a step of η has (η/2)·∇²λ[b, b]; what is left is of the
    order η² and, in the drift, ρ³.
    """
    with jax.enable_x64(True):
        for seed in range(3):
            params, _ = network(seed, jnp.float64)
            pair = top(params)
            gradients, _ = perturbed_gradients(params, pair.eigenvector, alpha)
            mean = jax.tree.map(lambda g: g.mean(0), gradients)
            of_mean = curvature_of(params, mean, pair.eigenvector, pair.eigenvalue)
            rests = []
            for eta in (0.1, 0.05):
                rates, _ = rates_of(params, pair, eta, alpha)
                change = 0.0
                for i in range(len(BATCHES)):
                    one = jax.tree.map(lambda g, i=i: g[i], gradients)
                    change += along(params, one)(-eta) - float(pair.eigenvalue)
                drift = rates.first + rates.second + rates.third
                expected = drift + rates.ito + eta / 2 * of_mean
                rests.append(change / 5 / eta - expected)
                assert abs(rests[-1]) < 0.05 * abs(rates.ito) + 1e-3
            assert abs(rests[1]) < 0.02 * abs(change / 5 / eta)


def test_where_the_gradient_is_along_v_the_third_derivatives_pull_in_full():
    quartic = lambda w, x: x * jnp.sum(w**4)
    w, x = jnp.array([1.0, 0.0]), jnp.ones(1)
    rates = jax.jit(
        lambda w: sde.sharpness_rates(quartic, w, x, rho=0.1, eta=0.01, alpha=0.2)
    )(w)
    np.testing.assert_allclose(rates.alignment, 1, rtol=1e-6)
    np.testing.assert_allclose(rates.third, rates.aligned, rtol=1e-5)
    np.testing.assert_allclose(rates.third, -(0.1**2) / 2 * 24**2, rtol=1e-5)
    np.testing.assert_allclose(rates.ito, 0, atol=1e-6)  # one batch, no noise


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rho": -1.0}, "rho must be a finite number"),
        ({"eta": float("inf")}, "eta must be a finite number"),
        ({"alpha": -0.5}, "alpha must be a finite number"),
    ],
)
def test_numbers_that_can_not_be_meant_are_refused(change, message):
    quadratic, w, x = (lambda w, x: x * jnp.sum(w**2)), jnp.ones(2), jnp.ones(2)
    with pytest.raises(ValueError, match=message):
        sde.sharpness_rates(quadratic, w, x, **{"rho": 0.1, "eta": 0.1, **change})


def test_a_system_that_is_not_solved_is_no_number(monkeypatch):
    params, batches = jnp.array([1.0, 0.9, 0.3, 0.2]), jnp.ones(1)
    f = lambda w, x: x * (jnp.sum(w**4) + jnp.prod(jnp.sin(w)))
    values, vectors = jnp.linalg.eigh(jax.hessian(f)(params, 1.0))
    top = {"eigenvector": vectors[:, -1], "eigenvalue": values[-1]}
    given = f, params, batches, jnp.arange(1.0, 5)
    assert np.isfinite(sde.eigenvalue_curvature(*given, **top))
    monkeypatch.setattr(_sharpness, "_MAX_ITERATIONS", 1)
    assert np.isnan(sde.eigenvalue_curvature(*given, **top, tol=1e-5))


def test_several_eigenpairs_are_refused_for_one():
    quadratic, w, x = (lambda w, x: x * jnp.sum(w**2)), jnp.ones(2), jnp.ones(2)
    pairs = Eigenpair(jnp.ones(1), jnp.ones((1, 2)), jnp.zeros(1))
    with pytest.raises(ValueError, match=r"eigenpair\.eigenvector must be .*the first"):
        sde.sharpness_rates(quadratic, w, x, rho=0.1, eta=0.1, eigenpair=pairs)
