"""The transformations with each tracker, to try what has to hold for all of them."""

import functools

from eigensam_jax import asam, eigen_sam, sam, trackers

LINKS = {
    "sam": functools.partial(sam, 0.1),
    "asam": functools.partial(asam, 0.5),
    "secant": functools.partial(eigen_sam, 0.1, 0.5, trackers.secant()),
    "secant_2": functools.partial(eigen_sam, 0.1, 0.5, trackers.secant(0.9, 2)),
    "power_iteration": functools.partial(
        eigen_sam, 0.1, 0.5, trackers.power_iteration(2, update_interval=2)
    ),
    "lanczos": functools.partial(
        eigen_sam, 0.1, 0.5, trackers.lanczos(2, update_interval=2)
    ),
    "ritz": functools.partial(eigen_sam, 0.1, 0.5, trackers.ritz(update_interval=2)),
}
