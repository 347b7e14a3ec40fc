"""A tracker within an update: how its state is kept, and when its functions run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.typing import DTypeLike

from eigensam_jax import tree_math
from eigensam_jax._update import arguments, rounding, scalars
from eigensam_jax._update.masking import Subspace
from eigensam_jax.hessian import Matvec
from eigensam_jax.trackers import Tracker, TrackerState
from eigensam_jax.tree_math import PyTree

Observation = tuple[list[jax.Array], jax.Array, jax.Array]
_Step = Callable[[TrackerState], TrackerState]


class Tracking(NamedTuple):
    """A tracker in one update, made by `of`.

    In the state of the optimizer its vectors are like all parameters, and zero where
    these are not perturbed. The tracker sees the perturbed leaves, in full precision.

    Attributes:
      tracker: the tracker.
      space: the leaves that are perturbed.
      vectors: the shapes of each field of its state that is as large as these.
      dtype: that in which vectors are kept; None for their own.
      number: of the step, int32.
    """

    tracker: Tracker
    space: Subspace
    vectors: dict[str, PyTree]
    dtype: DTypeLike | None
    number: jax.Array

    def start(self, params: PyTree) -> TrackerState:
        """The state before the first step."""
        started = self.tracker.init(self.space.select(params))
        whole = {
            name: self.space.embed(field, params)
            for name, field in self._vectors_of(started).items()
        }
        if self.dtype is not None:
            whole = rounding.cast(whole, self.dtype, self.number)
        return started._replace(**whole)

    def checked(self, state: TrackerState, params: PyTree) -> TrackerState:
        """`state`, with an error unless it is one of this tracker and `params`."""
        remedy = (
            "It belongs to another tracker or to other parameters: make it by "
            "tx.init(params), and keep the state of the rest of the chain."
        )
        like = jax.eval_shape(self.start, params)
        name = "the tracker's part of opt_state"
        return arguments.like_params(name, state, like, remedy)

    def select(self, whole: TrackerState) -> TrackerState:
        """The part of a state that belongs to the leaves that are perturbed."""
        vectors = self._vectors_of(whole)
        own = {name: self.space.select(field) for name, field in vectors.items()}
        return self._narrow(whole._replace(**own))

    def merge(self, own: TrackerState, whole: TrackerState) -> TrackerState:
        """`own` within `whole`: what is not perturbed stays, and is not written."""
        rest = self._vectors_of(whole)
        vectors = self._vectors_of(own)
        merged = {name: self.space.merge(vectors[name], rest[name]) for name in vectors}
        return own._replace(**merged)

    def refresh(
        self, state: TrackerState, matvec: Matvec, refresh: bool | None
    ) -> TrackerState:
        """The state after a refresh, where one is due."""
        if self.tracker.refresh_interval is None or not self.space.selected:
            return state
        due = _is_due(self.number, self.tracker.refresh_interval)
        return scalars.branch(
            due if refresh is None else bool(refresh),
            self._in_full(lambda state: self.tracker.refresh(state, matvec)),
            lambda state: state,
            state,
        )

    def observe(
        self,
        state: TrackerState,
        seen: Callable[[list[jax.Array]], Observation],
        refresh: bool | None,
    ) -> TrackerState:
        """The state after it observes `seen(like)`, where that is due."""

        def observed(state: TrackerState) -> TrackerState:
            change, projection, radius = seen(state.eigenvector)
            dtype = state.eigenvalue.dtype
            return self.tracker.observe(
                state, change, projection.astype(dtype), radius.astype(dtype)
            )

        interval = self.tracker.observe_interval
        due = _is_due(self.number, interval)
        is_shared = self.tracker.refresh_interval in (None, interval)
        if refresh is not None and interval not in (None, 1) and is_shared:
            due = bool(refresh)
        return scalars.branch(due, self._in_full(observed), lambda state: state, state)

    def _vectors_of(self, state: TrackerState) -> dict[str, PyTree]:
        return {name: getattr(state, name) for name in self.vectors}

    def _narrow(self, state: TrackerState) -> TrackerState:
        """The state with its vectors in the dtype in which they are kept."""
        kept = self._vectors_of(state)
        if self.dtype is None:
            return state._replace(**tree_math.cast_like(kept, self.vectors))
        return state._replace(**rounding.cast(kept, self.dtype, self.number))

    def _in_full(self, step: _Step) -> _Step:
        """`step`, which sees the vectors in their full dtype, between conversions."""

        def taken(state: TrackerState) -> TrackerState:
            full = tree_math.cast_like(self._vectors_of(state), self.vectors)
            return self._narrow(step(state._replace(**full)))

        return taken


def of(
    tracker: Tracker,
    params: PyTree,
    space: Subspace,
    dtype: DTypeLike | None,
    number: jax.Array,
) -> Tracking:
    """The tracker's part of an update of `params`."""

    def checked(weights: list[jax.Array]) -> TrackerState:
        state = tracker.init(weights)
        _check_tracker(state)
        return state

    weights = space.select(params)
    like = jax.eval_shape(checked, weights)
    vectors = {
        name: field
        for name, field in zip(like._fields, like, strict=True)
        if _shapes(field) == _shapes(weights)
    }
    return Tracking(tracker, space, vectors, dtype, number)


def _is_due(number: jax.Array, interval: int | None) -> jax.Array | bool:
    if interval is None or interval == 1:
        return interval == 1
    due: jax.Array = number % interval == 0
    return due


def _shapes(tree: PyTree) -> tuple[Any, list[tuple[int, ...]]]:
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [getattr(x, "shape", ()) for x in leaves]


def _check_tracker(state: Any) -> None:
    names = ("_fields", "eigenvector", "eigenvalue", "residual", "usable")
    if missing := [name for name in names if not hasattr(type(state), name)]:
        raise ValueError(
            "tracker.init(params) must return a NamedTuple with eigenvector, eigenvalue"
            f", residual and usable, got a {type(state).__name__} without {missing}: "
            "trackers.EigenpairState is the smallest."
        )
