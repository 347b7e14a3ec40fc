"""Checks of users' arguments, with errors that name the remedy."""

from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from eigensam_jax import tree_math
from eigensam_jax._update import devices
from eigensam_jax._update.devices import Axes, AxisName
from eigensam_jax.hessian import GradFn, ValueFn
from eigensam_jax.tree_math import PyTree

_CALL = "tx.update(grads, opt_state, params, value_fn=lambda p: loss(p, batch))"
_LONGEST = 300  # of a value in an error
_GRAD_REMEDY = "Return the gradient, or (value, gradient) as jax.value_and_grad does."


def require(valid: bool, name: str, value: Any, what: str, remedy: str = "") -> None:
    if not valid:
        shown = repr(value)
        if len(shown) > _LONGEST:
            shown = f"a {type(value).__name__}"
        raise ValueError(f"{name} must be {what}, got {shown}{remedy}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_positive_int(name: str, value: int, meaning: str) -> None:
    valid = isinstance(value, int | np.integer) and _is_number(value) and value >= 1
    remedy = f": the number of {meaning}"
    require(valid, name, value, "an integer of at least 1", remedy)


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
    valid = jax.dtypes.canonicalize_dtype(known) == known
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


def scalar_valued(name: str, value_fn: ValueFn, axes: Axes = ()) -> ValueFn:
    """`value_fn`, with an error unless it returns the scalar of this device's batch."""

    def checked(params: PyTree) -> jax.Array:
        value: Any = _called(name, value_fn, params)
        shapes = [jnp.shape(x) for x in jax.tree.leaves(value)]
        is_array = jax.tree_util.all_leaves([value])
        if not is_array or shapes != [()]:
            if value is None:
                got, remedy = "None", "let it return the loss"
            elif is_array:
                got = f"an array of the shape {shapes[0]}"
                remedy = f"average the losses, {name}=lambda p: loss(p, batch).mean()"
            else:
                got = f"a {type(value).__name__} with the shapes {shapes}"
                remedy = (
                    "return the loss alone. If the loss has auxiliary output, take the "
                    f"first part, {name}=lambda p: loss(p, batch)[0]"
                )
            raise ValueError(f"{name} must return a scalar, got {got}: {remedy}.")
        if where := devices.replicated(value, axes):
            raise ValueError(
                f"{name} is the same on all devices of the axes {where}, so it averages"
                " over them itself: return the loss of each device's own batch, as its "
                "gradients are averaged here, or omit axis_name."
            )
        scalar: jax.Array = value
        return scalar

    return checked


def differentiable(name: str, value_fn: ValueFn, axes: Axes = ()) -> ValueFn:
    """As `scalar_valued`, with errors also for gradients wrong by their structure.

    They are zero, or sums over devices. Seen while tracing: it adds nothing to the
    program.
    """
    value_at = scalar_valued(name, value_fn, axes)

    @jax.custom_jvp
    def same(value: jax.Array, leaves: list[jax.Array]) -> jax.Array:
        return value

    @partial(same.defjvp, symbolic_zeros=True)
    def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        change, of_leaves = tangents
        if isinstance(change, SymbolicZero):
            # Else it may depend on those leaves that are not differentiated.
            if not any(isinstance(x, SymbolicZero) for x in of_leaves):
                raise ValueError(
                    f"{name} ignores its argument, so its gradient is zero: use it, "
                    f"{name}=lambda p: loss(p, batch) and not loss(params, batch)."
                )
            change = jnp.zeros_like(primals[0])
        return primals[0], change

    def checked(params: PyTree) -> jax.Array:
        value = value_at(params)
        _check_mean(name, value, params, axes)
        return same(value, jax.tree.leaves(params))

    return checked


def _check_mean(name: str, value: jax.Array, params: PyTree, axes: Axes) -> None:
    if where := devices.summed(value, params, axes):
        raise ValueError(
            f"the value of {name} differs between devices of the axes {where} and "
            "params do not, so its gradient is the sum over them: make it that of the "
            f"mean, lambda p: jax.lax.pmean(loss(p, batch), {where})."
        )


def _called(name: str, function: Callable[[PyTree], Any], params: PyTree) -> Any:
    """`function(params)`; errors get a note on how it was called."""
    try:
        return function(params)
    except Exception as error:
        example = "jax.grad(loss)(p, batch)" if name == "grad_fn" else "loss(p, batch)"
        error.add_note(
            f"{name} was called with the parameters alone. Put other arguments, such "
            f"as the batch, into a closure, {name}=lambda p: {example}. If the "
            "parameters have another structure than yours, a wrapper such as "
            "optax.flatten is around this transformation: put it around the links "
            "after this one. With a Flax nnx model, make value_fn by "
            "eigensam_jax.nnx.value_fn, with the wrt of the optimizer and the nnx.Rngs "
            "of the loss as an argument. With an equinox module, combine it again, "
            f"{name}=lambda p: "
            f"{example.replace('p,', 'eqx.combine(p, static),')}."
        )
        raise


def like_params(name: str, tree: PyTree, params: PyTree, remedy: str) -> PyTree:
    """`tree` in the containers of `params`, if names and shapes agree."""
    got, expected = _shapes(tree), _shapes(params)
    if got != expected:
        raise ValueError(
            f"{name} must be a tree like params, with leaves of the shapes "
            f"{dict(expected)}, got {dict(got)}. {remedy}"
        )
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(tree))


def _shapes(tree: PyTree) -> list[tuple[str, tuple[int, ...]]]:
    name = partial(jax.tree_util.keystr, simple=True, separator="/")
    leaves = jax.tree.leaves_with_path(tree)
    return [(name(path), getattr(leaf, "shape", ())) for path, leaf in leaves]


def gradient_function(
    value_fn: ValueFn | None, grad_fn: GradFn | None, axes: Axes = ()
) -> Callable[[PyTree], tuple[jax.Array, PyTree]]:
    """`params -> (value, gradient)`; the value is 0 where `grad_fn` gives none."""
    if grad_fn is None:
        assert value_fn is not None  # by check_update
        return jax.value_and_grad(differentiable("value_fn", value_fn, axes))

    def value_and_gradient(params: PyTree) -> tuple[jax.Array, PyTree]:
        value = jnp.zeros((), tree_math.accumulation_dtype(params))
        result = _called("grad_fn", grad_fn, params)
        # A result unlike params must be such a pair. No tree is both.
        is_pair = isinstance(result, tuple | list) and len(result) == 2
        if is_pair and _shapes(result) != _shapes(params):
            first, rest = result
            if _shapes(first) == [("", ())]:
                value, result = jnp.asarray(first), rest
                _check_mean("grad_fn", value, params, axes)
        return value, like_params("grad_fn(params)", result, params, _GRAD_REMEDY)

    return value_and_gradient
