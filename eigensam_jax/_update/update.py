"""The update that SAM, ASAM and Eigen-SAM share, around a rule for the perturbation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from eigensam_jax import hessian, tree_math
from eigensam_jax._update import (
    arguments,
    devices,
    functions,
    masking,
    rounding,
    scalars,
    tracking,
)
from eigensam_jax._update.devices import Axes, AxisName
from eigensam_jax._update.masking import Mask, Subspace
from eigensam_jax._update.tracking import Observation
from eigensam_jax.hessian import HvpMode, Matvec
from eigensam_jax.perturbation import Perturbation
from eigensam_jax.trackers import Tracker
from eigensam_jax.tree_math import GradFn, PyTree, ValueFn


class Info(NamedTuple):
    """Scalars of the last step, not carried on; 0 before the first.

    With `per_device` each is the mean over the devices.

    Attributes:
      grad_norm: ‖g‖ over the perturbed parameters.
      perturbation_norm: ‖ε‖.
      perturbed_value: L(w + ε); 0 if `grad_fn` returns gradients alone.
      alignment: |⟨ε, v⟩|/‖ε‖; None for `sam` and `asam`.
    """

    grad_norm: jax.Array
    perturbation_norm: jax.Array
    perturbed_value: jax.Array
    alignment: jax.Array | None


class SharpnessAwareState(NamedTuple):
    """State of `sam`, `asam` and `eigen_sam`.

    Attributes:
      num_updates: number of updates so far, int32.
      tracker: the tracker's state, with the fields `eigenvector`, `eigenvalue` and
        `residual`; None for `sam` and `asam`.
      info: an `Info` about the last step.
    """

    num_updates: jax.Array
    tracker: Any
    info: Info


def sharpness_aware(
    rule: Callable[..., Perturbation],
    tracker: Tracker | None,
    mask: Mask,
    axis_name: AxisName = None,
    per_device: bool = False,
    hvp_mode: HvpMode = "forward_over_reverse",
    eigenvector_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """∇L(w) becomes ∇L(w + ε), ε = rule(number, g, w, tracked) in the masked leaves."""
    masking.check(mask)
    arguments.check_axis_name(axis_name, per_device)
    axes = devices.as_tuple(axis_name)

    def init_fn(params: PyTree) -> SharpnessAwareState:
        space = masking.subspace(mask, params)
        arguments.check_params(params, space.selected)
        # One buffer per scalar: a shared one could not be donated.
        zeros = [jnp.zeros((), tree_math.accumulation_dtype(params)) for _ in range(4)]
        info, number = Info(*zeros), jnp.zeros((), jnp.int32)
        if tracker is None:
            return SharpnessAwareState(number, None, info._replace(alignment=None))
        follow = tracking.of(tracker, params, space, eigenvector_dtype, number)
        return SharpnessAwareState(number, follow.start(params), info)

    def update_fn(
        updates: PyTree,
        state: SharpnessAwareState,
        params: PyTree | None = None,
        *,
        value_fn: ValueFn | None = None,
        grad_fn: GradFn | None = None,
        curvature_fn: ValueFn | None = None,
        refresh: bool | None = None,
        perturb: bool | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, SharpnessAwareState]:
        del extra_args
        arguments.check_update(params, value_fn, grad_fn, curvature_fn, refresh)
        arguments.check_static("perturb", perturb)
        space = masking.subspace(mask, params)
        arguments.check_params(params, space.selected)
        updates = arguments.like_params(
            "updates", updates, params, "Give jax.grad(value_fn)(params) unchanged."
        )
        _check_state(state, tracker is not None)
        devices.check_bound(axes)
        arguments.check_varying(space.select(updates), axes, per_device)
        if perturb is not None and not perturb:
            return devices.mean(updates, axes if per_device else ()), state
        own_value_and_grad = functions.gradient_function(value_fn, grad_fn, axes)
        number = state.num_updates
        grads, weights = space.select(updates), space.select(params)

        follow, tracked = None, None
        if tracker is not None:
            follow = tracking.of(tracker, params, space, eigenvector_dtype, number)
            whole = follow.checked(state.tracker, params)
            curvature_grad = lambda p: own_value_and_grad(p)[1]
            if curvature_fn is not None:
                curvature_grad = jax.grad(
                    functions.differentiable("curvature_fn", curvature_fn, axes)
                )
            matvec = _mean_matvec(curvature_grad, params, space, axes, hvp_mode)
            # No use inside a `cond`, where convolutions are slow anyway.
            matvec.unroll = bool(refresh)  # type: ignore[attr-defined]
            tracked = follow.refresh(follow.select(whole), matvec, refresh)

        step = rule(number, grads, weights, tracked)
        perturbed = rounding.add(weights, step.epsilon, number)
        value, own_updates = own_value_and_grad(
            devices.as_own(space.merge(perturbed, params), axes)
        )
        new_updates, value = devices.mean((own_updates, value), axes)
        info = Info(step.grad_norm, step.norm, value, step.alignment)
        if per_device:
            info = devices.mean(info, axes)

        if follow is not None:
            after = space.select(own_updates if per_device else new_updates)
            each = axes if per_device else ()
            seen = lambda like: _observation(like, step, info, grads, after, each)
            tracked = follow.merge(follow.observe(tracked, seen, refresh), whole)
        dtype = tree_math.accumulation_dtype(params)
        info = jax.tree.map(lambda x: jnp.asarray(x, dtype), info)
        new_state = SharpnessAwareState(optax.safe_increment(number), tracked, info)
        return tree_math.cast_like(new_updates, updates), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _observation(
    like: list[jax.Array],
    step: Perturbation,
    info: Info,
    grads: list[jax.Array],
    after: list[jax.Array],
    axes: Axes,
) -> Observation:
    """The change of the gradient, ⟨ε, v⟩ and ‖ε‖, averaged over the axes."""
    unit = _unit(info)
    change = tree_math.scale(unit, tree_math.add_scaled(after, -1, grads))
    # Sums accumulate in the dtypes of v, not of the gradients.
    change = tree_math.cast_like(change, like)
    assert step.projection is not None  # as there is a tracker
    projection, radius = unit * step.projection, unit * step.norm
    if axes:
        # Without the signs, different devices would cancel.
        sign = jnp.where(projection < 0, -1, 1).astype(unit.dtype)
        change, projection, radius = devices.mean(
            (tree_math.scale(sign, change), sign * projection, radius), axes
        )
    return change, projection, radius


def _unit(info: Info) -> jax.Array:
    """The scale of observed changes: 1, or 1/‖g‖ beyond 10^±9; 0 where ε = 0."""
    size = info.grad_norm
    is_far = (size < 1e-9) | (size > 1e9)
    unit = jnp.where(is_far, tree_math.safe_inverse(size), 1)
    return scalars.once(jnp.where(info.perturbation_norm > 0, unit, 0))[0]


def _check_state(state: Any, has_tracker: bool) -> None:
    if not isinstance(state, SharpnessAwareState):
        got = f"a {type(state).__name__}"
    elif (state.tracker is None) == has_tracker:
        got = f"one {'without' if has_tracker else 'with'} a tracker"
    else:
        return
    raise ValueError(
        f"opt_state must be the state of this transformation, got {got}: make it by "
        "tx.init(params) of the same chain. With a checkpoint of another link, keep "
        "the rest: (tx.init(params)[0], *old_state[1:])."
    )


def _mean_matvec(
    grad_fn: GradFn, params: PyTree, space: Subspace, axes: Axes, hvp_mode: HvpMode
) -> Matvec:
    """The Hessian-vector product of the subspace, averaged over devices."""

    def mean_product(vector: PyTree) -> PyTree:
        # Keeps a solver's loop from storing all activations of the gradient.
        at, v = jax.lax.optimization_barrier((params, vector))  # type: ignore[no-untyped-call]
        at, v = devices.as_own((at, v), axes)

        def grad_in_subspace(weights: list[jax.Array]) -> list[jax.Array]:
            return space.select(grad_fn(space.merge(weights, at)))

        own = hessian.matvec(grad_in_subspace, space.select(at), hvp_mode=hvp_mode)(v)
        # The derivative of a mean is wrong in some modes of `shard_map`.
        return devices.mean(own, axes)

    return mean_product
