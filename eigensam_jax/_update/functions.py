"""The user's losses and gradient functions, checked while they are traced."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from eigensam_jax import tree_math
from eigensam_jax._update import arguments, devices
from eigensam_jax._update.devices import Axes
from eigensam_jax.tree_math import GradFn, PyTree, ValueFn

_GRAD_REMEDY = "Return the gradient, or (value, gradient) as jax.value_and_grad does."


def scalar_valued(
    name: str, value_fn: Callable[..., Any], axes: Axes = (), *batch: PyTree
) -> ValueFn:
    """`value_fn`, with an error unless it returns the scalar of this device's batch.

    With `batch` it is called with that too.
    """
    given = "p, batch" if batch else "p"

    def checked(params: PyTree) -> jax.Array:
        value: Any = _called(name, value_fn, params, *batch)
        shapes = [jnp.shape(x) for x in jax.tree.leaves(value)]
        is_array = jax.tree_util.all_leaves([value])
        if not is_array or shapes != [()]:
            if value is None:
                got, remedy = "None", "let it return the loss"
            elif is_array:
                got = f"an array of the shape {shapes[0]}"
                mean = f"{name}=lambda {given}: loss(p, batch).mean()"
                remedy = f"average the losses, {mean}"
            else:
                got = f"a {type(value).__name__} with the shapes {shapes}"
                remedy = (
                    "return the loss alone. If the loss has auxiliary output, take the "
                    f"first part, {name}=lambda {given}: loss(p, batch)[0]"
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


def differentiable(
    name: str, value_fn: Callable[..., Any], axes: Axes = (), *batch: PyTree
) -> ValueFn:
    """As `scalar_valued`, with errors also for gradients wrong by their structure.

    They are zero, or sums over devices. Seen while tracing: it adds nothing to the
    program.
    """
    value_at = scalar_valued(name, value_fn, axes, *batch)
    given = "p, batch" if batch else "p"

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
                    f"{name}=lambda {given}: loss(p, batch) and not "
                    "loss(params, batch)."
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


def _called(
    name: str, function: Callable[..., Any], params: PyTree, *batch: PyTree
) -> Any:
    """`function(params, *batch)`; errors get a note on how it was called."""
    try:
        return function(params, *batch)
    except Exception as error:
        if batch:
            error.add_note(f"{name} was called with the parameters and a batch.")
            raise
        example = "jax.grad(loss)(p, batch)" if name == "grad_fn" else "loss(p, batch)"
        error.add_note(
            f"{name} was called with one argument alone. Put others, such as the batch,"
            f" into a closure, {name}=lambda p: {example}. If the "
            "parameters have another structure than yours, a wrapper such as "
            "optax.flatten is around this transformation: put it around the links "
            "after this one. With a Flax nnx model, make value_fn by "
            "eigensam_jax.nnx.value_fn, with the wrt of the optimizer and the nnx.Rngs "
            "of the loss as an argument. With an equinox module, combine it again, "
            f"{name}=lambda p: "
            f"{example.replace('p,', 'eqx.combine(p, static),')}."
        )
        raise


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
        if is_pair and arguments.shapes(result) != arguments.shapes(params):
            first, rest = result
            if arguments.shapes(first) == [("", ())]:
                value, result = jnp.asarray(first), rest
                _check_mean("grad_fn", value, params, axes)
        return value, arguments.like_params(
            "grad_fn(params)", result, params, _GRAD_REMEDY
        )

    return value_and_gradient
