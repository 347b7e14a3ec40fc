"""A training that goes on from its last checkpoint, however often it is killed.

    python tests/interrupted.py TRACKER flax|orbax FOLDER

It prints every step; what it ends with is in FOLDER/end.npz.
"""

import os
import sys
from functools import partial
from pathlib import Path

import jax
import meshes
import numpy as np
import optax
from flax import serialization

from eigensam_jax import eigen_sam, trackers

STEPS = 60
TRACKERS = {
    "secant": trackers.secant(),
    "power_iteration": trackers.power_iteration(2, update_interval=7),
    "lanczos": trackers.lanczos(2, update_interval=7),
    "ritz": trackers.ritz(update_interval=7),
}


class ByFlax:
    """One file, replaced by the next."""

    def __init__(self, folder, like):
        self.path, self.like = folder / "checkpoint", like

    def restore(self):
        if not self.path.exists():
            return 0, self.like
        return serialization.from_bytes((0, self.like), self.path.read_bytes())

    def save(self, step, trained):
        draft = self.path.with_suffix(".part")
        draft.write_bytes(serialization.to_bytes((step, trained)))
        os.replace(draft, self.path)


class ByOrbax:
    """A folder a step, of which the last two are kept."""

    def __init__(self, folder, like):
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=5)
        self.manager = ocp.CheckpointManager(folder / "checkpoints", options=options)
        self.args, self.like = ocp.args, like

    def restore(self):
        step = self.manager.latest_step()
        if step is None:
            return 0, self.like
        args = self.args.StandardRestore(self.like)
        return step, self.manager.restore(step, args=args)

    def save(self, step, trained):
        self.manager.save(step, args=self.args.StandardSave(trained))


BACKENDS = {"flax": ByFlax, "orbax": ByOrbax}


def train(tracker, make_checkpoints, tell=lambda step: None):
    """Parameters and state at the end, of as many steps as are left."""
    tx = optax.chain(
        eigen_sam(0.1, 0.5, TRACKERS[tracker]), optax.sgd(0.05, momentum=0.9)
    )
    params, batches = meshes.parameters(), meshes.batches(STEPS)
    start = params, tx.init(params)
    checkpoints = None if make_checkpoints is None else make_checkpoints(start)
    first, trained = (0, start) if checkpoints is None else checkpoints.restore()
    take_step = jax.jit(partial(meshes.step, tx))
    for i in range(first, STEPS):
        trained = take_step(*trained, meshes.part(batches, i))
        if checkpoints is not None:
            checkpoints.save(i + 1, trained)
        tell(i + 1)
    return trained


def main(tracker, backend, folder):
    jax.config.update("jax_num_cpu_devices", meshes.DEVICES)
    folder = Path(folder)
    tell = partial(print, flush=True)
    end = train(tracker, partial(BACKENDS[backend], folder), tell)
    np.savez(folder / "end.npz", *map(np.asarray, jax.tree.leaves(end)))


if __name__ == "__main__":
    main(*sys.argv[1:])
