"""What experiments compare: what comes before SGD, and on which steps it acts."""

import math
from typing import Any, NamedTuple

import jax
import optax
from jax.typing import ArrayLike

from eigensam_jax import asam, eigen_sam, perturbation, sam, trackers
from eigensam_jax.tree_math import PyTree

MOMENTUM = 0.9
PARTS = "parts"  # the axis over the parts of a batch that are perturbed by themselves


class Method(NamedTuple):
    """Plain SGD, or SGD on the gradients of `sam`, `asam` or `eigen_sam`.

    Attributes:
      optimizer: "sgd", "sam", "asam" or "eigen_sam".
      rho: ρ.
      alpha: α of Eigen-SAM.
      tracker: how Eigen-SAM follows v, a name in `eigensam_jax.trackers`.
      num_products: Hessian-vector products of a refresh, where it has a choice.
      update_interval: steps from one refresh to the next.
      every: perturbs on every so many steps; the others are plain SGD.
      last: perturbs in this last share of the steps only.
      norms_only: perturbs the parameters of normalisation layers only.
      parts: each batch is cut into so many parts, each perturbed by its own gradient.
    """

    optimizer: str
    rho: ArrayLike = 0.0
    alpha: ArrayLike = 0.0
    tracker: str = ""
    num_products: int = 0
    update_interval: int = 1
    every: int = 1
    last: float = 1.0
    norms_only: bool = False
    parts: int = 1

    @property
    def structure(self) -> "Method":
        """What compiled steps depend on: ρ and α are their arguments."""
        return self._replace(rho=0.0, alpha=0.0, every=1, last=1.0)

    def acts(self, step: int, total_steps: int) -> bool:
        """Whether this step perturbs."""
        since = step - self._first(total_steps)
        return self.optimizer != "sgd" and since >= 0 and since % self.every == 0

    def refreshes(self, step: int, total_steps: int) -> bool:
        """Whether the tracker refreshes v on this step, one of those that perturb."""
        return (step - self._first(total_steps)) % self.update_interval == 0

    def gradients(self, total_steps: int) -> float:
        """Gradient evaluations a step, on average; a product counts as two of them."""
        acting = sum(self.acts(step, total_steps) for step in range(total_steps))
        products = 2 * self.num_products / self.update_interval
        return 1 + acting / total_steps * (1 + products)

    def _first(self, total_steps: int) -> int:
        return total_steps - math.ceil(self.last * total_steps)


def by_paper(rho: float, alpha: float) -> Method:
    """Eigen-SAM with the paper's tracker: five power iterations every 100 steps."""
    return Method("eigen_sam", rho, alpha, "power_iteration", 5, 100)


def by_secant(rho: float, alpha: float) -> Method:
    """Eigen-SAM with the library's tracker, which makes no products."""
    return Method("eigen_sam", rho, alpha, "secant")


def named(name: str, rho: float, alpha: float) -> Method:
    """The method that the option `--optimizer` calls by this name."""
    return {
        "sgd": Method("sgd"),
        "sam": Method("sam", rho),
        "sam_matched": Method("sam", rho),
        "eigen_sam_paper": by_paper(rho, alpha),
        "eigen_sam": by_secant(rho, alpha),
    }[name]


def make_optimizer(
    method: Method, descent: optax.GradientTransformation, acts: bool = True
) -> optax.GradientTransformationExtraArgs:
    """The method's link before `descent`, passed by on a step that does not act."""
    link = _link(method)
    if not acts:
        link = optax.GradientTransformationExtraArgs(
            link.init, lambda updates, state, params=None, **_: (updates, state)
        )
    return optax.chain(link, descent)


def epsilon(method: Method, grads: PyTree, params: PyTree, opt_state: Any) -> PyTree:
    """The direction of the perturbation from a batch's `grads`; their own, for SGD."""
    if method.norms_only:
        mask = is_norm(params)
        grads = jax.tree.map(lambda g, inside: inside * g, grads, mask)
    if method.optimizer == "asam":
        return perturbation.asam(grads, params, 1.0, 0.01).epsilon
    if method.optimizer == "eigen_sam":
        v = optax.tree.get(opt_state, "eigenvector")
        return perturbation.eigen_sam(grads, v, 1.0, method.alpha).epsilon
    return grads


def is_norm(params: PyTree) -> PyTree:
    """Which parameters are scales and biases of normalisation layers."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "norm" in jax.tree_util.keystr(path).lower(), params
    )


def _link(method: Method) -> optax.GradientTransformationExtraArgs:
    options: dict[str, Any] = {"mask": is_norm if method.norms_only else None}
    if method.parts > 1:
        options |= {"axis_name": PARTS, "per_device": True}
    if method.optimizer == "sgd":
        return optax.with_extra_args_support(optax.identity())
    if method.optimizer == "sam":
        return sam(method.rho, **options)
    if method.optimizer == "asam":
        return asam(method.rho, **options)
    return eigen_sam(method.rho, method.alpha, _tracker(method), **options)


def _tracker(method: Method) -> trackers.Tracker:
    interval = method.update_interval
    if method.tracker == "secant":
        return trackers.secant(update_interval=interval)
    if method.tracker == "ritz":
        return trackers.ritz(update_interval=interval)
    make = getattr(trackers, method.tracker)
    tracker: trackers.Tracker = make(method.num_products, interval)
    return tracker
