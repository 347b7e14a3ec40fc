"""What the registry says of a method, a base optimizer, a tracker, data or a model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import optax
from jax.typing import ArrayLike

from eigensam_jax.experiments.data.augmentation import Augment
from eigensam_jax.trackers import Tracker
from eigensam_jax.tree_math import PyTree

GRADIENTS = 2  # of a step that perturbs, without the tracker's products
PLAIN = "plain"  # as a baseline: the first method of a table that does not perturb

Link = Callable[..., optax.GradientTransformationExtraArgs]


class BaseOptimizer(NamedTuple):
    """The optimizer after a method's link.

    Attributes:
      make: (learning rate or schedule, weight decay) -> the optimizer.
      learning_rates: those that `eigensam accuracy` tries; the first is the default.
      constants: other hyperparameters, for the results file.
    """

    make: Callable[[optax.ScalarOrSchedule, float], optax.GradientTransformation]
    learning_rates: tuple[float, ...]
    constants: dict[str, float]


class Method(NamedTuple):
    """A training method.

    Attributes:
      label, colour, marker: how tables and plots show it.
      link: (ρ, α, tracker, **options) -> the link before the base optimizer; None for a
        method that does not perturb.
      direction: (gradient, parameters, v, α) -> the direction of the perturbation; None
        for that of the gradient.
      tracker: a key of `TRACKERS`, for Eigen-SAM.
      base: the base optimizer, if fixed; "" for that of `--base-optimizer`.
      baseline: the method of the paired differences, or `PLAIN`.
      radius_of: for SAM at the mean ‖ε‖ of this method with the same seed.
      rho_factor: factor of SAM's default ρ.
      every: it perturbs on every `every`-th step.
      reuse: that of `periodic`.
      usual: whether `eigensam compare` trains by it, beside the base optimizer.
    """

    label: str
    colour: str
    marker: str = "o"
    link: Link | None = None
    direction: Callable[[PyTree, PyTree, PyTree, ArrayLike], PyTree] | None = None
    tracker: str = ""
    base: str = ""
    baseline: str = ""
    radius_of: str = ""
    rho_factor: float = 1.0
    every: int = 1
    reuse: float = 0.0
    usual: bool = False


class Tracking(NamedTuple):
    """A tracker, and what is known of it before it runs.

    Attributes:
      function: makes it.
      arguments: what `function` is given, by keyword.
      num_matvecs: Hessian-vector products of a refresh; 0 where it only observes.
      is_ceiling: whether it is there to show what more products would buy, and nobody
        would train by it.
      label, colour, marker: as those of a `Method`; a "" label is its name.
    """

    function: Callable[..., Tracker]
    arguments: dict[str, Any]
    num_matvecs: int = 0
    is_ceiling: bool = False
    label: str = ""
    colour: str = "black"
    marker: str = "o"

    @property
    def update_interval(self) -> int:
        """Steps from one on which it refreshes, or observes, to the next."""
        return int(self.arguments.get("update_interval", 1))

    @property
    def products(self) -> float:
        """Hessian-vector products per 100 steps."""
        return 100 * self.num_matvecs / self.update_interval

    @property
    def call(self) -> str:
        """How it is made, for the results file."""
        listed = ", ".join(f"{name}={x}" for name, x in self.arguments.items())
        return f"{self.function.__name__}({listed})"

    def make(self, num_matvecs: int, update_interval: int) -> Tracker:
        """The tracker, with so many products every so many steps if it has a choice."""
        asked = {"num_matvecs": num_matvecs, "update_interval": update_interval}
        own = self.arguments
        return self.function(**{name: asked.get(name, own[name]) for name in own})


class DataSource(NamedTuple):
    """A data set.

    Attributes:
      read: from the folder of `--data-dir` to its images and labels.
      files: what that folder holds; "" where it needs none.
      augment: what is usually done to training images; None for nothing.
      kind: of examples: images, which `load.load` standardises, or series or text, of
        which `read` makes a `Dataset`.
      label: in words; "" for its name.
    """

    read: Callable[[Path | None], Any]
    files: str = ""
    augment: Augment | None = None
    kind: str = "images"
    label: str = ""


class Network(NamedTuple):
    """A model.

    Attributes:
      make: from a number of classes to a Flax module.
      label: in words; "" for its name.
      track_rate: SGD's learning rate in `eigensam track`; None for too large for it.
      kind: of its examples; a series has so many hours to forecast for classes.
      batch_norm: whether it has batch normalisation.
    """

    make: Callable[[int], Any]
    label: str = ""
    track_rate: float | None = None
    kind: str = "images"
    batch_norm: bool = False
