"""Trackers that average the eigenvector from the gradients of every step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from eigensam_jax import arguments, tree_math
from eigensam_jax.hessian import Matvec
from eigensam_jax.trackers.tracker import Tracker
from eigensam_jax.tree_math import PyTree


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
    that is zero or not finite leaves the state as it was. In bfloat16 parameters ε is
    rounded where the gradient is taken, and not in ⟨v,ε⟩, so that λ is less exact.

    Cost: no product, one vector as large as the parameters, and two passes over the
    parameters, v and both gradients on a step that is observed.

    Args:
      decay: the memory, at least 0 and less than 1: about 1/(1 − decay) observations.
      update_interval: steps from one observation to the next, at least 1. With 5 and
        `decay` 0.9 it costs a fifth, and follows less closely. Above 1, `refresh` in
        `update` fixes the observation: give `step % update_interval == 0` or nothing.
        Under `jax.vmap`, where a branch runs on every step anyway, keep to 1.

    Returns:
      A `Tracker` whose state is a `SecantState`.

    Raises:
      ValueError: for a `decay` outside [0, 1) or an `update_interval` less than 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from eigensam_jax import trackers
      >>> tracker = trackers.secant()
      >>> spectrum = jnp.array([-5.0, 1.0, 2.0])
      >>> def step(state, noise):
      ...     epsilon = noise + state.eigenvector  # what perturbs contains v
      ...     return tracker.observe(state, epsilon, spectrum * epsilon, 0), None
      >>> noise = jax.random.normal(jax.random.key(0), (400, 3))
      >>> state, _ = jax.lax.scan(step, tracker.init(spectrum), noise)
      >>> bool(jnp.abs(state.eigenvector[2]) > 0.9)
      True

    References:
      This project's own.
    """
    arguments.check_positive_int(
        "update_interval", update_interval, "steps from one observation to the next"
    )
    arguments.check_fraction("decay", decay)
    decay = float(decay)  # one of NumPy's would widen the state

    def init(params: PyTree) -> SecantState:
        dtype = tree_math.accumulation_dtype(params)
        zeros = [jnp.zeros((), dtype) for _ in range(2)]
        v = tree_math.zeros_like(params)
        return SecantState(v, zeros[0], zeros[1], jnp.zeros(3, dtype))

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

    return Tracker(init, refresh, observe, update_interval, observe_projection=True)
