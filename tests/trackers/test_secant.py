import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eigensam_jax import perturbation, trackers, tree_math

PARAMS = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2, jnp.bfloat16)}
SPECTRUM = {"w": jnp.arange(6.0).reshape(3, 2), "b": jnp.array([7.0, 10.0])}


def matvec(vector):
    return jax.tree.map(jnp.multiply, SPECTRUM, vector)


def observed(tracker, state, epsilon, d):
    """What `tracker` makes of d = Hε: it sees of ε ⟨ε, v⟩ and ‖ε‖ alone."""
    projection = tree_math.vdot(epsilon, state.eigenvector)
    return tracker.observe(state, d, projection, tree_math.norm(epsilon))


def observations(
    seed, steps, spectrum, alpha=1.0, sign_of=lambda v, epsilon, d: epsilon
):
    """A naive secant tracker in float64 on a quadratic, and what it observed.

    Yields ε, d and v after each step; gradients are random. `sign_of` is the vector
    whose product with v gives the sign.
    """
    rng, v = np.random.default_rng(seed), np.zeros(len(spectrum))
    for _ in range(steps):
        g = rng.normal(size=len(spectrum))
        u = g / np.linalg.norm(g)
        epsilon = 0.1 * (u + alpha * np.sign(g @ v) * (v - (u @ v) * u))
        d = spectrum * epsilon
        sign = -1 if v @ sign_of(v, epsilon, d) < 0 else 1
        v = 0.95 * v + 0.05 * sign * d / np.linalg.norm(d)
        v /= np.linalg.norm(v)
        yield epsilon, d, v


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_secant_is_the_average_of_signed_unit_differences(alpha, seed):
    spectrum = np.array([-1.0, 0.5, 2.0, 4.0])
    with jax.enable_x64(True):
        tracker = trackers.secant(decay=0.95)
        state = tracker.init({"w": jnp.zeros((2, 2))})
        to_tree = lambda x: {"w": jnp.asarray(x).reshape(2, 2)}
        step = jax.jit(tracker.observe)
        old, history = np.zeros(4), []
        for epsilon, d, v in observations(seed, 100, spectrum, alpha):
            radius = np.linalg.norm(epsilon)
            state = step(state, to_tree(d), epsilon @ old, radius)
            np.testing.assert_allclose(state.eigenvector["w"].ravel(), v, atol=1e-12)
            history.append((old @ epsilon / radius, old @ d, np.linalg.norm(d), radius))
            old = v
        del history[0]  # there was no v yet
        weights = 0.95 ** np.arange(98, -1, -1)
        along, product, length, radius = np.array(history).T
        slope = (weights * along * product / radius).sum() / (weights * along**2).sum()
        np.testing.assert_allclose(state.eigenvalue, slope, rtol=1e-10)
        size = (weights * abs(along) * length / radius).sum()
        size /= (weights * along**2).sum()
        residual = np.sqrt(size**2 - slope**2)
        np.testing.assert_allclose(state.residual, residual, rtol=1e-8)
        agreement = (weights * along * product / length).sum() * 0.05
        np.testing.assert_allclose(state.moments[3], agreement, rtol=1e-10)
        assert state.usable == (agreement >= 0)


def test_secant_finds_the_algebraically_largest_eigenvalue_by_the_sign_of_epsilon():
    spectrum = np.array([-5.0, 1.0, 2.0])

    def mean_quotient(sign_of):
        quotients = []
        for seed in range(20):
            *_, (_, _, v) = observations(seed, 600, spectrum, sign_of=sign_of)
            quotients.append(v @ (spectrum * v))
        return np.mean(quotients)

    assert mean_quotient(lambda v, epsilon, d: epsilon) > 1.9
    assert mean_quotient(lambda v, epsilon, d: d) < 0  # the other rule does not

    tracker = trackers.secant()

    def step(state, key):
        g = jax.random.normal(key, (3,))
        step = perturbation.eigen_sam(g, state.eigenvector, 0.1, 1.0)
        d = spectrum * step.epsilon
        return tracker.observe(state, d, step.projection, step.norm), None

    @jax.jit
    @jax.vmap
    def run(key):
        state, _ = jax.lax.scan(
            step, tracker.init(jnp.zeros(3)), jax.random.split(key, 600)
        )
        return jnp.sum(spectrum * state.eigenvector**2), state.eigenvalue

    quotients, eigenvalues = run(jax.random.split(jax.random.key(0), 20))
    assert quotients.mean() > 1.9
    np.testing.assert_allclose(eigenvalues.mean(), 2, rtol=0.1)


def test_secant_along_an_eigenvector_is_exact():
    tracker = trackers.secant(decay=0.9)
    state = tracker.init(jnp.zeros(3))
    epsilon = jnp.array([0.0, 0.6, 0.0])
    for _ in range(3):
        state = observed(tracker, state, epsilon, -2.0 * epsilon)
        np.testing.assert_allclose(jnp.abs(state.eigenvector), [0, 1, 0], rtol=1e-6)
    np.testing.assert_allclose(state.eigenvalue, -2, rtol=1e-6)
    np.testing.assert_allclose(state.residual, 0, atol=1e-3)
    assert not state.usable


def test_secant_starts_at_zero_and_keeps_dtypes():
    tracker = trackers.secant()
    state = tracker.init(PARAMS)
    assert tree_math.norm(state.eigenvector) == 0
    assert state.usable
    assert tracker.refresh_interval is None
    assert tracker.refresh(state, None) is state
    epsilon = jax.tree.map(lambda x: 0.1 * jnp.ones(x.shape), PARAMS)
    after = observed(tracker, state, epsilon, matvec(epsilon))
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    chex.assert_trees_all_equal_shapes(after.eigenvector, PARAMS)
    np.testing.assert_allclose(tree_math.norm(after.eigenvector), 1, rtol=1e-6)


@pytest.mark.parametrize("bad", [0.0, jnp.nan, jnp.inf, 1e38])
@pytest.mark.parametrize("leaf", ["w", "b"])
def test_secant_keeps_nothing_of_a_bad_difference(leaf, bad):
    tracker = trackers.secant()
    ones = jax.tree.map(lambda x: jnp.ones(x.shape), PARAMS)
    for state in (
        tracker.init(PARAMS),
        observed(tracker, tracker.init(PARAMS), ones, matvec(ones)),
    ):
        change = tree_math.scale(0.0, ones) if bad == 0 else matvec(ones)
        change = change | {leaf: change[leaf] * bad}
        for perturbed in (ones, ones | {leaf: ones[leaf] * bad}):
            after = observed(tracker, state, perturbed, change)
            chex.assert_trees_all_equal(after, state)
        again = observed(tracker, after, ones, matvec(ones))
        np.testing.assert_allclose(tree_math.norm(again.eigenvector), 1, rtol=1e-6)


@pytest.mark.parametrize("decay", [-0.1, 1, 1.5, "0.9", None, float("nan"), True])
def test_a_bad_decay_is_refused_with_name_and_value(decay):
    with pytest.raises(ValueError, match=f"decay must be .* got {decay!r}"):
        trackers.secant(decay=decay)
    with pytest.raises(ValueError, match=r"update_interval must be .* got 0"):
        trackers.secant(update_interval=0)
