"""Checks of users' arguments, with errors that name the remedy."""

from collections.abc import Sequence
from functools import partial
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from eigensam_jax._update import devices
from eigensam_jax._update.devices import Axes, AxisName
from eigensam_jax.tree_math import GradFn, PyTree, ValueFn

_CALL = "tx.update(grads, opt_state, params, value_fn=lambda p: loss(p, batch))"
_LONGEST = 300  # of a value in an error


def require(valid: bool, name: str, value: Any, what: str, remedy: str = "") -> None:
    if not valid:
        shown = repr(value)
        if len(shown) > _LONGEST:
            shown = f"a {type(value).__name__}"
        raise ValueError(f"{name} must be {what}, got {shown}{remedy}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_positive_int(name: str, value: Any, meaning: str) -> None:
    valid = isinstance(value, int | np.integer) and _is_number(value) and value >= 1
    remedy = f": the number of {meaning}"
    if isinstance(value, jax.Array):  # as optax.inject_hyperparams makes of an int
        remedy += f"; name {name} in static_args of optax.inject_hyperparams"
    require(bool(valid), name, value, "an integer of at least 1", remedy)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, name, value, f"one of {choices}")


def check_scalar(name: str, value: Any, *, schedule: bool) -> None:
    """Refuses negative or non-finite numbers, and non-scalars; traced values pass."""
    is_traced = isinstance(value, jax.core.Tracer) and value.ndim == 0
    if is_traced or (schedule and callable(value)):
        return
    is_array = isinstance(value, jax.Array | np.ndarray) and value.ndim == 0
    is_array = is_array and value.dtype != bool
    valid = (is_array or _is_number(value)) and 0 <= float(value) < float("inf")
    others = ", a scalar array or a schedule" if schedule else " or a scalar array"
    require(valid, name, value, f"a finite number of at least 0{others}")


def check_fraction(name: str, value: Any) -> None:
    valid = _is_number(value) and 0 <= float(value) < 1
    require(valid, name, value, "a number of at least 0 and less than 1")


def check_floating(name: str, dtype: DTypeLike | None) -> None:
    try:
        known = jnp.dtype(jnp.float32 if dtype is None else dtype)
        valid = jnp.issubdtype(known, jnp.floating) and known.itemsize >= 2
    except TypeError:
        valid = False
    remedy = ": give jnp.bfloat16 for the least memory, or None"
    require(valid, name, dtype, "a floating-point dtype of 16 bits or more", remedy)
    config: Any = jax.config
    is_allowed = config.jax_explicit_x64_dtypes.name == "ALLOW"
    valid = is_allowed or jax.dtypes.canonicalize_dtype(known) == known
    remedy = ": set jax_enable_x64, or give None"
    require(valid, name, dtype, "a dtype that JAX is set to use", remedy)


def check_axis_name(axis_name: AxisName, per_device: bool) -> None:
    names = devices.as_tuple(axis_name)
    is_name = all(isinstance(name, str) for name in names)
    valid = axis_name != () and is_name and len({*names}) == len(names)
    remedy = ": the axes of pmap, shard_map or vmap over which batches differ"
    what = "a string, a tuple of strings or None"
    require(valid, "axis_name", axis_name, what, remedy)
    if per_device and not names:
        raise ValueError(
            "per_device=True needs axis_name, got None: name the axis of the devices. "
            "On one device, use jax.vmap with an axis_name over groups of the batch."
        )


def check_varying(updates: PyTree, axes: Axes, per_device: bool) -> None:
    """Refuses means with `per_device`, and gradients that differ without it."""
    if per_device and (where := devices.replicated(updates, axes)):
        raise ValueError(
            f"updates are the same on all devices of the axes {where}, but "
            "per_device=True needs each device's own: take the gradient with respect "
            f"to jax.lax.pcast(params, {where}, to='varying'), without a mean. (With "
            "respect to replicated params it is the sum over devices.)"
        )
    if not per_device and (where := devices.differing(updates, axes)):
        raise ValueError(
            f"updates differ between devices of the axes {where}: give "
            f"jax.lax.pmean(grads, {where}), or per_device=True for one perturbation "
            "per device. (Manually sharded parameters are not supported: leave them to "
            "jit.)"
        )


def check_update(
    params: PyTree | None,
    value_fn: ValueFn | None,
    grad_fn: GradFn | None,
    curvature_fn: ValueFn | None,
    refresh: bool | None,
) -> None:
    if params is None:
        raise ValueError(
            f"update needs params, got None: it perturbs them. Call {_CALL}"
        )
    if value_fn is None and grad_fn is None:
        raise ValueError(
            "update needs value_fn or grad_fn, got neither: the gradient is taken "
            f"again at the perturbed parameters. Call {_CALL} (If you did, a wrapper "
            "dropped it, as flax's TrainState.apply_gradients does: use "
            "eigensam_jax.linen.TrainState.)"
        )
    functions = {"value_fn": value_fn, "grad_fn": grad_fn, "curvature_fn": curvature_fn}
    for name, function in functions.items():
        valid, what = function is None or callable(function), "a function of params"
        require(valid, name, function, what, f": call {_CALL}")
    check_static("refresh", refresh)


def check_static(name: str, value: bool | None) -> None:
    """Refuses a choice of the branch that is not known at trace time."""
    valid = isinstance(value, bool | np.bool_ | None)
    remedy = ": make it a static argument of the jitted step, or leave it out"
    require(valid, name, value, "True, False or None", remedy)


def check_params(params: PyTree, selected: Sequence[bool] | None = None) -> None:
    """Refuses holes, non-real leaves, and `selected` ones narrower than 16 bits."""
    is_hole = lambda x: isinstance(x, optax.MaskedNode)
    if any(map(is_hole, jax.tree.leaves(params, is_leaf=is_hole))):
        raise ValueError(
            "params have holes (optax.MaskedNode): optax.masked or optax.partition is "
            "around this transformation, but the loss needs all parameters. Give "
            "mask=... instead, and put the wrapper around the links after this one."
        )
    leaves = jax.tree.leaves_with_path(params)
    perturbed = (True,) * len(leaves) if selected is None else selected
    for (path, leaf), chosen in zip(leaves, perturbed, strict=True):
        known = jnp.result_type(leaf) if _is_number(leaf) else None
        dtype = getattr(leaf, "dtype", known)
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            remedy = (
                "keep other leaves out of the parameters, with eqx.partition(model, "
                "eqx.is_inexact_array) for an equinox module, or wrt=nnx.Param for a "
                "Flax nnx model"
            )
        elif not jnp.issubdtype(dtype, jnp.floating):
            remedy = (
                "split complex ones into real and imaginary parts, and join them by "
                "jax.lax.complex in the loss (optax.contrib.split_real_and_imaginary "
                "does not pass value_fn on)"
            )
        elif chosen and dtype.itemsize < 2:
            remedy = (
                "it is too coarse to perturb. Keep the parameter in bfloat16 or wider "
                "and cast it in the loss, or exclude it by a mask"
            )
        else:
            continue
        raise ValueError(
            f"params{jax.tree_util.keystr(path)} must be real floating-point of 16 "
            f"bits or more, got {leaf if dtype is None else dtype}: {remedy}."
        )


def like_params(name: str, tree: PyTree, params: PyTree, remedy: str) -> PyTree:
    """`tree` in the containers of `params`, if names and shapes agree."""
    got, expected = shapes(tree), shapes(params)
    if got != expected:
        raise ValueError(
            f"{name} must be a tree like params, with leaves of the shapes "
            f"{dict(expected)}, got {dict(got)}. {remedy}"
        )
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(tree))


def shapes(tree: PyTree) -> list[tuple[str, tuple[int, ...]]]:
    name = partial(jax.tree_util.keystr, simple=True, separator="/")
    leaves = jax.tree.leaves_with_path(tree)
    return [(name(path), getattr(leaf, "shape", ())) for path, leaf in leaves]
