"""Paths of the equation, by Euler and Maruyama's method on trees.

The noise is not commutative: without its iterated integrals no method converges faster
along a path. In law, the error of a step of η is that of the equation itself.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from eigensam_jax import hessian, tree_math
from eigensam_jax._update import arguments
from eigensam_jax.sde import equation
from eigensam_jax.sde.expansion import BatchValueFn, Order
from eigensam_jax.tree_math import PyTree


class State(NamedTuple):
    """The state of a path.

    Attributes:
      params: X, a tree of real arrays.
      time: t, a scalar; a step of SAM lasts a time of η.
      eigenvector: for Eigen-SAM, v of the last step, from which the search for the next
        one starts; None for SAM.
    """

    params: PyTree
    time: jax.Array
    eigenvector: PyTree | None


class Info(NamedTuple):
    """Scalars at the start of a step.

    Attributes:
      value: E[f_γ], the mean loss.
      drift_norm: ‖b‖.
      noise_norm: ‖Bξ‖ of the noise drawn, whose square is tr Σ in the mean.
      eigenvalue: λ₁ of the Hessian of the mean loss; None for SAM.
      residual: ‖Hv − λ₁v‖ of the v that was used; None for SAM.
    """

    value: jax.Array
    drift_norm: jax.Array
    noise_norm: jax.Array
    eigenvalue: jax.Array | None
    residual: jax.Array | None


Step = Callable[[jax.Array, State, ArrayLike], tuple[State, Info]]


def start(params: PyTree, alpha: ArrayLike = 0.0) -> State:
    """The state at t = 0.

    Args:
      params: X at t = 0, a tree of real floating-point arrays.
      alpha: α of the steps to come. Unless it is the number 0, the state carries v,
        which is zero before the first of them.

    Returns:
      A `State`.

    Raises:
      ValueError: if `params` are not such a tree.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import sde
      >>> sde.start(jnp.ones(2)).time
      Array(0., dtype=float32)
    """
    arguments.check_params(params)
    eigenvector = None if equation.is_sam(alpha) else tree_math.zeros_like(params)
    time = jnp.zeros((), tree_math.accumulation_dtype(params))
    return State(params, time, eigenvector)


def make_step(
    value_fn: BatchValueFn,
    batches: PyTree,
    *,
    rho: ArrayLike,
    eta: ArrayLike,
    order: Order = 3,
    alpha: ArrayLike = 0.0,
    tol: ArrayLike = equation.TOLERANCE,
) -> Step:
    """Builds one_step(key, state, dt) -> (state, info), Euler and Maruyama's:

        X ← X + b(X)·dt + √(η·dt)·Bξ,    ξ ~ N(0, 1)^N,  BBᵀ = Σ(X).

    With dt = η it is a step of SAM with the drift expanded and the noise Gaussian;
    smaller dt come nearer to the equation. It costs the operations of `drift` and a
    gradient a batch for the noise. Pure, and not jitted here.

    Args:
      value_fn, batches, rho: as in `drift`.
      eta: η, the step size of the discrete method, which scales the noise.
      order, alpha, tol: as in `drift`. Unless `alpha` is 0, each step searches for v.

    Returns:
      The function `one_step`, from a typed key, a `State` of `start` and a number dt to
      the next `State` and an `Info`.

    Raises:
      ValueError: for invalid arguments; `one_step`, for a state started for another α.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from eigensam_jax import sde
      >>> square, x = (lambda w, x: x * w**2), jnp.ones(2)  # two equal batches: Σ = 0
      >>> one_step = sde.make_step(square, x, rho=0.5, eta=0.1)
      >>> state, info = one_step(jax.random.key(0), sde.start(jnp.array(1.0)), 0.1)
      >>> f"{state.params:.3f}", float(info.drift_norm)
      ('0.700', 3.0)
    """
    count = hessian.num_batches(batches)
    arguments.check_scalar("eta", eta, schedule=False)
    equation.check_method(rho, order, alpha)

    def one_step(key: jax.Array, state: State, dt: ArrayLike) -> tuple[State, Info]:
        params = state.params
        arguments.check_params(params)
        if (state.eigenvector is None) != equation.is_sam(alpha):
            raise ValueError(
                f"state was started for another method than alpha={alpha!r}: make it "
                "by sde.start(params, alpha)."
            )
        eigenvector = eigenvalue = residual = None
        if state.eigenvector is not None:
            eigenvector, eigenvalue, residual = equation.top_eigenpair(
                value_fn, params, batches, tol, state.eigenvector
            )
        dtype = tree_math.accumulation_dtype(params)
        increments = jax.random.normal(key, (count,), dtype)
        value, drift, noise = equation.coefficients(
            value_fn, params, batches, rho, increments, order, alpha, eigenvector
        )
        dt = jnp.asarray(dt, dtype)
        moved = tree_math.add_scaled(params, dt, drift)
        scale = jnp.sqrt(jnp.asarray(eta, dtype) * dt)
        moved = tree_math.add_scaled(moved, scale, noise)
        norms = tree_math.norm(drift), tree_math.norm(noise)
        after = State(tree_math.cast_like(moved, params), state.time + dt, eigenvector)
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
    tol: ArrayLike = equation.TOLERANCE,
    observe: Callable[[State, Info], Any] = lambda _, info: info,
) -> tuple[State, Any]:
    """A path over the time of `num_steps` steps of SAM, under `jax.lax.scan`.

    Continue with the state that it returns and another key. Several paths are a
    `jax.vmap` over keys.

    Args:
      key: a typed key; the path is a function of it.
      value_fn: as in `drift`.
      state: where to start, `start(params, alpha)`.
      batches, rho: as in `drift`.
      eta: η; each of the `num_steps` lasts as long.
      num_steps: how many, at least 1.
      order, alpha: as in `make_step`.
      substeps: how many of Euler and Maruyama's steps, of η/`substeps`, to each.
      tol: as in `make_step`.
      observe: (state, info) -> what to keep of each of the `num_steps`; the `Info` is
        that of its last substep, which is kept by default.

    Returns:
      The state at the end, and what `observe` returned, with a leading axis of length
      `num_steps`.

    Raises:
      ValueError: for invalid arguments.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from eigensam_jax import sde
      >>> loss = lambda w, x: 0.5 * jnp.sum((w - x) ** 2)
      >>> batches, w = jnp.array([[-1.0], [1.0]]), jnp.ones(1)
      >>> path = lambda key: sde.simulate(
      ...     key, loss, sde.start(w), batches, rho=0.0, eta=0.1, num_steps=100
      ... )[0].params
      >>> ends = jax.vmap(path)(jax.random.split(jax.random.key(0), 1000))
      >>> f"{ends.mean():.1f}, {ends.var():.2f}"  # of Euler's steps 0, η/(2 − η)
      '0.0, 0.05'

    References:
      Kloeden and Platen, "Numerical Solution of Stochastic Differential Equations",
      1992.
    """
    arguments.check_positive_int("num_steps", num_steps, "steps of SAM")
    arguments.check_positive_int("substeps", substeps, "steps of Euler's to each")
    one_step = make_step(
        value_fn, batches, rho=rho, eta=eta, order=order, alpha=alpha, tol=tol
    )
    dtype = tree_math.accumulation_dtype(state.params)
    dt = jnp.asarray(eta, dtype) / substeps
    keys = jax.random.split(key, (num_steps, substeps))

    def advance(state: State, keys: jax.Array) -> tuple[State, Any]:
        state, info = one_step(keys[0], state, dt)
        if substeps > 1:
            state, infos = jax.lax.scan(
                lambda s, k: one_step(k, s, dt), state, keys[1:]
            )
            info = jax.tree.map(lambda x: x[-1], infos)
        return state, observe(state, info)

    return jax.lax.scan(advance, state, keys)
