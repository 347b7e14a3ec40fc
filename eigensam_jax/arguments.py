"""The checks of what users hand in, and the errors that say what to do instead."""

from collections.abc import Callable
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eigensam_jax.hessian import GradFn, ValueFn
from eigensam_jax.tree_math import PyTree

_CALL = "tx.update(grads, opt_state, params, value_fn=lambda p: loss(p, batch))"


def check_positive_int(name: str, value: int, meaning: str) -> None:
    """Refuses a count that is not an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(
            f"{name} must be an integer of at least 1, got {value!r}: the number of "
            f"{meaning}."
        )


def check_scalar(name: str, value: Any) -> None:
    """Refuses a Python number that is negative or not finite, and what is no scalar.

    Schedules and arrays, traced ones too, pass: their values are not known here.
    """
    if callable(value) or (isinstance(value, jax.Array) and value.ndim == 0):
        return
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 0 <= value < float("inf"):
        raise ValueError(
            f"{name} must be a finite number of at least 0, a scalar array or a "
            f"schedule of the step count, got {value!r}."
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
            f"again at the perturbed parameters. Call {_CALL}"
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
    """Refuses parameters that are not real floating-point arrays."""
    for path, leaf in jax.tree.leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} must be real floating-point, got "
                f"{jnp.result_type(leaf)}: keep other leaves out of the parameters, "
                "and split complex ones into real and imaginary parts."
            )


def scalar_valued(name: str, value_fn: ValueFn) -> ValueFn:
    """`value_fn`, with a clear error where it returns anything but a scalar."""

    def checked(params: PyTree) -> jax.Array:
        value = value_fn(params)
        if [jnp.shape(x) for x in jax.tree.leaves(value)] != [()]:
            raise ValueError(
                f"{name} must return a scalar, got {jax.tree.map(jnp.shape, value)} "
                f"(shapes): average the losses, and drop what comes beside them, as in "
                f"{name}=lambda p: loss(p)[0]."
            )
        return value

    return checked


def like_params(name: str, tree: PyTree, params: PyTree) -> PyTree:
    """The leaves of `tree` in the structure of `params`, if their shapes agree.

    Trees that differ in their containers alone (a frozen dict, an nnx state with and
    without its variables) count as alike.
    """
    leaves = jax.tree.leaves(tree)
    shapes = [jnp.shape(x) for x in leaves]
    expected = [jnp.shape(x) for x in jax.tree.leaves(params)]
    if shapes != expected:
        raise ValueError(
            f"{name} must be a tree like params, with leaves of the shapes {expected}, "
            f"got {shapes}. A gradient comes without the loss beside it: "
            "grad_fn=jax.grad(loss), not jax.value_and_grad(loss)."
        )
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def gradient_function(
    value_fn: ValueFn | None, grad_fn: GradFn | None
) -> Callable[[PyTree], tuple[jax.Array, PyTree]]:
    """`params -> (value, gradient)`; the value is NaN where `grad_fn` is given."""
    if grad_fn is not None:
        return lambda params: (
            jnp.array(jnp.nan),
            like_params("grad_fn(params)", grad_fn(params), params),
        )
    assert value_fn is not None  # check_update has seen to it
    return jax.value_and_grad(scalar_valued("value_fn", value_fn))
