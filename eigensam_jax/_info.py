"""A report of the last step, from the optimizer state of any chain."""

from typing import Any, NamedTuple

import jax

from eigensam_jax._update.update import SharpnessAwareState
from eigensam_jax.tree_math import PyTree


class StepInfo(NamedTuple):
    """What the last step did, as scalars; 0 before the first step.

    The last three are None for `sam` and `asam`. Under `vmap` or `pmap` each has the
    state's axes.

    Attributes:
      grad_norm: ‖g‖ over the perturbed parameters.
      perturbation_norm: ‖ε‖.
      perturbed_value: L(w + ε); 0 if `grad_fn` returns gradients alone.
      alignment: |⟨ε,v⟩|/‖ε‖ with the tracked v, which may be far from the true one.
      eigenvalue: the tracker's estimate of λ.
      residual: the tracker's estimate of its error.
    """

    grad_norm: jax.Array
    perturbation_norm: jax.Array
    perturbed_value: jax.Array
    alignment: jax.Array | None
    eigenvalue: jax.Array | None
    residual: jax.Array | None


def info(opt_state: PyTree) -> StepInfo:
    """What the last step of `sam`, `asam` or `eigen_sam` did.

    Args:
      opt_state: the state of any chain or wrapper, or a tree that contains it: the link
        is found by its type. That of `linen.TrainState` and of `nnx.Optimizer` will do.

    Raises:
      ValueError: if `opt_state` contains no such link, or more than one.

    Example:
      >>> import eigensam_jax, jax, jax.numpy as jnp
      >>> tx, loss = eigensam_jax.sam(rho=0.1), lambda w: jnp.sum(w**2)
      >>> w = jnp.array([3.0, 4.0])
      >>> _, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
      >>> print(f"{eigensam_jax.info(state).grad_norm:.1f}")
      10.0
    """

    def is_state(x: Any) -> bool:
        return isinstance(x, SharpnessAwareState)

    nodes = jax.tree.leaves_with_path(opt_state, is_leaf=is_state)
    found = {jax.tree_util.keystr(path): x for path, x in nodes if is_state(x)}
    if len(found) != 1:
        raise ValueError(
            "opt_state must contain the state of one sam, asam or eigen_sam, got "
            f"{len(found)}{' at ' if found else ''}{', '.join(found)}. Give the state "
            "that tx.init or tx.update returned; with several links, the state of one."
        )
    (state,) = found.values()
    tracked = (getattr(state.tracker, x, None) for x in ("eigenvalue", "residual"))
    values: list[Any] = [
        # `nnx.Optimizer` wraps arrays in variables: take the array.
        None if x is None else jax.tree.leaves(x)[0]
        for x in (*state.info, *tracked)
    ]
    return StepInfo(*values)
