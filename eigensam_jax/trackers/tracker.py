"""What every tracker is: three pure functions around a state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

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
      observe_projection: whether of ε `observe` needs its projection on v alone. It is
        then called with ⟨ε, v⟩·v for ε, which is known without a pass over ε and, where
        each device has its own, averaged without a collective of that size.

    Where each device perturbs by itself (`per_device`), both arguments of `observe` are
    means over the devices of s·εᵢ and s·dᵢ with s = sign⟨v, εᵢ⟩, of which dᵢ ≈ Hᵢεᵢ;
    the state has to come out the same on all of them, and does if nothing but the
    arguments goes into it.
    """

    init: Callable[[PyTree], TrackerState]
    refresh: Callable[[TrackerState, Matvec, jax.Array, bool | None], TrackerState]
    observe: Callable[[TrackerState, PyTree, PyTree, jax.Array], TrackerState]
    observe_interval: int = 1
    observe_projection: bool = False
