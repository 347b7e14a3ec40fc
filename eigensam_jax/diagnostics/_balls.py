"""How much the loss rises in a ball around the weights: three senses of sharpness.

In each, F(x) = f(w + T x) − f(w) on the ball ‖x‖ ≤ ρ. T is 1; with `eta`, as in ASAM,
it is |w| + η, element-wise, so that rescaling the weights of a layer changes nothing.

m-sharpness is the mean over parts of a batch, each with a perturbation of its own:

    jnp.mean(jax.lax.map(lambda b: sam_sharpness(lambda p: f(p, b), w, rho), parts))
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from eigensam_jax import perturbation, tree_math
from eigensam_jax._update import arguments, functions, masking, programs, rounding
from eigensam_jax._update.masking import Mask
from eigensam_jax.eigen import Estimate, _krylov, _raveled
from eigensam_jax.tree_math import PyTree, ValueFn


class WorstCase(NamedTuple):
    """The largest loss that was found in a ball.

    Attributes:
      value: how much larger it is than that of the weights.
      perturbation: T x, where it is, a tree like the parameters.
    """

    value: jax.Array
    perturbation: PyTree


def sam_sharpness(
    value_fn: ValueFn,
    params: PyTree,
    rho: ArrayLike,
    *,
    eta: ArrayLike | None = None,
    scale_biases: bool = False,
    mask: Mask = None,
) -> jax.Array:
    """SAM's sharpness f(w + ε) − f(w), with the ε of `sam`, or of `asam` with `eta`.

    To first order in ρ it is ρ‖∇f(w)‖. Cost: one gradient and one value.

    Args:
      value_fn: f, a function of the parameters alone that returns a real scalar.
      params: w, a tree of real arrays.
      rho: ρ, the radius.
      eta: η of ASAM; None for SAM.
      scale_biases: as in `asam`; without `eta` of no effect.
      mask: which parameters are perturbed, as in `sam`.

    Returns:
      A scalar.

    Raises:
      ValueError: for a negative `rho` or `eta` and an invalid `mask`.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import diagnostics
      >>> f = lambda w: jnp.sum(w**2)
      >>> print(f"{diagnostics.sam_sharpness(f, jnp.array([3.0, 4.0]), rho=0.1):.2f}")
      1.01

    References:
      Foret et al. and Kwon et al., as in `eigensam_jax.sam` and `eigensam_jax.asam`.
    """
    value_at, zero, _ = _in_ball(value_fn, params, rho, eta, scale_biases, mask)

    def rise(params: PyTree, rho: jax.Array) -> Any:
        value, slope = jax.value_and_grad(value_at, argnums=1)(params, zero)
        return value_at(params, tree_math.scale(rho, tree_math.unit(slope)[0])) - value

    rho = jnp.asarray(rho, tree_math.accumulation_dtype(zero))
    outside = not programs.is_traced((params, rho))
    _, run = programs.host_loop_of(outside, value_fn, rise, params, rho)
    found: jax.Array = run(params, rho)
    return found


def worst_case_sharpness(
    value_fn: ValueFn,
    params: PyTree,
    rho: ArrayLike,
    *,
    eta: ArrayLike | None = None,
    scale_biases: bool = False,
    mask: Mask = None,
    num_steps: int = 20,
    num_starts: int = 1,
    seed: int = 0,
    host_loop: bool | None = None,
) -> WorstCase:
    """Worst-case sharpness max F(x) over the ball ‖x‖ ≤ ρ, by projected ascent.

    Steps of length ρ, falling to 0, along the normalised gradient, each followed by a
    projection onto the ball. The first start is halfway from SAM's ε, which may lie on
    a saddle, to a random direction; the others are random. The largest F on the way
    counts, SAM's own included. It is a lower bound of the maximum, and at a small ρ
    about ρ‖∇f‖ + ½ρ²λ_max at most.

    Cost: `num_starts` · (`num_steps` + 1) + 2 gradients.

    Args:
      value_fn, params, rho, eta, scale_biases, mask: as in `sam_sharpness`.
      num_steps: steps of an ascent, at least 1.
      num_starts: ascents, at least 1. More find more where F has several maxima.
      seed: of the random directions.
      host_loop: as in `sharpness`.

    Returns:
      A `WorstCase`. Non-finite values are passed over; it is NaN where f(w) is.

    Raises:
      ValueError: as `sam_sharpness`, and for `num_steps` or `num_starts` less than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import diagnostics
      >>> f = lambda w: w[0] ** 2 + 5 * w[1] ** 2
      >>> worst = diagnostics.worst_case_sharpness(f, jnp.zeros(2), rho=0.1)
      >>> print(f"{worst.value:.4f}", jnp.abs(worst.perturbation).round(3))
      0.0500 [0.  0.1]

    References:
      Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards Deep Learning Models Resistant
      to Adversarial Attacks", ICLR 2018, for the ascent.
    """
    arguments.check_positive_int("num_steps", num_steps, "steps of an ascent")
    arguments.check_positive_int("num_starts", num_starts, "ascents")
    ball = value_fn, params, rho, eta, scale_biases, mask
    value_at, zero, displacement = _in_ball(*ball)
    dtype = tree_math.accumulation_dtype(zero)
    rho = jnp.asarray(rho, dtype)

    def climb(params: PyTree, search: _Search, size: jax.Array) -> _Search:
        value, slope = jax.value_and_grad(value_at, argnums=1)(params, search.x)
        known, new = (search.best, search.highest), (search.x, value)
        is_better = (value > search.highest) & jnp.isfinite(value)
        best, highest = tree_math.where(is_better, new, known)
        towards, length = tree_math.unit(slope)
        moved = tree_math.add_scaled(search.x, size, towards)
        x = tree_math.where(jnp.isfinite(length), moved, search.x)
        shrink = rho * tree_math.safe_inverse(jnp.maximum(tree_math.norm(x), rho))
        return _Search(tree_math.scale(shrink, x), value, best, highest)

    lowest = jnp.full((), np.finfo(dtype).min, dtype)
    search = _Search(zero, lowest, zero, lowest)
    host_loop, run = programs.host_loop_of(
        host_loop, value_fn, climb, params, search, rho
    )
    search = run(params, search, rho)  # from w to w + ε
    start = search.value
    search = run(params, search, 0 * rho)
    key, own = jax.random.key(seed), search.x

    def step(i: jax.Array, search: _Search) -> Any:
        return run(params, search, rho * (1 - i.astype(dtype) / num_steps))

    random_vector = programs.jitted(host_loop, _krylov.random_vector)

    def ascent(i: jax.Array, search: _Search) -> Any:
        noise = random_vector(jax.random.fold_in(key, i), zero)
        half = tree_math.scale(jnp.where(i == 0, 1, 0), own)
        between = tree_math.add_scaled(half, rho, tree_math.unit(noise)[0])
        search = search._replace(x=tree_math.scale(rho, tree_math.unit(between)[0]))
        search = programs.repeat(host_loop, num_steps, step, search)
        return run(params, search, 0 * rho)

    search = programs.repeat(host_loop, num_starts, ascent, search)
    return WorstCase(search.highest - start, displacement(search.best))


def average_sharpness(
    value_fn: ValueFn,
    params: PyTree,
    rho: ArrayLike,
    *,
    eta: ArrayLike | None = None,
    scale_biases: bool = False,
    mask: Mask = None,
    num_samples: int = 32,
    seed: int = 0,
    host_loop: bool | None = None,
) -> Estimate:
    """Average-case sharpness E F(x) over Gaussian x of mean squared length ρ².

    The x have independent entries of standard deviation ρ/√n in n dimensions and come
    in pairs x, −x, so that the gradient cancels. At a small ρ it is ½ρ²·tr(THT)/n.

    Cost: 2 `num_samples` + 2 values.

    Args:
      value_fn, params, rho, eta, scale_biases, mask: as in `sam_sharpness`.
      num_samples: pairs, at least 2.
      seed: of the x.
      host_loop: as in `sharpness`.

    Returns:
      An `eigen.Estimate`: the mean over the pairs and its standard error.

    Raises:
      ValueError: as `sam_sharpness`, and for a `num_samples` less than 2.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import diagnostics
      >>> f, w = lambda w: jnp.sum(w**2), jnp.ones(1000)
      >>> print(f"{diagnostics.average_sharpness(f, w, rho=2.0).value:.1f}")
      4.0

    References:
      Jiang, Neyshabur, Mobahi, Krishnan, Bengio, "Fantastic Generalization Measures and
      Where to Find Them", ICLR 2020.
    """
    arguments.check_positive_int("num_samples", num_samples, "pairs")
    remedy = ": one pair has no standard error"
    arguments.require(num_samples > 1, "num_samples", num_samples, "at least 2", remedy)
    value_at, zero, _ = _in_ball(value_fn, params, rho, eta, scale_biases, mask)
    dtype = tree_math.accumulation_dtype(zero)
    dimension = sum(x.size for x in jax.tree.leaves(zero))
    spread = jnp.asarray(rho, dtype) / max(dimension, 1) ** 0.5

    def pair(params: PyTree, key: jax.Array, spread: jax.Array) -> jax.Array:
        x = _krylov.random_vector(key, zero)
        ends = [value_at(params, tree_math.scale(s, x)) for s in (spread, -spread)]
        return (ends[0] + ends[1]) / 2

    key = jax.random.key(seed)
    host_loop, run = programs.host_loop_of(
        host_loop, value_fn, pair, params, key, spread
    )

    def take(i: jax.Array, values: jax.Array) -> jax.Array:
        return values.at[i].set(run(params, jax.random.fold_in(key, i), spread))

    start = run(params, key, 0 * spread)
    values = jnp.zeros(num_samples, start.dtype)
    values = programs.repeat(host_loop, num_samples, take, values) - start
    return Estimate(values.mean(), values.std(ddof=1) / num_samples**0.5)


class _Search(NamedTuple):
    """An ascent.

    Attributes:
      x: where it is.
      value: f where it was last.
      best: where f was highest so far.
      highest: f there.
    """

    x: PyTree
    value: jax.Array
    best: PyTree
    highest: jax.Array


def _in_ball(
    value_fn: ValueFn,
    params: PyTree,
    rho: ArrayLike,
    eta: ArrayLike | None,
    scale_biases: bool,
    mask: Mask,
) -> tuple[Callable[..., jax.Array], PyTree, Callable[[PyTree], PyTree]]:
    """(params, x) -> f(w + T x), the x that is zero, and x -> T x as a whole tree."""
    what, remedy = "a function of the parameters", ": hand in value_fn, params, rho"
    arguments.require(callable(value_fn), "value_fn", value_fn, what, remedy)
    space = masking.subspace(mask, params)
    arguments.check_params(params, space.selected)
    arguments.check_scalar("rho", rho, schedule=False)
    if eta is not None:
        arguments.check_scalar("eta", eta, schedule=False)
    checked = functions.differentiable("value_fn", value_fn)

    def scaled(params: PyTree, x: PyTree) -> PyTree:
        if eta is None:
            return x
        block = space.select(params)
        return perturbation.scaled(x, block, eta, scale_biases=scale_biases)

    def value_at(params: PyTree, x: PyTree) -> jax.Array:
        block = space.select(params)
        # Rounded as by `sam`: narrow weights would not move to the nearest number.
        moved = rounding.add(block, scaled(params, x))
        return checked(space.merge(moved, params))

    zero, _, unravel = _raveled.raveled(True, space.select(params))
    displacement = lambda x: space.embed(scaled(params, unravel(x)), params)
    return lambda params, x: value_at(params, unravel(x)), zero, displacement
