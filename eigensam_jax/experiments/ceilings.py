"""Trackers that nobody would train by: they show what more products would buy."""

from eigensam_jax import tree_math
from eigensam_jax.hessian import Matvec
from eigensam_jax.trackers import EigenpairState, Tracker, power_iteration


def every_product(decay: float = 0.95) -> Tracker:
    """The secant with exact products: v ← decay·v + (1 − decay)·Hv/‖Hv‖, normalised.

    One Hessian-vector product with the batch of every step, before it perturbs, where
    the secant has a difference of gradients after it. λ and residual are those of v
    before the product.
    """
    power = power_iteration(num_matvecs=1, update_interval=1)

    def refresh(state: EigenpairState, matvec: Matvec) -> EigenpairState:
        new: EigenpairState = power.refresh(state, matvec)
        old = tree_math.scale(decay, state.eigenvector)
        v = tree_math.add_scaled(old, 1 - decay, new.eigenvector)
        v, _ = tree_math.unit(v)
        return new._replace(eigenvector=v)

    return power._replace(refresh=refresh)
