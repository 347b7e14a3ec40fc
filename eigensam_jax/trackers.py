"""What keeps the estimate of the top eigenvector up to date between steps.

A `Tracker` is three pure functions around a state, called by `eigen_sam` in this order:

    state = tracker.init(params)                                # once
    state = tracker.refresh(state, matvec, count, due)          # before ε is made
    state = tracker.observe(state, perturbation, gradient_change, count)    # after

A state is a NamedTuple of arrays with the fields `eigenvector`, `eigenvalue` and
`residual` of an `eigensam_jax.eigen.Eigenpair`, and whatever else the tracker carries;
its structure, shapes and dtypes never change. `eigen_sam` adds nothing along the
eigenvector while `eigenvalue` is negative.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eigensam_jax import arguments, eigen, tree_math
from eigensam_jax.hessian import Matvec
from eigensam_jax.tree_math import PyTree

TrackerState = Any


class Tracker(NamedTuple):
    """A rule for following the top eigenvector of the Hessian during training.

    Attributes:
      init: `init(params) -> state`. `eigenvector` has the shapes of `params`, in
        float32 or wider; its part outside a `mask` is set to zero afterwards.
      refresh: `refresh(state, matvec, count, due) -> state`, before the perturbation.
        `matvec(v)` is the product of the Hessian at the current parameters with a tree
        like them, zero outside the mask; `count` is the number of the step, from 0, an
        int32 scalar. `due` is True or False where the caller has fixed whether this
        step refreshes, else None: then the tracker decides, under `jax.lax.cond`. The
        eigenvector must come out with norm 1, or 0 as long as there is no estimate.
      observe: `observe(state, perturbation, gradient_change, count) -> state`, after
        the perturbed gradient: ε and ∇L(w + ε) − ∇L(w), trees like the parameters and
        zero outside the mask. What is not looked at is not computed under `jit`.
      observe_interval: `observe` is called on every so many steps, the first of them
        step 0; or, above 1 and where the caller has fixed the refresh, on the steps
        that refresh. On the others nothing is computed for it.
    """

    init: Callable[[PyTree], TrackerState]
    refresh: Callable[[TrackerState, Matvec, jax.Array, bool | None], TrackerState]
    observe: Callable[[TrackerState, PyTree, PyTree, jax.Array], TrackerState]
    observe_interval: int = 1


def power_iteration(
    num_iters: int = 5, update_interval: int = 100, seed: int = 0
) -> Tracker:
    """The paper's tracker: a few power iterations now and then.

    Every `update_interval` steps, the first of them at step 0, v ← Hv/‖Hv‖ is repeated
    `num_iters` times on the current batch, from the v of the last refresh; in between v
    is kept. λ = ⟨v′, Hv′⟩ and the residual ‖Hv′ − λv′‖ belong to v′, the input of the
    last product, so that they cost no product of their own. Before the first refresh v
    is a random unit vector, and λ and the residual are 0: let the first step refresh.

    Power iteration finds the eigenvalue that is largest in magnitude. Where that is
    negative, λ < 0 says so, and `eigen_sam` leaves v alone until the next refresh. A
    refresh that is not finite leaves v, λ and the residual as they were.

    Cost: `num_iters` Hessian-vector products every `update_interval` steps, and one
    vector as large as the parameters. With `due` None the refresh is a branch of
    `jax.lax.cond` that loops; with True it is written out straight, which is longer to
    compile, and on XLA's CPU backend many times faster for convolutions.

    Differences from the paper's code: the interval is counted over all of training,
    from step 0, and not within the epoch; λ is known; and v is in the state, so that a
    checkpoint keeps it.

    Args:
      num_iters: products per refresh, at least 1.
      update_interval: steps from one refresh to the next, at least 1.
      seed: seed of the random start.

    Returns:
      A `Tracker` whose state is an `eigen.Eigenpair`.

    Raises:
      ValueError: if `num_iters` or `update_interval` is less than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import trackers
      >>> tracker = trackers.power_iteration(num_iters=20)
      >>> state = tracker.init(jnp.zeros(3))
      >>> spectrum = jnp.array([1.0, 2.0, 8.0])
      >>> state = tracker.refresh(state, lambda v: spectrum * v, jnp.int32(0), None)
      >>> float(state.eigenvalue), jnp.abs(state.eigenvector).round(5)
      (8.0, Array([0., 0., 1.], dtype=float32))
    """
    arguments.check_positive_int("num_iters", num_iters, "products per refresh")
    return _refreshing(eigen.power_iteration, num_iters, update_interval, seed)


def lanczos(num_matvecs: int = 5, update_interval: int = 100, seed: int = 0) -> Tracker:
    """A warm-started Lanczos iteration now and then: the top of indefinite spectra too.

    As `power_iteration`, with `eigen.lanczos` in its place: for the same number of
    products, the vector of the largest Rayleigh quotient in the whole Krylov space of
    the last v, and one free step beyond it. It finds the algebraically largest
    eigenvalue, so that negative curvature, however strong, does not lead it astray.
    λ and the residual belong to the maximiser before that free step.

    Cost: `num_matvecs` Hessian-vector products every `update_interval` steps, one
    vector as large as the parameters in the state, and `num_matvecs` + 3 of them during
    a refresh.

    Args:
      num_matvecs: products per refresh, at least 1.
      update_interval: steps from one refresh to the next, at least 1.
      seed: seed of the random start.

    Returns:
      A `Tracker` whose state is an `eigen.Eigenpair`.

    Raises:
      ValueError: if `num_matvecs` or `update_interval` is less than 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import trackers
      >>> tracker = trackers.lanczos(num_matvecs=3)
      >>> spectrum = jnp.array([-5.0, 1.0, 2.0])  # power iteration would find -5
      >>> state = tracker.init(spectrum)
      >>> state = tracker.refresh(state, lambda v: spectrum * v, jnp.int32(0), None)
      >>> print(f"{state.eigenvalue:.4f}", jnp.abs(state.eigenvector).round(3))
      2.0000 [0. 0. 1.]
    """
    arguments.check_positive_int("num_matvecs", num_matvecs, "products per refresh")
    return _refreshing(eigen.lanczos, num_matvecs, update_interval, seed)


class SecantState(NamedTuple):
    """State of `secant`.

    Attributes:
      eigenvector: v, a unit vector; zero before the first observation.
      eigenvalue: λ = m₁/m₀, the slope of ⟨v,d⟩ over ⟨v,ε⟩ by least squares; 0 before.
      residual: √((m₂ − m₁²/m₀)/m₀), what of d is not λ⟨v,ε⟩v, for a unit of ⟨v,ε⟩.
      moments: m₀, m₁, m₂, the averages of ⟨v,ε⟩², ⟨v,ε⟩⟨v,d⟩ and ‖d‖², shape (3,).
    """

    eigenvector: PyTree
    eigenvalue: jax.Array
    residual: jax.Array
    moments: jax.Array


def secant(decay: float = 0.95, update_interval: int = 1) -> Tracker:
    """A tracker that costs no Hessian-vector product: averages of what SAM does anyway.

    The two gradients of a step differ by d = ∇L(w + ε) − ∇L(w) = Hε + O(ρ²), a product
    of the Hessian with the perturbation, which contains v. It is averaged into v,

        v ← (decay·v + (1 − decay)·sign⟨v,ε⟩·d/‖d‖) / ‖…‖,

    one step of a power iteration shifted by about decay/(1 − decay) times the largest
    eigenvalue, on a fresh batch every time. The shift is what finds the algebraically
    largest eigenvalue; it comes from the sign, which must be that of ⟨v,ε⟩: by ⟨v,d⟩ a
    strong negative eigenvalue would be taken for the top. v is zero at `init`, so that
    the first step is plain SAM.

    λ is the slope of ⟨v,d⟩ over ⟨v,ε⟩, by least squares over the average's memory. One
    step's ratio is no Rayleigh quotient, as the rest of ε has a part in it. For the
    same reason `residual` is larger than ‖Hv − λv‖: both are equal where ε is along v.

    What it converges to is the top eigenvector where the perturbations scatter alike
    along all eigenvectors, or α is large. Gradients scatter more along some than along
    others, and at a small α these get more than their share of v.

    Works with `grad_fn` alone, and where the loss has no second derivative. A gradient
    that is zero or not finite leaves the state as it was.

    Cost: no product, one vector as large as the parameters, and two passes over the
    parameters, v and both gradients on a step that is observed.

    Args:
      decay: the memory, at least 0 and less than 1: about 1/(1 − decay) observations.
      update_interval: steps from one observation to the next, at least 1. With 5 and
        `decay` 0.9 it costs a fifth; under `jax.vmap`, where a branch runs on every
        step anyway, keep to 1.

    Returns:
      A `Tracker` whose state is a `SecantState`.

    Raises:
      ValueError: for a `decay` outside [0, 1) or an `update_interval` less than 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from eigensam_jax import trackers
      >>> tracker = trackers.secant(decay=0.9)
      >>> spectrum = jnp.array([-5.0, 1.0, 2.0])
      >>> state = tracker.init(spectrum)
      >>> for step in range(400):
      ...     noise = jax.random.normal(jax.random.key(step), (3,))
      ...     epsilon = noise + state.eigenvector  # what perturbs, contains v
      ...     state = tracker.observe(state, epsilon, spectrum * epsilon, step)
      >>> bool(jnp.abs(state.eigenvector[2]) > 0.9)
      True

    References:
      This project's own.
    """
    arguments.check_positive_int(
        "update_interval", update_interval, "steps from one observation to the next"
    )
    arguments.check_fraction("decay", decay)

    def init(params: PyTree) -> SecantState:
        dtype = tree_math.accumulation_dtype(params)
        zeros = [jnp.zeros((), dtype) for _ in range(2)]
        v = jax.tree.map(jnp.zeros_like, tree_math.widen(params))
        return SecantState(v, *zeros, jnp.zeros(3, dtype))

    def refresh(
        state: SecantState, matvec: Matvec, count: jax.Array, due: bool | None
    ) -> SecantState:
        del matvec, count, due
        return state

    def observe(
        state: SecantState,
        perturbation: PyTree,
        gradient_change: PyTree,
        count: jax.Array,
    ) -> SecantState:
        del count
        v, d = state.eigenvector, gradient_change
        along, product, d_squared, v_squared = tree_math.vdots(
            (v, perturbation), (v, d), (d, d), (v, v)
        )
        weight = (1 - decay) * tree_math.safe_inverse(jnp.sqrt(d_squared))
        weight = jnp.where(along < 0, -weight, weight)
        # ‖decay·v + weight·d‖², so that the norm takes no pass of its own.
        squared = decay**2 * v_squared + weight * (
            2 * decay * product + weight * d_squared
        )
        inverse = tree_math.safe_inverse(jnp.sqrt(squared))
        new_v = tree_math.add_scaled(
            tree_math.scale(inverse * decay, v), inverse * weight, d
        )
        new_moments = jnp.stack([along * along, along * product, d_squared])
        new_moments = jnp.where(v_squared > 0, new_moments, 0)  # they are about v
        moments = decay * state.moments + (1 - decay) * new_moments
        inverse_along = tree_math.safe_inverse(moments[0])
        eigenvalue = moments[1] * inverse_along
        unexplained = jnp.maximum(moments[2] - moments[1] * eigenvalue, 0)
        residual = jnp.sqrt(unexplained * inverse_along)
        new = SecantState(new_v, eigenvalue, residual, moments)
        usable = (weight != 0) & (inverse > 0) & jnp.all(jnp.isfinite(moments))
        return tree_math.where(usable, new, state)

    return Tracker(init, refresh, observe, update_interval)


def _refreshing(
    solve: Callable[..., eigen.Eigenpair],
    num_matvecs: int,
    update_interval: int,
    seed: int,
) -> Tracker:
    """A tracker that does `solve(matvec, v, num_matvecs)` every `update_interval`."""
    arguments.check_positive_int(
        "update_interval", update_interval, "steps from one refresh to the next"
    )

    def init(params: PyTree) -> eigen.Eigenpair:
        zeros = [jnp.zeros((), tree_math.accumulation_dtype(params)) for _ in range(2)]
        return eigen.Eigenpair(_random_unit_vector(seed, params), *zeros)

    def refresh(
        state: eigen.Eigenpair, matvec: Matvec, count: jax.Array, due: bool | None
    ) -> eigen.Eigenpair:
        def solved(pair: eigen.Eigenpair) -> eigen.Eigenpair:
            new = solve(matvec, pair.eigenvector, num_matvecs, unroll=due is True)
            finite = jnp.isfinite(new.eigenvalue) & jnp.isfinite(new.residual)
            return tree_math.where(finite, new, pair)

        if due is None:
            is_due = count % update_interval == 0
            state = jax.lax.cond(is_due, solved, lambda pair: pair, state)
        elif due:
            state = solved(state)
        return state

    return Tracker(init, refresh, _observe_nothing)


def _observe_nothing(
    state: TrackerState, perturbation: PyTree, gradient_change: PyTree, count: jax.Array
) -> TrackerState:
    del perturbation, gradient_change, count
    return state


def _random_unit_vector(seed: int, like: PyTree) -> PyTree:
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    normal = [
        jax.random.normal(key, jnp.shape(x), tree_math.accumulation_dtype(x))
        for key, x in zip(keys, leaves, strict=True)
    ]
    vector = jax.tree.unflatten(treedef, normal)
    return tree_math.scale(tree_math.safe_inverse(tree_math.norm(vector)), vector)
