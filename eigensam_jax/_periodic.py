"""Any of the links on every few steps only, and what it found reused in between."""

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

# Below this multiple of its dtype's precision, the part of a gradient orthogonal to
# another one is rounding. A heuristic.
_ROUNDING = 4


class PeriodicState(NamedTuple):
    """State of `periodic`.

    Attributes:
      num_steps: number of steps so far, those that perturb and the others, int32.
      link: the state of the link, a `SharpnessAwareState`, as the last step that
        perturbed left it.
      orthogonal: q, the direction of the last perturbed gradient's part orthogonal to
        the plain gradient: of norm 1, or 0 where there is none; like the parameters, in
        their dtypes. None if `reuse` is 0 or `interval` is 1.
    """

    num_steps: jax.Array
    link: SharpnessAwareState
    orthogonal: PyTree


def periodic(
    link: optax.GradientTransformationExtraArgs,
    interval: int = 5,
    reuse: ArrayLike = 0.3,
) -> optax.GradientTransformationExtraArgs:
    """A link on every `interval`-th step only: 1 + 1/interval gradients a step.

    On step 0 and every `interval`-th after it, the step is that of `link`. It also
    keeps the direction q of the part of the perturbed gradient g′ that is orthogonal to
    the plain gradient g:

        q = (g′ − ⟨g′,u⟩u)/‖g′ − ⟨g′,u⟩u‖,   u = g/‖g‖.

    The steps between compute no second gradient. They take

        g + reuse·‖g‖·q,

    since q changes slowly from step to step (LookSAM). Norms and inner products run
    over all parameters, also where `link` has a mask.

    Put it first in the chain, in the place of `link`. Memory: q in the state, and on a
    step that perturbs g is kept until g′ is there. Where the part of g′ orthogonal to g
    is rounding, q is 0; a step that is not finite leaves q as it was.

    Args:
      link: what `sam`, `asam` or `eigen_sam` returns. It counts the steps that perturb:
        its schedules of ρ and α and the intervals of its tracker run over them alone.
        With the interval 5, a schedule of all steps is `lambda n: schedule(5 * n)`.
      interval: steps from one that perturbs to the next, at least 1, where every step
        is that of `link`, bit for bit.
      reuse: the weight of q, at least 0. With 0 the steps between are those without
        `link`, as by `optax.conditionally_transform`, and the state has no q.

    Returns:
      An `optax.GradientTransformationExtraArgs` with the arguments of `link`'s
      `update`, and `perturb`, a Python bool that fixes at trace time whether the step
      is one that perturbs, so that the program has no branch: give
      `perturb=step % interval == 0`, as a static argument of the jitted step. Use it on
      CPUs for networks with convolutions, which XLA runs ten times slower in a branch.
      Its state is a `PeriodicState`; `info` reads what the last step that perturbed
      did. Under `jax.vmap` over a state, both kinds of steps are computed each time.

    Raises:
      ValueError: for an `interval` that is no positive integer or a negative `reuse`;
        from `init`, if `link` is not one of the three; from `update`, as `link`.

    Example:
      >>> import eigensam_jax, jax, jax.numpy as jnp, optax
      >>> link = eigensam_jax.periodic(eigensam_jax.sam(rho=1.0), 2, reuse=0.5)
      >>> tx = optax.chain(link, optax.sgd(0.5))
      >>> loss = lambda w: w[0] ** 2 + w[0] * w[1] ** 2
      >>> w = jnp.array([1.0, 0.0])
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     updates, state = tx.update(jax.grad(loss)(w), state, w, value_fn=loss)
      ...     w = optax.apply_updates(w, updates)
      >>> int(state[0].num_steps), int(state[0].link.num_updates)  # one perturbed
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
    """The new q; what it was `before`, if the step was not finite."""
    inverse = tree_math.safe_inverse(tree_math.norm(grads))
    unit, relative = (tree_math.scale(inverse, x) for x in (grads, perturbed))
    along, squared = tree_math.vdots((relative, unit), (relative, relative))
    rest = tree_math.add_scaled(relative, -along, unit)
    length = tree_math.norm(rest)
    precision = max(
        float(jnp.finfo(x.dtype).eps)  # type: ignore[no-untyped-call]
        for x in jax.tree.leaves(perturbed)
    )
    is_rounding = length <= _ROUNDING * precision * scalars.safe_sqrt(squared)
    factor = jnp.where(is_rounding, 0, tree_math.safe_inverse(length))
    q = tree_math.cast_like(tree_math.scale(scalars.once(factor)[0], rest), before)
    return tree_math.where((inverse > 0) & jnp.isfinite(length), q, before)


def _check_state(state: Any, reuses: bool) -> None:
    valid = isinstance(state, PeriodicState)
    if not valid or (state.orthogonal is None) == reuses:
        raise ValueError(
            f"opt_state must be of this periodic(…), got a {type(state).__name__}"
            f"{' of another reuse' if valid else ''}: make it by tx.init(params) of "
            "the same chain."
        )
