"""What the last step did, read from the optimizer state of any chain."""

from typing import Any, NamedTuple

import jax

from eigensam_jax._update.update import SharpnessAwareState
from eigensam_jax.tree_math import PyTree


class StepInfo(NamedTuple):
    """What the last step did, as scalars; 0 before the first step.

    Of a state under `vmap` or `pmap` they have its axes. The last three are None for
    `sam` and `asam`.

    Attributes:
      grad_norm: ‖g‖ over the perturbed parameters.
      perturbation_norm: ‖ε‖.
      perturbed_value: L(w + ε), where the loss is known.
      alignment: |⟨ε,v⟩|/‖ε‖ with the tracked v, which may be far from the true one.
      eigenvalue: the tracker's estimate of λ.
      residual: its error, as the tracker's state says.
    """

    grad_norm: jax.Array
    perturbation_norm: jax.Array
    perturbed_value: jax.Array
    alignment: jax.Array | None
    eigenvalue: jax.Array | None
    residual: jax.Array | None


def info(opt_state: PyTree) -> StepInfo:
    """What the last step of `sam`, `asam` or `eigen_sam` did.

    The state of the link is found by its type, inside any chain and wrapper. What the
    parameters are called does not matter, as it does for `optax.tree.get`.

    Args:
      opt_state: the state of the whole chain, or a tree that contains it: the
        `opt_state` of `linen.TrainState`, or of `nnx.Optimizer`, of which the plain
        arrays come out.

    Returns:
      A `StepInfo` of scalars. Outside of `jit`, `float` makes numbers of them.

    Raises:
      ValueError: if there is no such link in `opt_state`, or more than one.

    Example:
      >>> import eigensam_jax, jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(eigensam_jax.sam(rho=0.1), optax.sgd(0.5))
      >>> loss = lambda w: jnp.sum(w**2)
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
            "as tx.init(params) makes it and tx.update returns it; of several links, "
            "the state of one."
        )
    (state,) = found.values()
    tracked = (getattr(state.tracker, x, None) for x in ("eigenvalue", "residual"))
    values: list[Any] = [
        # `nnx.Optimizer` makes variables of arrays: the array alone.
        None if x is None else jax.tree.leaves(x)[0]
        for x in (*state.info, *tracked)
    ]
    return StepInfo(*values)
