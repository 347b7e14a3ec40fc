"""Training on random data, a step at a time, for `timing.in_turns`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from eigensam_jax import trackers
from eigensam_jax.experiments.bench import torch_reference, workloads
from eigensam_jax.experiments.bench.contenders import Contender
from eigensam_jax.experiments.bench.steps import Steps, Task
from eigensam_jax.experiments.bench.timing import Turn
from eigensam_jax.experiments.training.programs import Program


def make_turns(
    task: Task, names: list[str], ours: dict[str, Contender], steps: dict[str, Steps]
) -> dict[str, Turn]:
    """Training by each of `names`, step by step, from the same parameters and batch.

    Those that are not `ours`, compiled to `steps`, are PyTorch's.
    """
    workload, placed = task.workload, task.placement
    batch_size = task.batch.labels.shape[0]
    params, others = jax.jit(lambda: workloads.init(workload))()
    batch = jax.jit(lambda: workloads.make_batch(workload, batch_size))()
    start = trackers.power_iteration().init(params).eigenvector
    others = jax.device_put(others, placed.replicated)
    split = jax.device_put(batch, placed.split)

    def turn(name: str) -> Turn:
        copy = jax.tree.map(jnp.copy, params)
        state = [jax.device_put((copy, ours[name].tx.init(copy)), placed.replicated)]

        def stepping(program: Program) -> Callable[[], None]:
            def step() -> None:
                params, opt_state, value = program.call(*state[0], others, split)
                state[0] = params, opt_state
                jax.block_until_ready((state, value))  # type: ignore[no-untyped-call]

            return step

        _, plain, due, interval = steps[name]
        return Turn(stepping(plain), stepping(due) if interval > 1 else None, interval)

    def torch_turn(name: str) -> Turn:
        method = torch_reference.make_method(name, task.name, params, batch, start)
        return Turn(method.step, method.due, torch_reference.UPDATE_INTERVAL)

    return {name: turn(name) if name in ours else torch_turn(name) for name in names}
