"""The optimizers whose steps are compared, each with the same SGD with momentum."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from eigensam_jax.experiments.bench.workloads import Batch, Loss
from eigensam_jax.experiments.registry import BASE_OPTIMIZERS, TRACKERS
from eigensam_jax.experiments.training.methods import Setup, make_optimizer, named
from eigensam_jax.tree_math import PyTree, ValueFn

RHO = 0.05
ALPHA = 0.2
LEARNING_RATE = 0.1
MOMENTUM = BASE_OPTIMIZERS["sgd"].constants["momentum"]
_TRACKERS = [name for name, entry in TRACKERS.items() if not entry.is_ceiling]
NAMES = ("sgd", "sam", "optax_sam", "sam_periodic", *_TRACKERS)


class Contender(NamedTuple):
    """An optimizer, and how it is called.

    Attributes:
      tx: the whole chain.
      extra_args: from a batch's loss to the keyword arguments of `tx.update`.
      interval: above 1 if every `interval`-th step is due, and does more.
      fixed_by: the argument of `tx.update` that says whether a step is due.
    """

    tx: optax.GradientTransformationExtraArgs
    extra_args: Callable[[ValueFn], dict[str, Any]]
    interval: int = 1
    fixed_by: str = "refresh"


Step = Callable[[PyTree, PyTree, PyTree, Batch], tuple[PyTree, PyTree, jax.Array]]


def make_contenders() -> dict[str, Contender]:
    """SGD, SAM in three ways, and Eigen-SAM by each tracker meant for training."""
    setups = {"sgd": Setup("sgd"), "sam": named("sam", RHO, ALPHA)}
    setups |= {name: named("eigen_sam", RHO, ALPHA, name) for name in _TRACKERS}
    by_value = lambda value_fn: {"value_fn": value_fn}
    by_gradient = lambda f: {"grad_fn": lambda params, _: jax.grad(f)(params)}
    contenders = {
        name: Contender(make_optimizer(x, _sgd()), by_value, x.update_interval)
        for name, x in setups.items()
    }
    periodic = named("sam_periodic", RHO, ALPHA)
    contenders["sam_periodic"] = Contender(
        make_optimizer(periodic, _sgd()), by_value, periodic.every, "perturb"
    )
    contenders["optax_sam"] = Contender(_optax_sam(), by_gradient)
    return {name: contenders[name] for name in NAMES}


def make_step(contender: Contender, loss: Loss, is_due: bool | None = None) -> Step:
    """Builds (params, opt_state, others, batch) -> the first two, and L(w).

    `is_due` fixes whether the step is due; None leaves that to the optimizer.
    """

    def step(
        params: PyTree, opt_state: PyTree, others: PyTree, batch: Batch
    ) -> tuple[PyTree, PyTree, jax.Array]:
        value_fn = lambda p: loss(p, others, batch)
        extra_args = contender.extra_args(value_fn)
        if is_due is not None:
            extra_args[contender.fixed_by] = is_due
        value, grads = jax.value_and_grad(value_fn)(params)
        updates, opt_state = contender.tx.update(grads, opt_state, params, **extra_args)
        return optax.apply_updates(params, updates), opt_state, value

    return step


def _sgd() -> optax.GradientTransformation:
    return BASE_OPTIMIZERS["sgd"].make(LEARNING_RATE, 0.0)


def _optax_sam() -> optax.GradientTransformationExtraArgs:
    """The mathematics of `sam`, by optax's own implementation."""
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    return optax.contrib.sam(_sgd(), ascent, reset_state=True, opaque_mode=True)
