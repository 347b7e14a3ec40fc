"""One of several processes that train together; the first saves what came out.

    python tests/processes.py RUN PROCESSES ID PORT OUT.npz

Nothing below is about processes but the two lines that join them.
"""

import sys
from functools import partial

import jax
import meshes
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from eigensam_jax import eigen_sam, trackers

STEPS = 12
RUNS = {
    "sharded": partial(meshes.by_jit, params_spec=P(meshes.AXIS)),
    "shard_map": meshes.by_shard_map,
}


def make(**kwargs):
    tracker = trackers.ritz(update_interval=3)
    return optax.chain(eigen_sam(0.1, 0.5, tracker, **kwargs), optax.sgd(0.05))


def leaves(run):
    """Parameters and state after training, whole, by the paths of their leaves."""
    trained = run(make, meshes.parameters(), meshes.batches(STEPS))
    everywhere = NamedSharding(meshes.mesh(), P())
    trained = jax.jit(lambda x: x, out_shardings=everywhere)(trained)
    return {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree.leaves_with_path(trained)
    }


def main(name, processes, process_id, port, out):
    jax.config.update("jax_num_cpu_devices", meshes.DEVICES // processes)
    jax.distributed.initialize(f"localhost:{port}", processes, process_id)
    assert jax.device_count() == meshes.DEVICES > jax.local_device_count()
    results = leaves(RUNS[name])
    if process_id == 0:
        np.savez(out, **results)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5])
