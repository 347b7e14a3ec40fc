"""The trackers that `eigensam track` compares, and what each costs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from eigensam_jax import eigen, tree_math
from eigensam_jax.hessian import Matvec
from eigensam_jax.trackers import Tracker, lanczos, power_iteration, ritz, secant


class Spec(NamedTuple):
    """A tracker, and what is known of it before it runs.

    Attributes:
      tracker: what `eigen_sam` is given.
      update_interval: it is due on step 0 and every so many steps; None for never.
      num_matvecs: Hessian-vector products when it is due; 0 where it only observes.
      is_ceiling: whether it is there to show what more products would buy, and nobody
        would train by it.
      call: how the tracker is made, for the results file.
    """

    tracker: Tracker
    update_interval: int | None = None
    num_matvecs: int = 0
    is_ceiling: bool = False
    call: str = ""

    def is_due(self, step: int) -> bool:
        """Whether this step is one of those on which `eigen_sam` is told to refresh."""
        return self.update_interval is not None and step % self.update_interval == 0

    @property
    def products(self) -> float:
        """Hessian-vector products per 100 steps."""
        return 100 * self.num_matvecs / (self.update_interval or 1)


def every_product(decay: float = 0.95) -> Tracker:
    """The secant with exact products: v ← decay·v + (1 − decay)·Hv/‖Hv‖, normalised.

    One Hessian-vector product with the batch of every step where the secant takes a
    difference of gradients along ε; averaged over batches alike. The v that a step uses
    has seen its batch. It starts from a random unit vector.

    Args:
      decay: the weight of the v before, at least 0 and less than 1.

    Returns:
      A `Tracker` whose state is an `eigen.Eigenpair` with λ and residual of the v
      before the product.
    """
    power = power_iteration(num_iters=1, update_interval=1)

    def refresh(
        state: eigen.Eigenpair, matvec: Matvec, count: jax.Array, due: bool | None
    ) -> eigen.Eigenpair:
        new = power.refresh(state, matvec, count, due)
        old = tree_math.scale(decay, state.eigenvector)
        v = tree_math.add_scaled(old, 1 - decay, new.eigenvector)
        v = tree_math.scale(tree_math.safe_inverse(tree_math.norm(v)), v)
        pair: eigen.Eigenpair = new._replace(eigenvector=v)
        return pair

    return power._replace(refresh=refresh)


def _spec(
    make: Callable[..., Tracker],
    arguments: dict[str, Any],
    update_interval: int | None = None,
    num_matvecs: int = 0,
    is_ceiling: bool = False,
) -> Spec:
    """The `Spec` of `make(**arguments)`."""
    listed = ", ".join(f"{name}={value}" for name, value in arguments.items())
    call = f"{make.__name__}({listed})"
    return Spec(make(**arguments), update_interval, num_matvecs, is_ceiling, call)


TRACKERS = {
    "power_iteration": _spec(
        power_iteration, {"num_iters": 5, "update_interval": 100}, 100, 5
    ),
    "lanczos": _spec(lanczos, {"num_matvecs": 5, "update_interval": 100}, 100, 5),
    "secant": _spec(secant, {"decay": 0.95, "update_interval": 1}),
    "secant_5": _spec(secant, {"decay": 0.9, "update_interval": 5}, 5),
    "ritz": _spec(ritz, {"update_interval": 20, "decay": 0.98, "gain": 0.2}, 20, 1),
    # The top eigenvector of the step's own batch, warm-started until it has converged.
    "own_batch": _spec(
        lanczos, {"num_matvecs": 10, "update_interval": 1}, 1, 10, is_ceiling=True
    ),
    "every_product": _spec(every_product, {"decay": 0.95}, 1, 1, is_ceiling=True),
}
