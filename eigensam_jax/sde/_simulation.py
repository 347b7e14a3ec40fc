"""Paths of the equation on trees, by Euler and Maruyama's method.

The noise is not commutative, so without its iterated integrals no method converges
faster along a path. In law, a step of η has the error of the equation itself.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from eigensam_jax import hessian, tree_math
from eigensam_jax._update import arguments
from eigensam_jax.sde import _equation
from eigensam_jax.sde._expansion import BatchValueFn, Order
from eigensam_jax.tree_math import PyTree


class State(NamedTuple):
    """The state of a path.

    Attributes:
      params: X, a tree of real arrays.
      time: t, a scalar; a step of SAM lasts a time of η.
    """

    params: PyTree
    time: jax.Array


class Info(NamedTuple):
    """Scalars at the start of a step.

    Attributes:
      value: E[f_γ], the mean loss.
      drift_norm: ‖b‖.
      noise_norm: ‖Bξ‖ of the noise drawn; the mean of its square is tr Σ.
      eigenvalue: λ₁ of the Hessian of the mean loss; None for SAM.
      residual: ‖Hv − λ₁v‖ of the v that was used; None for SAM.
    """

    value: jax.Array
    drift_norm: jax.Array
    noise_norm: jax.Array
    eigenvalue: jax.Array | None
    residual: jax.Array | None


Step = Callable[[jax.Array, State, ArrayLike], tuple[State, Info]]


def start(params: PyTree) -> State:
    """The state at t = 0.

    Args:
      params: X at t = 0, a tree of real floating-point arrays.

    Example:
      >>> import eigensam_jax, jax.numpy as jnp
      >>> eigensam_jax.sde.start(jnp.ones(2)).time
      Array(0., dtype=float32)
    """
    arguments.check_params(params)
    return State(params, jnp.zeros((), tree_math.accumulation_dtype(params)))


def make_step(
    value_fn: BatchValueFn,
    batches: PyTree,
    *,
    rho: ArrayLike,
    eta: ArrayLike,
    order: Order = 3,
    alpha: ArrayLike = 0.0,
    tol: ArrayLike = _equation.TOLERANCE,
) -> Step:
    """Builds one_step(key, state, dt) -> (state, info), by Euler and Maruyama's method:

        X ← X + b(X)·dt + √(η·dt)·Bξ,    ξ ~ N(0, 1)^N,  BBᵀ = Σ(X).

    With dt = η it is a step of SAM with the drift expanded and the noise Gaussian;
    smaller dt approach the equation. It costs a `drift` and a gradient per batch for
    the noise. `one_step` is not jitted. It takes a typed key, a `State` of `start`, and
    a number dt.

    Args:
      value_fn, batches, rho: as in `drift`.
      eta: η, the step size of the discrete method, which scales the noise.
      order, alpha, tol: as in `drift`. Unless `alpha` is 0, each step searches for v.

    Example:
      >>> import eigensam_jax, jax, jax.numpy as jnp
      >>> square, x = (lambda w, x: x * w**2), jnp.ones(2)  # two equal batches: Σ = 0
      >>> one_step = eigensam_jax.sde.make_step(square, x, rho=0.5, eta=0.1)
      >>> state = eigensam_jax.sde.start(jnp.array(1.0))
      >>> print(f"{one_step(jax.random.key(0), state, 0.1)[0].params:.3f}")
      0.700
    """
    count = hessian.num_batches(batches)
    arguments.check_scalar("eta", eta, schedule=False)
    _equation.check_method(rho, order, alpha)

    def one_step(key: jax.Array, state: State, dt: ArrayLike) -> tuple[State, Info]:
        params = state.params
        arguments.check_params(params)
        eigenvector = eigenvalue = residual = None
        if not _equation.is_sam(alpha):
            eigenvector, eigenvalue, residual = _equation.top_eigenpair(
                value_fn, params, batches, tol
            )
        dtype = tree_math.accumulation_dtype(params)
        increments = jax.random.normal(key, (count,), dtype)
        value, drift, noise = _equation.coefficients(
            value_fn, params, batches, rho, increments, order, alpha, eigenvector
        )
        dt = jnp.asarray(dt, dtype)
        moved = tree_math.add_scaled(params, dt, drift)
        scale = jnp.sqrt(jnp.asarray(eta, dtype) * dt)
        moved = tree_math.add_scaled(moved, scale, noise)
        norms = tree_math.norm(drift), tree_math.norm(noise)
        after = State(tree_math.cast_like(moved, params), state.time + dt)
        return after, Info(value, *norms, eigenvalue, residual)

    return one_step


def simulate(
    key: jax.Array,
    value_fn: BatchValueFn,
    state: State,
    batches: PyTree,
    *,
    rho: ArrayLike,
    eta: ArrayLike,
    num_steps: int,
    order: Order = 3,
    alpha: ArrayLike = 0.0,
    substeps: int = 1,
    tol: ArrayLike = _equation.TOLERANCE,
    observe: Callable[[State, Info], Any] = lambda _, info: info,
) -> tuple[State, Any]:
    """A path over the time of `num_steps` steps of SAM, under `jax.lax.scan`.

    Continue with the returned state and a new key. `jax.vmap` over keys for several.

    Args:
      key: a typed key, which determines the path.
      value_fn: as in `drift`.
      state: where to start, `start(params)`.
      batches, rho: as in `drift`.
      eta: η, the duration of each of the `num_steps`.
      num_steps: the number of steps, at least 1.
      order, alpha: as in `make_step`.
      substeps: Euler and Maruyama's steps, of η/`substeps`, per step.
      tol: as in `make_step`.
      observe: (state, info) -> what to keep of each of the `num_steps`, by default
        `info`, which is that of its last substep.

    Returns:
      The last state, and the results of `observe` with a leading axis of length
      `num_steps`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from eigensam_jax import sde
      >>> loss, x = (lambda w, x: 0.5 * jnp.sum((w - x) ** 2)), jnp.array([-1.0, 1.0])
      >>> path = lambda key: sde.simulate(
      ...     key, loss, sde.start(jnp.ones(1)), x, rho=0.0, eta=0.1, num_steps=100
      ... )[0].params
      >>> ends = jax.vmap(path)(jax.random.split(jax.random.key(0), 1000))
      >>> print(f"{ends.mean():.1f} {ends.var():.2f}")  # of Euler's steps 0, η/(2 − η)
      0.0 0.05

    References:
      Kloeden and Platen, "Numerical Solution of Stochastic Differential Equations",
      1992.
    """
    arguments.check_positive_int("num_steps", num_steps, "steps of SAM")
    arguments.check_positive_int("substeps", substeps, "Euler steps per step of SAM")
    one_step = make_step(
        value_fn, batches, rho=rho, eta=eta, order=order, alpha=alpha, tol=tol
    )
    dtype = tree_math.accumulation_dtype(state.params)
    dt = jnp.asarray(eta, dtype) / substeps
    keys = jax.random.split(key, (num_steps, substeps))

    def advance(state: State, keys: jax.Array) -> tuple[State, Any]:
        state, infos = jax.lax.scan(lambda s, k: one_step(k, s, dt), state, keys)
        return state, observe(state, jax.tree.map(lambda x: x[-1], infos))

    return jax.lax.scan(advance, state, keys)
