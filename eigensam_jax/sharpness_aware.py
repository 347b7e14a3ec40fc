"""The update that SAM, ASAM and Eigen-SAM share, around a rule for the perturbation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from eigensam_jax import arguments, devices, hessian, masking, rounding, tree_math
from eigensam_jax.devices import Axes, AxisName
from eigensam_jax.eigen import Eigenpair
from eigensam_jax.hessian import GradFn, HvpMode, Matvec, ValueFn
from eigensam_jax.masking import Mask, Subspace
from eigensam_jax.perturbation import Perturbation
from eigensam_jax.trackers import Tracker
from eigensam_jax.tree_math import PyTree


class Info(NamedTuple):
    """What the last step did; nothing of it is carried on. Scalars, 0 before the first.

    With `per_device` each is the mean over the devices.

    Attributes:
      grad_norm: ‖g‖ over the perturbed parameters.
      perturbation_norm: ‖ε‖.
      perturbed_value: L(w + ε); NaN where `grad_fn` makes the gradients.
      alignment: |⟨ε, v⟩|/‖ε‖; None for `sam` and `asam`.
    """

    grad_norm: jax.Array
    perturbation_norm: jax.Array
    perturbed_value: jax.Array
    alignment: jax.Array | None


class SharpnessAwareState(NamedTuple):
    """State of `sam`, `asam` and `eigen_sam`.

    Attributes:
      count: number of updates so far, int32.
      tracker: the tracker's state, with the fields `eigenvector`, `eigenvalue` and
        `residual`; None for `sam` and `asam`.
      info: what the last step did, to look at.
    """

    count: jax.Array  # type: ignore[assignment]
    tracker: Any
    info: Info


def sharpness_aware(
    perturb: Callable[..., Perturbation],
    tracker: Tracker | None,
    mask: Mask,
    axis_name: AxisName = None,
    per_device: bool = False,
    hvp_mode: HvpMode = "forward_over_reverse",
    eigenvector_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """∇L(w) becomes ∇L(w + ε), ε = perturb(count, g, w, top eigenpair).

    `perturb` sees the leaves that `mask` selects, as lists; `tracker` sees whole trees,
    and its own state in the dtypes that its `init` gave it.
    """
    masking.check(mask)
    arguments.check_axis_name(axis_name, per_device)
    axes = devices.as_tuple(axis_name)

    def init_fn(params: PyTree) -> SharpnessAwareState:
        arguments.check_params(params)
        space = masking.subspace(mask, params)
        # A buffer for each scalar: one that stood for two could not be donated.
        zeros = [jnp.zeros((), tree_math.accumulation_dtype(params)) for _ in range(4)]
        info = Info(*zeros)
        tracked = None
        if tracker is None:
            info = info._replace(alignment=None)
        else:
            tracked = tracker.init(params)
            v = space.select(tracked.eigenvector)
            v = tree_math.scale(tree_math.safe_inverse(tree_math.norm(v)), v)
            v = _cast(space.embed(v, params), eigenvector_dtype)
            tracked = tracked._replace(eigenvector=v)
        return SharpnessAwareState(jnp.zeros((), jnp.int32), tracked, info)

    def update_fn(
        updates: PyTree,
        state: SharpnessAwareState,
        params: PyTree | None = None,
        *,
        value_fn: ValueFn | None = None,
        grad_fn: GradFn | None = None,
        curvature_fn: ValueFn | None = None,
        refresh: bool | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, SharpnessAwareState]:
        del extra_args
        arguments.check_update(params, value_fn, grad_fn, curvature_fn, refresh)
        arguments.check_params(params)
        updates = arguments.like_params(
            "updates", updates, params, "Hand in jax.grad(value_fn)(params) as it is."
        )
        if not isinstance(state, SharpnessAwareState) or (
            (state.tracker is None) != (tracker is None)
        ):
            got = type(state).__name__
            if isinstance(state, SharpnessAwareState):
                got += f" {'without' if state.tracker is None else 'with'} a tracker"
            raise ValueError(
                f"opt_state is not of this transformation, got {got}: make it by "
                "tx.init(params) of the same chain. Of a checkpoint of another one, "
                "keep the rest: (tx.init(params)[0], *old_state[1:])."
            )
        devices.check_bound(axes)
        space = masking.subspace(mask, params)
        arguments.check_varying(space.select(updates), axes, per_device)
        refresh = None if refresh is None else bool(refresh)
        own_value_and_grad = arguments.gradient_function(value_fn, grad_fn, axes)
        curvature_grad = lambda p: own_value_and_grad(p)[1]
        if curvature_fn is not None:
            curvature_grad = jax.grad(
                arguments.scalar_valued("curvature_fn", curvature_fn, axes)
            )

        grads, weights = space.select(updates), space.select(params)
        tracked, top = state.tracker, None
        if tracker is not None:
            like = jax.eval_shape(tracker.init, params)
            tracked = arguments.like_params(
                "the tracker's part of opt_state",
                tracked,
                like,
                "It is of another tracker or of other parameters: make it by "
                "tx.init(params), and keep what the rest of the chain has.",
            )
            matvec = _mean_matvec(curvature_grad, params, space, axes, hvp_mode)
            v = jax.tree.map(
                lambda x, y: x.astype(y.dtype), tracked.eigenvector, like.eigenvector
            )
            tracked = tracked._replace(eigenvector=v)
            tracked = tracker.refresh(tracked, matvec, state.count, refresh)
            top = Eigenpair(
                space.select(tracked.eigenvector), tracked.eigenvalue, tracked.residual
            )

        step = perturb(state.count, grads, weights, top)
        perturbed = rounding.add(weights, step.epsilon, state.count)
        value, own_updates = own_value_and_grad(
            devices.as_own(space.merge(perturbed, params), axes)
        )
        new_updates, value = devices.mean((own_updates, value), axes)
        info = Info(step.grad_norm, step.norm, value, step.alignment)
        if per_device:
            info = devices.mean(info, axes)

        if tracker is not None and top is not None:
            along = _along(step, grads, top.eigenvector)

            def observed(tracked: Any) -> Any:
                after = space.select(own_updates if per_device else new_updates)
                epsilon, change, projection = _mean_pair(
                    step.epsilon,
                    tree_math.add_scaled(after, -1, grads),
                    along,
                    axes if per_device else (),
                )
                if tracker.observe_projection:
                    epsilon = tree_math.scale(projection, top.eigenvector)
                wide = tree_math.widen(weights)
                new = tracker.observe(
                    tracked,
                    space.embed(tree_math.cast_like(epsilon, wide), params),
                    space.embed(tree_math.cast_like(change, wide), params),
                    state.count,
                )
                # Without a perturbation the change is but rounding.
                return tree_math.where(info.perturbation_norm > 0, new, tracked)

            if tracker.observe_interval == 1 or refresh:
                tracked = observed(tracked)
            elif refresh is None:
                is_due = state.count % tracker.observe_interval == 0
                tracked = jax.lax.cond(is_due, observed, lambda same: same, tracked)
            v = _cast(tracked.eigenvector, eigenvector_dtype)
            tracked = tracked._replace(eigenvector=v)
        dtype = tree_math.accumulation_dtype(params)
        info = jax.tree.map(lambda x: jnp.asarray(x, dtype), info)
        new_updates = jax.tree.map(
            lambda new, old: jnp.asarray(new, jnp.result_type(old)),
            new_updates,
            updates,
        )
        count = optax.safe_increment(state.count)
        return new_updates, SharpnessAwareState(count, tracked, info)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _mean_matvec(
    grad_fn: GradFn, params: PyTree, space: Subspace, axes: Axes, mode: HvpMode
) -> Matvec:
    """The Hessian-vector product of the subspace, on vectors of the whole space.

    Each device makes the product of its own loss, and then comes the mean: a derivative
    of a mean over devices would not be right in all modes of `shard_map`.
    """

    def mean_product(vector: PyTree) -> PyTree:
        # Else a solver's loop would keep all activations of the gradient at hand.
        at, v = jax.lax.optimization_barrier(  # type: ignore[no-untyped-call]
            (params, space.select(vector))
        )
        at, v = devices.as_own((at, v), axes)

        def grad_in_subspace(weights: list[jax.Array]) -> list[jax.Array]:
            return space.select(grad_fn(space.merge(weights, at)))

        own = hessian.matvec(grad_in_subspace, space.select(at), hvp_mode=mode)(v)
        return space.embed(devices.mean(own, axes), params)

    return mean_product


def _along(step: Perturbation, grads: PyTree, v: PyTree) -> jax.Array:
    """⟨ε,v⟩, without a pass over ε: it has the sign of ⟨g,v⟩."""
    cosine = tree_math.safe_divide(tree_math.vdot(grads, v), step.grad_norm)
    return jnp.copysign(step.alignment * step.norm, cosine)  # type: ignore[operator]


def _mean_pair(
    epsilon: PyTree, change: PyTree, along: jax.Array, axes: Axes
) -> tuple[PyTree, PyTree, jax.Array]:
    """The means over devices of s·ε, s·d and |⟨ε,v⟩|, s = sign⟨ε,v⟩; none, as they are.

    d = Hε holds of means too. Without the signs, those of different ones would cancel.
    """
    if not axes:
        return epsilon, change, along
    sign = jnp.where(along < 0, -1, 1)
    pair = (tree_math.scale(sign, epsilon), tree_math.scale(sign, change))
    return devices.mean((*pair, sign * along), axes)


def _cast(tree: PyTree, dtype: DTypeLike | None) -> PyTree:
    return tree if dtype is None else jax.tree.map(lambda x: x.astype(dtype), tree)
