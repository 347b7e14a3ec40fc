"""What `eigensam track` runs."""

from collections.abc import Sequence
from typing import NamedTuple

from eigensam_jax.experiments.registry import TRACKERS


class Job(NamedTuple):
    """One training run.

    Attributes:
      optimizer: "eigen_sam", "sam", or "sam_matched", which is SAM at the mean radius
        that the run of `tracker`, `alpha` and `seed` had.
      tracker: a key of `TRACKERS`; None for "sam".
      alpha: α; None for "sam".
      seed: of the initialisation and of the order of the examples.
    """

    optimizer: str
    tracker: str | None
    alpha: float | None
    seed: int


def jobs(trackers: Sequence[str], alphas: Sequence[float], seeds: int) -> list[Job]:
    """What to run: seed by seed, so that an early end leaves whole comparisons."""
    result = []
    for seed in range(seeds):
        result.append(Job("sam", None, None, seed))
        for alpha in alphas:
            for name in trackers:
                result.append(Job("eigen_sam", name, alpha, seed))
                if not TRACKERS[name].is_ceiling:
                    result.append(Job("sam_matched", name, alpha, seed))
    return result
