import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import symmetric

from eigensam_jax import perturbation, trackers, tree_math


class NaiveRitz:
    """`ritz` in float64, with an orthonormal basis of rows and a dense Hessian."""

    def __init__(self, size, decay, gain):
        self.basis = np.zeros((2, size))
        self.scatter, self.curvature = np.zeros((2, 2)), np.zeros((2, 2))
        self.decay, self.gain, self.num_products = decay, gain, 0
        self.residual = 0.0

    def turn(self, x):
        x = x / np.linalg.norm(x)
        rest = x - self.basis.T @ (self.basis @ x)
        frame = np.vstack([self.basis, rest / np.linalg.norm(rest)])
        scatter, curvature = np.zeros((3, 3)), np.zeros((3, 3))
        scatter[:2, :2], curvature[:2, :2] = self.scatter, self.curvature
        scatter *= self.decay
        scatter += (1 - self.decay) * np.outer(frame @ x, frame @ x)
        plane = np.linalg.eigh(scatter)[1][:, :0:-1]
        ranked = curvature if self.num_products else scatter
        axes = plane @ np.linalg.eigh(plane.T @ ranked @ plane)[1][:, ::-1]
        self.basis = axes.T @ frame
        self.scatter = axes.T @ scatter @ axes
        left, _, right = np.linalg.svd(axes[:2])
        rotation = left @ right
        self.curvature = rotation.T @ self.curvature @ rotation

    def refresh(self, matrix):
        turn = self.num_products % 2
        product = matrix @ self.basis[turn]
        if turn == 0:
            along = self.basis[0] @ product
            self.residual = np.linalg.norm(product - along * self.basis[0])
        rate = max(self.gain, 1 / (1 + self.num_products // 2))
        new = self.curvature.copy()
        new[turn] = new[:, turn] = self.basis @ product
        self.curvature += rate * (new - self.curvature)
        self.num_products += 1


@pytest.mark.parametrize("seed", range(3))
def test_against_a_naive_rewrite_with_a_dense_hessian(seed):
    interval, decay, gain = 5, 0.9, 0.3
    matrices = [symmetric([-2.0, 0.1, 1.0, 2.0, 3.0, 4.0], seed + i)[0] for i in (0, 1)]
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        tracker = trackers.ritz(interval, decay, gain)

        @jax.jit
        def step(state, matrix, epsilon, count):
            refresh = lambda s: tracker.refresh(s, lambda v: matrix @ v)
            is_due = count % tracker.refresh_interval == 0
            state = jax.lax.cond(is_due, refresh, lambda s: s, state)
            return tracker.observe(state, matrix @ epsilon, None, None)

        naive, state = NaiveRitz(6, decay, gain), tracker.init(jnp.zeros(6))
        for count in range(60):
            matrix = matrices[count % 2]
            if count % interval == 0 and count > 0:  # at first there is nothing yet
                naive.refresh(matrix)
            epsilon = rng.normal(size=6)
            naive.turn(matrix @ epsilon)
            state = step(state, jnp.asarray(matrix), epsilon, jnp.int32(count))
            v, p = state.eigenvector, state.companion
            np.testing.assert_allclose(abs(v @ naive.basis[0]), 1, rtol=1e-9)
            if count:
                np.testing.assert_allclose(abs(p @ naive.basis[1]), 1, rtol=1e-9)
            np.testing.assert_allclose(
                state.eigenvalue, naive.curvature[0, 0], rtol=1e-9, atol=1e-12
            )
            np.testing.assert_allclose(
                jnp.abs(state.curvature), np.abs(naive.curvature), rtol=1e-8, atol=1e-11
            )
            np.testing.assert_allclose(state.residual, naive.residual, rtol=1e-8)
        assert state.num_products == 11
        np.testing.assert_allclose([v @ v, p @ p, v @ p], [1, 1, 0], atol=1e-12)


def refreshed(tracker, state, spectrum, count):
    """The state after a refresh with a diagonal Hessian, on steps where it is due."""
    due = lambda s: tracker.refresh(s, lambda v: spectrum * v)
    is_due = count % tracker.refresh_interval == 0
    return jax.lax.cond(is_due, due, lambda s: s, state)


def run(tracker, spectrum, steps, keys):
    """Random gradients on a quadratic: the last v, and the tracker's state."""
    spectrum = jnp.asarray(spectrum)

    def step(state, count_and_key):
        count, key = count_and_key
        state = refreshed(tracker, state, spectrum, count)
        g = jax.random.normal(key, spectrum.shape)
        step = perturbation.eigen_sam(g, state.eigenvector, 0.1, 0.2)
        d = spectrum * step.epsilon
        return tracker.observe(state, d, step.projection, step.norm), None

    @jax.jit
    @jax.vmap
    def all_steps(key):
        steps_and_keys = (jnp.arange(steps), jax.random.split(key, steps))
        return jax.lax.scan(step, tracker.init(spectrum), steps_and_keys)[0]

    return all_steps(keys)


def test_finds_the_top_and_tells_it_from_a_stronger_negative_eigenvalue():
    keys = jax.random.split(jax.random.key(0), 20)
    spectrum = np.array([-5.0, 1.0, 2.0])
    state = run(trackers.ritz(), spectrum, 400, keys)
    quotients = (state.eigenvector**2) @ spectrum
    assert quotients.mean() > 1.99
    # A product comes when v is an interval old: its quotient is that of a staler v.
    np.testing.assert_allclose(state.eigenvalue, 2, rtol=0.1)
    np.testing.assert_allclose(state.curvature[:, 1, 1], -5, rtol=0.1)
    assert state.residual.max() < 0.2


def test_the_plane_stays_orthonormal_in_float32():
    spectrum = np.linspace(0, 3, 40)
    state = run(trackers.ritz(), spectrum, 3000, jax.random.key(0)[None])
    v, p = state.eigenvector[0], state.companion[0]
    np.testing.assert_allclose([v @ v, p @ p, v @ p], [1, 1, 0], atol=3e-6)


def test_orders_by_the_hessian_where_the_differences_scatter_the_other_way():
    """Gradients along the second eigenvector are ten times those along the first."""
    spectrum, scale = jnp.array([1.0, 2.0, 0.1]), jnp.array([10.0, 1.0, 1.0])
    secant, ritz = trackers.secant(), trackers.ritz()

    def step(states, count_and_key):
        count, key = count_and_key
        u = scale * jax.random.normal(key, (3,))
        a, b = states
        b = refreshed(ritz, b, spectrum, count)
        radius = jnp.linalg.norm(u)
        a = secant.observe(a, spectrum * u, u @ a.eigenvector, radius)
        return (a, ritz.observe(b, spectrum * u, u @ b.eigenvector, radius)), None

    keys = jax.random.split(jax.random.key(0), 200)
    states = secant.init(spectrum), ritz.init(spectrum)
    (a, b), _ = jax.lax.scan(step, states, (jnp.arange(200), keys))
    assert jnp.abs(a.eigenvector[0]) > 0.9  # what scatters most
    assert jnp.abs(b.eigenvector[1]) > 0.99  # what curves most


PARAMS = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2, jnp.bfloat16)}
SPECTRUM = {"w": jnp.arange(6.0).reshape(3, 2), "b": jnp.array([7.0, 10.0])}


def matvec(vector):
    return jax.tree.map(jnp.multiply, SPECTRUM, vector)


def started(tracker, observations):
    state = tracker.init(PARAMS)
    for i in range(observations):
        keys = jax.random.split(jax.random.key(i), 2)
        noise = {
            name: jax.random.normal(key, x.shape)
            for key, (name, x) in zip(keys, PARAMS.items(), strict=True)
        }
        state = tracker.observe(state, matvec(noise), None, None)
    return state


def test_one_direction_alone_is_followed_without_a_companion():
    tracker = trackers.ritz(update_interval=1)
    state, step = tracker.init(jnp.zeros(1)), jax.jit(tracker.observe)
    for factor in (20.0, 40.0, 40.0, 40.0):
        state = step(state, factor * jnp.ones(1), None, None)
        state = tracker.refresh(state, lambda v, a=factor: a * v)
    assert state.num_products == 4
    np.testing.assert_allclose(state.eigenvalue, 40, rtol=1e-5)


def test_shapes_and_dtypes_are_kept():
    tracker = trackers.ritz()
    state = tracker.init(PARAMS)
    after = tracker.refresh(started(tracker, 3), matvec)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    chex.assert_trees_all_equal_shapes(after.eigenvector, PARAMS)
    assert after.num_products == 1


@jax.jit
def observed(state, change):
    return trackers.ritz(update_interval=1).observe(state, change, None, None)


@jax.jit
def refreshed_by(state, factor):
    """By products that are times `factor`."""
    spoilt = lambda v: jax.tree.map(lambda x: x * factor, matvec(v))
    return trackers.ritz(update_interval=1).refresh(state, spoilt)


@pytest.mark.parametrize("bad", [0.0, jnp.nan, jnp.inf, 1e38])
@pytest.mark.parametrize("observations", [0, 1, 3])
def test_nothing_of_a_bad_batch_is_kept(observations, bad):
    state = started(trackers.ritz(update_interval=1), observations)
    ones = jax.tree.map(lambda x: jnp.ones(x.shape), PARAMS)
    bad_ones = jax.tree.map(lambda x: x * bad, ones)
    chex.assert_trees_all_equal(observed(state, bad_ones), state)
    chex.assert_trees_all_equal(refreshed_by(state, bad), state)
    again = refreshed_by(observed(state, matvec(ones)), 1.0)
    chex.assert_tree_all_finite(again)
    np.testing.assert_allclose(tree_math.norm(again.eigenvector), 1, rtol=1e-5)


@pytest.mark.parametrize("strength", [10.0, 1e3, 1e30])
@pytest.mark.parametrize("at", [400, 420])
def test_one_strong_batch_is_soon_forgotten(at, strength):
    """It comes when it is the turn of v, and of the companion."""
    tracker, spectrum = trackers.ritz(), jnp.array([3.0, 2.0] + 20 * [0.1])

    def step(state, inputs):
        i, key = inputs
        hessian = jnp.where(i == at, strength, 1.0) * spectrum
        state = jax.lax.cond(
            i % 20 == 0,
            lambda s: tracker.refresh(s, lambda v: hessian * v),
            lambda s: s,
            state,
        )
        noise = jax.random.normal(key, spectrum.shape) / 5
        state = tracker.observe(
            state, hessian * (noise + state.eigenvector), None, None
        )
        cosine = jnp.abs(state.eigenvector[0])
        return state, (state.eigenvalue, state.residual, cosine)

    steps = jnp.arange(700), jax.random.split(jax.random.key(0), 700)
    values, residuals, cosines = jax.lax.scan(step, tracker.init(spectrum), steps)[1]
    assert values[at:].max() < 2.5 * 3
    assert residuals[at:].max() < 3 * 3
    assert np.sum(cosines[at:] < 0.9) < 100
    assert cosines[-1] > 0.99


def test_a_rise_that_lasts_is_followed_by_the_same_axes():
    """A thousandfold, after products of almost no curvature."""
    tracker, spectrum = trackers.ritz(update_interval=1), jnp.array([1.0, 3.0, 0.1])

    def step(state, inputs):
        i, key = inputs
        hessian = jnp.where(i < 6, 1e-3, 1.0) * spectrum
        state = tracker.refresh(state, lambda v: hessian * v)
        change = hessian * jax.random.normal(key, (3,))
        state = tracker.observe(state, change, None, None)
        return state, (state.eigenvalue, jnp.abs(state.eigenvector[1]))

    steps = jnp.arange(80), jax.random.split(jax.random.key(1), 80)
    values, cosines = jax.lax.scan(step, tracker.init(spectrum), steps)[1]
    assert np.all(np.diff(values[8:40:2]) > 0)
    np.testing.assert_allclose(values[-1], 3, rtol=0.1)
    assert cosines[10:].min() > 0.7
    assert cosines[-1] > 0.95


def test_bad_numbers_are_refused_with_name_and_value():
    for name in ("decay", "gain"):
        with pytest.raises(ValueError, match=rf"{name} must be .* got 1\.5"):
            trackers.ritz(**{name: 1.5})
    with pytest.raises(ValueError, match=r"update_interval must be .* got 0"):
        trackers.ritz(update_interval=0)


def test_negative_curvature_along_v_makes_it_unusable():
    tracker, spectrum = trackers.ritz(1), jnp.array([-5.0, -4.0, 1.0, 0.5])

    def step(state, key):
        state = tracker.refresh(state, lambda v: spectrum * v)
        difference = spectrum * jax.random.normal(key, (4,))
        return tracker.observe(state, difference, None, None), None

    keys = jax.random.split(jax.random.key(0), 60)
    state, _ = jax.lax.scan(step, tracker.init(spectrum), keys)
    assert state.eigenvalue < 0
    assert not state.usable
