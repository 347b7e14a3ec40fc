"""Any of the links on every few steps only, with or without LookSAM in between."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from eigensam_jax import tree_math
from eigensam_jax._update import arguments, scalars
from eigensam_jax._update.update import SharpnessAwareState
from eigensam_jax.tree_math import PyTree

# Below this multiple of the dtype's precision, the part of a gradient orthogonal to
# another one counts as rounding error. A heuristic.
_ROUNDING = 4


class PeriodicState(NamedTuple):
    """State of `periodic`.

    Attributes:
      num_steps: number of steps so far, perturbed or not, int32.
      link: the link's `SharpnessAwareState` after the last perturbed step.
      orthogonal: q, of norm 1 or 0, like the parameters in their dtypes; None if
        `reuse` is 0 or `interval` is 1.
    """

    num_steps: jax.Array
    link: SharpnessAwareState
    orthogonal: PyTree


def periodic(
    link: optax.GradientTransformationExtraArgs,
    interval: int = 5,
    reuse: ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """A link on every `interval`-th step only: 1 + 1/interval gradients a step.

    Step 0 and every `interval`-th step after it are those of `link`. The others compute
    no second gradient: they take the plain gradient g or, with `reuse`,
    g + reuse·‖g‖·q (LookSAM). Put `periodic` first in the chain, in place of `link`.

    q is kept from the last perturbed step. It is the direction of the part of that
    step's perturbed gradient g′ orthogonal to its plain gradient g₀:

        q = (g′ − ⟨g′,u⟩u)/‖g′ − ⟨g′,u⟩u‖,   u = g₀/‖g₀‖.

    Norms and inner products run over all parameters, also if `link` has a mask. q is 0
    if that part is rounding error by the dtypes of the gradients, so that in bfloat16
    it must be 3% of g′. A zero or non-finite gradient leaves q unchanged, and q is not
    added to one. Memory, with `reuse`: q, and g₀ during a perturbed step. Under
    `jax.vmap` over a state both kinds of steps are computed each time.

    Args:
      link: what `sam`, `asam` or `eigen_sam` returns. Its schedules and its tracker's
        intervals count perturbed steps alone: with interval 5, a schedule of all steps
        is `lambda n: schedule(5 * n)`.
      interval: one step in so many is perturbed, at least 1, which is `link` bit for
        bit.
      reuse: the weight of q, at least 0; 0.3 in our experiments. With the number 0 the
        other steps are as by `optax.conditionally_transform`, and the state has no q.
        q has length 1 at any ρ: with 0.3 the other steps turn by up to 17° even where
        ρ is tiny.

    Returns:
      An `optax.GradientTransformationExtraArgs` with a `PeriodicState`; `info` reports
      the last perturbed step. `update` takes the arguments of `link`'s and `perturb`, a
      Python bool that fixes at trace time whether the step is perturbed, so that the
      program has no branch. Give it `step % interval == 0` as a static argument for
      networks with convolutions on a CPU, which XLA runs ten times slower in a branch.

    Raises:
      ValueError: for an invalid `link`, `interval` or `reuse`; in `update`, as `link`.

    Example:
      >>> import eigensam_jax, jax, jax.numpy as jnp, optax
      >>> tx = eigensam_jax.periodic(eigensam_jax.sam(rho=1.0), interval=2)
      >>> w, loss = jnp.array([1.0, 0.0]), lambda w: w[0] ** 2 + w[0] * w[1] ** 2
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     updates, state = tx.update(jax.grad(loss)(w), state, w, value_fn=loss)
      >>> int(state.num_steps), int(state.link.num_updates)  # one perturbed
      (2, 1)

    References:
      Liu, Mai, Chen, Hsieh, You, "Towards Efficient and Scalable Sharpness-Aware
      Minimization", CVPR 2022 (LookSAM).
    """
    valid = isinstance(link, optax.GradientTransformationExtraArgs)
    what = "what sam, asam or eigen_sam returns"
    arguments.require(valid, "link", link, what)
    arguments.check_positive_int("interval", interval, "steps between perturbations")
    arguments.check_scalar("reuse", reuse, schedule=False)
    is_known = not isinstance(reuse, jax.core.Tracer)
    reuses = interval > 1 and not (is_known and np.asarray(reuse) == 0)

    def init_fn(params: PyTree) -> PeriodicState:
        inner = link.init(params)
        remedy = ": put the other links of the chain after periodic(…)"
        valid = isinstance(inner, SharpnessAwareState)
        arguments.require(valid, "link", link, what, remedy)
        zeros = tree_math.cast_like(tree_math.zeros_like(params), params)
        return PeriodicState(jnp.zeros((), jnp.int32), inner, zeros if reuses else None)

    def update_fn(
        updates: PyTree,
        state: PeriodicState,
        params: PyTree | None = None,
        *,
        perturb: bool | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, PeriodicState]:
        arguments.check_static("perturb", perturb)
        _check_state(state, reuses)

        def call(perturb: bool) -> tuple[PyTree, SharpnessAwareState]:
            new_updates, inner = link.update(
                updates, state.link, params, perturb=perturb, **extra_args
            )
            return new_updates, inner

        def perturbed(q: PyTree) -> tuple[PyTree, SharpnessAwareState, PyTree]:
            new_updates, inner = call(perturb=True)
            if reuses:
                q = _orthogonal(new_updates, call(perturb=False)[0], q)
            return new_updates, inner, q

        def between(q: PyTree) -> tuple[PyTree, SharpnessAwareState, PyTree]:
            grads, inner = call(perturb=False)
            if reuses:
                norm = tree_math.norm(grads)
                weight = jnp.asarray(reuse, norm.dtype) * norm
                weight = jnp.where(jnp.isfinite(norm), weight, 0)
                added = tree_math.add_scaled(grads, weight, q)
                grads = tree_math.cast_like(added, grads)
            return grads, inner, q

        due = interval == 1 or state.num_steps % interval == 0
        new_updates, inner, q = scalars.branch(
            due if perturb is None else bool(perturb),
            perturbed,
            between,
            state.orthogonal,
        )
        number = optax.safe_increment(state.num_steps)
        return new_updates, PeriodicState(number, inner, q)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _orthogonal(perturbed: PyTree, grads: PyTree, before: PyTree) -> PyTree:
    inverse = tree_math.safe_inverse(tree_math.norm(grads))
    unit, relative = (tree_math.scale(inverse, x) for x in (grads, perturbed))
    errors = jax.tree.map(_last_bits, relative, perturbed)
    along, squared = tree_math.vdots((relative, unit), (errors, errors))
    rest = tree_math.add_scaled(relative, -along, unit)
    length = tree_math.norm(rest)
    is_rounding = length <= _ROUNDING * scalars.safe_sqrt(squared)
    factor = jnp.where(is_rounding, 0, tree_math.safe_inverse(length))
    q = tree_math.cast_like(tree_math.scale(scalars.once(factor)[0], rest), before)
    return tree_math.where((inverse > 0) & jnp.isfinite(length), q, before)


def _last_bits(x: jax.Array, like: jax.Array) -> jax.Array:
    """The rounding errors of x, which had the dtype of `like`."""
    precision = float(jnp.finfo(like.dtype).eps)  # type: ignore[no-untyped-call]
    return precision * x


def _check_state(state: Any, reuses: bool) -> None:
    valid = isinstance(state, PeriodicState)
    if not valid or (state.orthogonal is None) == reuses:
        raise ValueError(
            "opt_state must be the state of this periodic(…), got a "
            f"{type(state).__name__}{' with another reuse' if valid else ''}: make it "
            "by tx.init(params) of the same chain."
        )
