"""Methods that a run trains by, with ρ, α and the steps that perturb."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from eigensam_jax import periodic, tree_math
from eigensam_jax.experiments.entries import GRADIENTS
from eigensam_jax.experiments.registry import METHODS, TRACKERS, matched
from eigensam_jax.trackers import Tracker
from eigensam_jax.tree_math import PyTree

PARTS = "parts"  # the axis over separately perturbed parts of a batch


class Setup(NamedTuple):
    """A method and all its choices.

    Attributes:
      optimizer: the method, a key of `registry.METHODS`.
      rho, alpha: ρ, and α of Eigen-SAM.
      tracker: how Eigen-SAM follows v, a key of `registry.TRACKERS`.
      num_products: Hessian-vector products per refresh, if the tracker has a choice.
      update_interval: steps from one refresh to the next.
      every: perturbs on every `every`-th step.
      reuse: of `periodic`, on the other steps; 0 leaves them to the base optimizer.
      last: perturbs in this last share of the steps only.
      norms_only: perturbs the parameters of normalisation layers only.
      parts: the parts of a batch, each perturbed by its own gradient.
    """

    optimizer: str
    rho: ArrayLike = 0.0
    alpha: ArrayLike = 0.0
    tracker: str = ""
    num_products: int = 0
    update_interval: int = 1
    every: int = 1
    reuse: ArrayLike = 0.0
    last: float = 1.0
    norms_only: bool = False
    parts: int = 1

    @property
    def structure(self) -> "Setup":
        """The static part, on which compiled steps depend; the rest are `scalars`."""
        every, reuse = min(self.every, 2), 1.0 if self.reuse else 0.0
        return self._replace(rho=0.0, alpha=0.0, every=every, reuse=reuse, last=1.0)

    @property
    def scalars(self) -> tuple[jax.Array, ...]:
        """ρ, α and, if there is any, the reuse."""
        reuse = (self.reuse,) if self.reuse else ()
        return tuple(map(jnp.float32, (self.rho, self.alpha, *reuse)))

    def with_scalars(self, scalars: Sequence[jax.Array]) -> "Setup":
        """The setup with these `scalars`."""
        rho, alpha, *reuse = scalars
        return self._replace(rho=rho, alpha=alpha, reuse=reuse[0] if reuse else 0.0)

    def acts(self, step: int, total_steps: int) -> bool:
        """Whether this step perturbs."""
        since = step - self._first(total_steps)
        perturbs = METHODS[self.optimizer].link is not None
        return perturbs and since >= 0 and since % self.every == 0

    def refreshes(self, step: int, total_steps: int) -> bool:
        """Whether the tracker refreshes v on this step, if the step perturbs."""
        return (step - self._first(total_steps)) % self.update_interval == 0

    def gradients(self, total_steps: int) -> float:
        """Mean gradient evaluations per step; a Hessian product counts as two."""
        acting = [x for x in range(total_steps) if self.acts(x, total_steps)]
        refreshes = sum(self.refreshes(step, total_steps) for step in acting)
        more = (GRADIENTS - 1) * len(acting) + 2 * self.num_products * refreshes
        return 1 + more / total_steps

    @property
    def matched(self) -> "Setup | None":
        """SAM, with ρ still to be set, if this method is compared with SAM."""
        if matched(self.optimizer) is None:
            return None
        return self._replace(
            optimizer="sam", alpha=0.0, tracker="", num_products=0, update_interval=1
        )

    def _first(self, total_steps: int) -> int:
        return total_steps - math.ceil(self.last * total_steps)


def named(name: str, rho: float, alpha: float, tracker: str = "") -> Setup:
    """The method of this name, with ρ, α and tracker as far as it uses them."""
    method = METHODS[name]
    if method.link is None:
        return Setup(name)
    tracker = method.tracker and (tracker or method.tracker)
    setup = Setup(name, rho, every=method.every, reuse=method.reuse)
    if not tracker:
        return setup
    products, interval = (
        TRACKERS[tracker].num_matvecs,
        TRACKERS[tracker].update_interval,
    )
    return setup._replace(
        alpha=alpha, tracker=tracker, num_products=products, update_interval=interval
    )


def make_tracker(setup: Setup) -> Tracker:
    """The tracker of a setup that has one."""
    return TRACKERS[setup.tracker].make(setup.num_products, setup.update_interval)


def make_optimizer(
    setup: Setup, descent: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """The method's link before `descent`; its `update` takes `perturb`."""
    method, options = METHODS[setup.optimizer], dict[str, Any]()
    if method.link is None:
        return optax.chain(optax.with_extra_args_support(optax.identity()), descent)
    if setup.norms_only:
        options["mask"] = is_norm
    if setup.parts > 1:
        options |= {"axis_name": PARTS, "per_device": True}
    tracker = make_tracker(setup) if setup.tracker else None
    link = method.link(setup.rho, setup.alpha, tracker, **options)
    if setup.every > 1:
        link = periodic(link, setup.every, setup.reuse)
    return optax.chain(link, descent)


def perturbation_direction(
    setup: Setup, grads: PyTree, params: PyTree, opt_state: Any
) -> PyTree:
    """The perturbation's direction, from a batch's gradient; for SGD, the gradient.

    As in a step, v counts only while the tracker calls it usable.
    """
    if setup.norms_only:
        mask = is_norm(params)
        grads = jax.tree.map(lambda g, inside: inside * g, grads, mask)
    direction = METHODS[setup.optimizer].direction
    if direction is None:
        return grads
    v = None
    if setup.tracker:
        tracked = optax.tree.get(opt_state, "tracker")
        v = tree_math.scale(tracked.usable, tracked.eigenvector)
    return direction(grads, params, v, setup.alpha)


def is_norm(params: PyTree) -> PyTree:
    """Marks the scales and biases of normalisation layers."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "norm" in jax.tree_util.keystr(path).lower(), params
    )
