"""The tracker that averages the eigenvector from the gradients of every step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from eigensam_jax import tree_math
from eigensam_jax._update import arguments, scalars
from eigensam_jax.trackers._tracker import Tracker, unchanged
from eigensam_jax.tree_math import PyTree


class SecantState(NamedTuple):
    """State of `secant`.

    Attributes:
      eigenvector: v, a unit vector; zero before the first observation.
      eigenvalue: λ = m₁/m₀, the least-squares slope of ⟨v,d⟩ over ⟨v,ε⟩; 0 at first.
      residual: √(m₂² − m₁²)/m₀, the part of d orthogonal to v per unit of ⟨v,ε⟩.
      moments: m₀, m₁, m₂ and the agreement, averages of a², a⟨v,d⟩/‖ε‖, |a|‖d‖/‖ε‖ and
        a⟨v,d⟩/‖d‖ with a = ⟨v,ε⟩/‖ε‖; shape (4,).
    """

    eigenvector: PyTree
    eigenvalue: jax.Array
    residual: jax.Array
    moments: jax.Array

    @property
    def usable(self) -> jax.Array:
        """Whether vᵀHv is non-negative according to the agreement."""
        return self.moments[3] >= 0


def secant(decay: float = 0.95, update_interval: int = 1) -> Tracker:
    """The default tracker, this project's own: averages SAM's gradient differences.

    The two gradients of a step differ by d = ∇L(w + ε) − ∇L(w) = Hε + O(ρ²), the
    Hessian times a perturbation that contains v. v averages these products:

        v ← (decay·v + (1 − decay)·sign⟨v,ε⟩·d/‖d‖) / ‖…‖.

    This is a power iteration on a fresh batch at each step, shifted by about
    decay/(1 − decay) times the largest eigenvalue. So it finds the algebraically
    largest one. With the sign of ⟨v,d⟩ in place of ⟨v,ε⟩'s, v could converge to the
    eigenvector of a strongly negative one. The first step, with v = 0, is plain SAM. v
    converges to the top eigenvector if perturbations scatter equally along all
    eigenvectors, or α is large. At small α, v leans towards directions along which
    gradients scatter more.

    λ is the least-squares slope of ⟨v,d⟩ over ⟨v,ε⟩, each step divided by its ‖ε‖. It
    is unbiased, but one batch of a thousand times the curvature shows in it for over a
    hundred steps. So the agreement decides whether v is used: the average of
    ⟨v,ε⟩⟨v,d⟩/(‖ε‖‖d‖), in which each step counts for at most 1. v is left out while it
    is negative. `residual` exceeds ‖Hv − λv‖ unless ε is along v.

    The tracker works with `grad_fn` alone and for losses without a second derivative. A
    zero or non-finite gradient leaves the state, a `SecantState`, unchanged. With
    bfloat16 parameters λ is less exact: ε is rounded where the gradient is taken but
    not in ⟨v,ε⟩. Cost: no extra product, one vector like the parameters, and ten more
    passes over them than `sam` per observation.

    Args:
      decay: the memory, in [0, 1): about 1/(1 − decay) observations.
      update_interval: steps from one observation to the next, at least 1. 5 with
        `decay` 0.9 costs less than half and follows less closely. Above 1, `refresh` in
        `update` fixes the observation: give `step % update_interval == 0` or nothing.
        Keep 1 under `jax.vmap`, where a branch runs on every step anyway.

    Example:
      >>> import eigensam_jax, jax, jax.numpy as jnp
      >>> tracker, spectrum = eigensam_jax.trackers.secant(), jnp.array([-5.0, 1, 2])
      >>> def step(state, noise):
      ...     epsilon = noise + state.eigenvector  # the perturbation contains v
      ...     sizes = epsilon @ state.eigenvector, jnp.linalg.norm(epsilon)
      ...     return tracker.observe(state, spectrum * epsilon, *sizes), None
      >>> noise = jax.random.normal(jax.random.key(0), (400, 3))
      >>> state, _ = jax.lax.scan(step, tracker.init(spectrum), noise)
      >>> bool(jnp.abs(state.eigenvector[2]) > 0.9)
      True
    """
    between = "steps from one observation to the next"
    arguments.check_positive_int("update_interval", update_interval, between)
    arguments.check_fraction("decay", decay)
    decay = float(decay)  # a NumPy number would widen the state

    def init(params: PyTree) -> SecantState:
        dtype = tree_math.accumulation_dtype(params)
        zeros = (jnp.zeros(shape, dtype) for shape in ((), (), 4))
        return SecantState(tree_math.zeros_like(params), *zeros)

    def observe(
        state: SecantState,
        gradient_change: PyTree,
        projection: jax.Array,
        radius: jax.Array,
    ) -> SecantState:
        v, d = state.eigenvector, gradient_change
        product, d_squared, v_squared = tree_math.vdots((v, d), (d, d), (v, v))
        lengths = jnp.stack([scalars.safe_sqrt(d_squared), radius])
        per_length, per_radius = tree_math.safe_inverse(lengths)
        sign = jnp.where(projection < 0, -1, 1).astype(product.dtype)
        weight = (1 - decay) * sign * per_length
        # ‖decay·v + weight·d‖², without another pass.
        squared = decay**2 * v_squared + 2 * decay * weight * product + (1 - decay) ** 2
        inverse = scalars.safe_rsqrt(squared)

        # The moments describe this step's v; 0 before there is one.
        along = jnp.where(v_squared > 0, projection * per_radius, 0)
        size = sign * d_squared * per_length
        seen = [along, product * per_radius, size * per_radius, product * per_length]
        moments = decay * state.moments + (1 - decay) * along * jnp.stack(seen)
        usable = (per_length > 0) & (inverse > 0)
        moments = jnp.where(usable, moments, state.moments)
        slope, size = tree_math.safe_divide(moments[1:3], moments[0])
        sides = scalars.safe_sqrt(jnp.stack([size - slope, size + slope]))

        on_v, on_d = scalars.once(
            inverse * decay, jnp.where(usable, inverse * weight, 0)
        )
        moved = tree_math.add_scaled(tree_math.scale(on_v, v), on_d, d)
        new_v = tree_math.where(on_d != 0, moved, v)
        return SecantState(new_v, slope, sides[0] * sides[1], moments)

    return Tracker(init, unchanged, observe, None, update_interval)
