"""The interface of trackers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from eigensam_jax.hessian import Matvec
from eigensam_jax.tree_math import PyTree

TrackerState = Any


class Tracker(NamedTuple):
    """A rule for following the top eigenvector of the Hessian during training.

    Its state is a NamedTuple of arrays with at least `eigenvector` (of norm 1, or 0
    until there is an estimate), `eigenvalue` and `residual`, and a property or field
    `usable`: a bool scalar, False where the tracker holds the curvature along v to be
    negative. While v is 0 or not usable, `eigen_sam` takes the steps of `sam`.

    Attributes:
      init: `init(params) -> state`, from the list of the perturbed leaves. Vectors like
        them are in float32 or wider. Structure, shapes and dtypes of a state never
        change.
      refresh: `refresh(state, matvec) -> state`, before the perturbation. `matvec` maps
        a list like `params` to its product with the Hessian. Its attribute `unroll`,
        for `eigen.power_iteration`, is True if the caller has fixed the refresh.
      observe: `observe(state, gradient_change, projection, radius) -> state`, after it,
        with d = ∇L(w + ε) − ∇L(w) = Hε + O(‖ε‖²), ⟨ε, v⟩ and ‖ε‖. Where ‖∇L(w)‖ is
        beyond 10^±9 all three are divided by it, which leaves their ratios unchanged. A
        zero or non-finite d must leave the state unchanged; d is zero where ε is.
      refresh_interval: steps between refreshes, from step 0 on; None for never.
      observe_interval: the same for `observe`. The argument `refresh` of `update` fixes
        this branch as well, unless the other has another interval.

    With `per_device`, `gradient_change` and `projection` are the means over devices of
    s·dᵢ and s·⟨εᵢ, v⟩ with s = sign⟨εᵢ, v⟩. The new state must be the same on all
    devices. It is if it depends on the arguments alone.
    """

    init: Callable[[PyTree], TrackerState]
    refresh: Callable[[TrackerState, Matvec], TrackerState]
    observe: Callable[[TrackerState, PyTree, jax.Array, jax.Array], TrackerState]
    refresh_interval: int | None = None
    observe_interval: int | None = 1


def unchanged(state: TrackerState, *_: Any) -> TrackerState:
    """A `refresh` or `observe` that is never called."""
    return state
