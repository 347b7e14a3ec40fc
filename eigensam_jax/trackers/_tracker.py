"""What a tracker is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from eigensam_jax.hessian import Matvec
from eigensam_jax.tree_math import PyTree

TrackerState = Any


class Tracker(NamedTuple):
    """A rule for following the top eigenvector of the Hessian during training.

    Its state is a NamedTuple of arrays with the fields `eigenvector`, `eigenvalue` and
    `residual`, whatever else it carries, and a property or a field `usable`: a bool
    scalar, False where the eigenvalue is certainly negative, so that v is no top
    eigenvector. The eigenvector has norm 1, or is 0 until there is an estimate. While
    it is 0 or not usable, `eigen_sam` takes the steps of `sam`.

    Attributes:
      init: `init(params) -> state`. `params` are the perturbed parameters, as a list of
        their leaves. Fields with their shapes, such as the eigenvector, are in float32
        or wider; structure, shapes and dtypes of a state never change.
      refresh: `refresh(state, matvec) -> state`, before the perturbation. `matvec(v)`
        is the product of v, a list like `params`, with the Hessian at the current
        parameters. Its attribute `unroll` is what `eigen.power_iteration` takes: True
        where the caller has fixed the refresh.
      observe: `observe(state, gradient_change, projection, radius) -> state`, after the
        perturbed gradient: d = ∇L(w + ε) − ∇L(w), a list like `params`, which is
        H·ε + O(‖ε‖²); ⟨ε, v⟩; and ‖ε‖. Where ‖∇L(w)‖ is beyond 10^±9, all three are
        divided by it, so that squares stay in range; ratios such as ⟨v, d⟩/⟨ε, v⟩ are
        the same. A change that is zero or not finite must leave the state unchanged;
        it is zero where ε is.
      refresh_interval: `refresh` is called on every so many steps, the first of them
        step 0; None for never.
      observe_interval: the same of `observe`.

    On other steps nothing is computed. With `per_device`, `gradient_change` and
    `projection` are means over the devices of s·dᵢ and s·⟨εᵢ, v⟩ with s = sign⟨εᵢ, v⟩.
    The state must come out the same on all devices, and does if it depends on the
    arguments alone.
    """

    init: Callable[[PyTree], TrackerState]
    refresh: Callable[[TrackerState, Matvec], TrackerState]
    observe: Callable[[TrackerState, PyTree, jax.Array, jax.Array], TrackerState]
    refresh_interval: int | None = None
    observe_interval: int | None = 1


def unchanged(state: TrackerState, *_: Any) -> TrackerState:
    """A `refresh` or an `observe` that is never called."""
    return state
