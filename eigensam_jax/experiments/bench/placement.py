"""Devices, and the placement of arrays for data-parallel training."""

import os
from contextlib import suppress
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eigensam_jax.experiments.errors import UserError


class Placement(NamedTuple):
    """Data parallelism: every device has all parameters and a part of the batch.

    Attributes:
      replicated: the sharding of parameters and optimizer state.
      split: the sharding of arrays whose first axis is over the examples.
    """

    replicated: NamedSharding
    split: NamedSharding


def claim(count: int) -> list[jax.Device]:
    """The first `count` devices, as `available`; UserError if there are fewer."""
    devices = available(count)
    if len(devices) < count:
        raise UserError(
            f"--devices {count} is more than there are: {len(devices)} of kind "
            f"{devices[0].platform}; use at most {len(devices)}"
        )
    return devices


def available(most: int) -> list[jax.Device]:
    """The first `most` devices, or all; a CPU is divided into that many.

    Division works only in a process that has not used JAX before.
    """
    config: Any = jax.config
    if most > max(config.jax_num_cpu_devices, 1):
        with suppress(RuntimeError):  # JAX is in use, or XLA_FLAGS divides
            config.update("jax_num_cpu_devices", most)
    return jax.devices()[:most]


def data_parallel(devices: list[jax.Device]) -> Placement:
    """The `Placement` over these devices."""
    mesh = Mesh(np.array(devices), ("data",))
    spec: Any = PartitionSpec
    return Placement(NamedSharding(mesh, spec()), NamedSharding(mesh, spec("data")))


def shapes(tree: Any, sharding: NamedSharding) -> Any:
    """Shapes and dtypes of `tree`, with this sharding."""
    make: Any = jax.ShapeDtypeStruct
    return jax.tree.map(lambda x: make(x.shape, x.dtype, sharding=sharding), tree)


def usable_cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
