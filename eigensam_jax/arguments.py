"""The checks of what users hand in, and the errors that say what to do instead."""

from collections.abc import Callable
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from eigensam_jax import devices
from eigensam_jax.devices import Axes, AxisName
from eigensam_jax.hessian import GradFn, ValueFn
from eigensam_jax.tree_math import PyTree

_CALL = "tx.update(grads, opt_state, params, value_fn=lambda p: loss(p, batch))"
_GRAD_REMEDY = "Give the gradient alone: jax.grad(loss), not jax.value_and_grad(loss)."


def check_positive_int(name: str, value: int, meaning: str) -> None:
    """Refuses a count that is not an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(
            f"{name} must be an integer of at least 1, got {value!r}: the number of "
            f"{meaning}."
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuses a name that is not among the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}.")


def check_scalar(name: str, value: Any, *, schedule: bool) -> None:
    """Refuses a Python number that is negative or not finite, and what is no scalar.

    Traced values, and schedules where they are allowed, pass: they are not known here.
    """
    if schedule and callable(value):
        return
    if isinstance(value, jax.core.Tracer) and value.ndim == 0:
        return
    is_array = isinstance(value, jax.Array | np.ndarray) and value.ndim == 0
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not (is_array or is_number) or not 0 <= float(value) < float("inf"):
        others = ", a scalar array or a schedule" if schedule else " or a scalar array"
        raise ValueError(
            f"{name} must be a finite number of at least 0{others}, got {value!r}."
        )


def check_fraction(name: str, value: Any) -> None:
    """Refuses what is not a number of at least 0 and less than 1."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 0 <= value < 1:
        raise ValueError(
            f"{name} must be a number of at least 0 and less than 1, got {value!r}."
        )


def check_floating(name: str, dtype: DTypeLike | None) -> None:
    """Refuses a dtype that is given and is not a floating-point one."""
    try:
        is_floating = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        is_floating = False
    if not is_floating:
        raise ValueError(
            f"{name} must be a floating-point dtype, for example jnp.bfloat16, or None,"
            f" got {dtype!r}."
        )


def check_axis_name(axis_name: AxisName, per_device: bool) -> None:
    """Refuses names of axes that are none, and `per_device` where there are none."""
    names = devices.as_tuple(axis_name)
    is_name = all(isinstance(name, str) for name in names)
    if axis_name == () or not is_name or len({*names}) < len(names):
        raise ValueError(
            f"axis_name must be a string, a tuple of strings or None, got {axis_name!r}"
            ": the axes of pmap, shard_map or vmap over which batches differ."
        )
    if per_device and not names:
        raise ValueError(
            "per_device=True needs axis_name, got None: name the axis over which each "
            "device is to perturb by itself. On one device, jax.vmap with an axis_name "
            "over groups of the batch does it."
        )


def check_varying(updates: PyTree, axes: Axes, per_device: bool) -> None:
    """Refuses gradients that are known to be a mean or not to be one, as is not meant.

    Only `shard_map` with check_vma=True keeps track of that.
    """
    if per_device and (where := devices.replicated(updates, axes)):
        raise ValueError(
            f"updates are the same on all devices of the axes {where}, and "
            "per_device=True wants each device's own: take the gradient with respect "
            f"to jax.lax.pcast(params, {where}, to='varying'), without a mean. (With "
            "respect to replicated params it is the sum over devices.)"
        )
    if not per_device and (where := devices.differing(updates, axes)):
        raise ValueError(
            f"updates differ between devices of the axes {where}: hand in "
            f"jax.lax.pmean(grads, {where}), or give per_device=True for a "
            "perturbation by each device. (Parameters that are sharded by hand are not "
            "supported: leave them to jit.)"
        )


def check_update(
    params: PyTree | None,
    value_fn: ValueFn | None,
    grad_fn: GradFn | None,
    curvature_fn: ValueFn | None,
    refresh: bool | None,
) -> None:
    """Refuses a call of `update` that lacks what a perturbed gradient needs."""
    if params is None:
        raise ValueError(
            f"update needs params, got None: the loss is perturbed there. Call {_CALL}"
        )
    if value_fn is None and grad_fn is None:
        raise ValueError(
            "update needs value_fn or grad_fn, got neither: the gradient is taken "
            f"again at the perturbed parameters. Call {_CALL} (If you did, a wrapper "
            "dropped it: flax's TrainState.apply_gradients does, and "
            "eigensam_jax.linen.TrainState's does not.)"
        )
    functions = {"value_fn": value_fn, "grad_fn": grad_fn, "curvature_fn": curvature_fn}
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise ValueError(
                f"{name} must be a function of the parameters, got {function!r}. "
                f"Call {_CALL}"
            )
    if refresh is not None and not isinstance(refresh, bool | np.bool_):
        raise ValueError(
            f"refresh must be True, False or None, got {refresh!r}: it is fixed at "
            "trace time. Make it a static argument of the jitted step, or leave it out."
        )


def check_params(params: PyTree) -> None:
    """Refuses parameters that are not real floating-point arrays, or have holes."""
    is_hole = lambda x: isinstance(x, optax.MaskedNode)
    if any(map(is_hole, jax.tree.leaves(params, is_leaf=is_hole))):
        raise ValueError(
            "params have holes (optax.MaskedNode): optax.masked or optax.partition is "
            "around this transformation, and the loss needs all parameters. Give it "
            "mask=... instead, and put the wrapper around what follows it."
        )
    for path, leaf in jax.tree.leaves_with_path(params):
        is_number = isinstance(leaf, Real) and not isinstance(leaf, bool)
        dtype = getattr(leaf, "dtype", jnp.result_type(leaf) if is_number else None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            remedy = (
                "keep other leaves out of the parameters, by eqx.partition(model, "
                "eqx.is_inexact_array) of an equinox module, by wrt=nnx.Param of a "
                "Flax nnx model."
            )
            if dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating):
                remedy = (
                    "split complex ones into real and imaginary parts, and join them "
                    "by jax.lax.complex in the loss. (optax.contrib."
                    "split_real_and_imaginary does not hand on value_fn.)"
                )
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} must be real floating-point, got "
                f"{leaf if dtype is None else dtype}: {remedy}"
            )


def scalar_valued(name: str, value_fn: ValueFn, axes: Axes = ()) -> ValueFn:
    """`value_fn`, with a clear error where it returns anything but a scalar.

    And where it is known to be a mean over devices already, whose gradients would be as
    many times too small.
    """

    def checked(params: PyTree) -> jax.Array:
        value: jax.Array = _called(name, value_fn, params)
        if value is None:
            raise ValueError(
                f"{name} must return a scalar, got None: let it return the loss."
            )
        shapes = [jnp.shape(x) for x in jax.tree.leaves(value)]
        if not jax.tree_util.all_leaves([value]):
            raise ValueError(
                f"{name} must return a scalar, got a {type(value).__name__} with the "
                f"shapes {shapes}: return the loss alone. Of a loss with auxiliary "
                f"output it is the first part, {name}=lambda p: loss(p, batch)[0]."
            )
        if shapes != [()]:
            raise ValueError(
                f"{name} must return a scalar, got an array of the shape {shapes[0]}: "
                f"average the losses, {name}=lambda p: loss(p, batch).mean()."
            )
        if where := devices.replicated(value, axes):
            raise ValueError(
                f"{name} is the same on all devices of the axes {where}, so it averages"
                " over them itself: return the loss of each device's own batch, whose "
                "gradients are averaged here, or leave axis_name out."
            )
        return value

    return checked


def _called(name: str, function: Callable[[PyTree], Any], params: PyTree) -> Any:
    """`function(params)`; what it raises gets a note on how it was called."""
    try:
        return function(params)
    except Exception as error:
        example = "jax.grad(loss)(p, batch)" if name == "grad_fn" else "loss(p, batch)"
        error.add_note(
            f"{name} was called with the parameters alone. What else it needs, such as "
            f"the batch, goes into a closure, {name}=lambda p: {example}. If "
            "the parameters have another structure than yours, a wrapper that changes "
            "it, such as optax.flatten, is around this transformation: put it around "
            "what follows it in the chain. Of a Flax nnx model, make value_fn by "
            "eigensam_jax.nnx.value_fn, with the wrt of the optimizer; nnx.Rngs that "
            "the loss draws from are an argument there. Of an equinox module, join "
            f"the parameters with the rest of it, {name}=lambda p: "
            f"{example.replace('p,', 'eqx.combine(p, static),')}."
        )
        raise


def like_params(name: str, tree: PyTree, params: PyTree, remedy: str) -> PyTree:
    """The leaves of `tree` in the structure of `params`, if names and shapes agree.

    Trees that differ in their containers alone (a dict and a frozen dict) are alike.
    """

    def shapes(x: PyTree) -> dict[str, tuple[int, ...]]:
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): getattr(
                leaf, "shape", ()
            )
            for path, leaf in jax.tree.leaves_with_path(x)
        }

    got, expected = shapes(tree), shapes(params)
    if list(got.items()) != list(expected.items()):
        raise ValueError(
            f"{name} must be a tree like params, with leaves of the shapes {expected}, "
            f"got {got}. {remedy}"
        )
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(tree))


def gradient_function(
    value_fn: ValueFn | None, grad_fn: GradFn | None, axes: Axes = ()
) -> Callable[[PyTree], tuple[jax.Array, PyTree]]:
    """`params -> (value, gradient)`; the value is NaN where `grad_fn` is given."""
    if grad_fn is not None:
        return lambda params: (
            jnp.array(jnp.nan),
            like_params(
                "grad_fn(params)",
                _called("grad_fn", grad_fn, params),
                params,
                _GRAD_REMEDY,
            ),
        )
    assert value_fn is not None  # check_update has seen to it
    return jax.value_and_grad(scalar_valued("value_fn", value_fn, axes))
