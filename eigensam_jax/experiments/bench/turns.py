"""Training on random data, a step at a time, for `timing.in_turns`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from eigensam_jax import trackers
from eigensam_jax.experiments.bench import torch_reference, workloads
from eigensam_jax.experiments.bench.contenders import Contender
from eigensam_jax.experiments.bench.steps import Steps, Task
from eigensam_jax.experiments.bench.timing import Turn
from eigensam_jax.experiments.bench.workloads import Batch, Workload
from eigensam_jax.experiments.training.programs import Program


def make_turns(
    task: Task,
    workload: Workload,
    ours: dict[str, Contender],
    steps: dict[str, Steps],
) -> dict[str, Turn]:
    """Training by each optimizer, from the same parameters, step by step."""
    placed = task.placement
    params, others = jax.jit(lambda: workloads.init(workload))()
    batch = make_batch(task, workload)
    batch = jax.device_put(batch, placed.split)
    others = jax.device_put(others, placed.replicated)

    def turn(name: str) -> Turn:
        programs_of, copy = steps[name], jax.tree.map(jnp.copy, params)
        state = [jax.device_put((copy, ours[name].tx.init(copy)), placed.replicated)]

        def stepping(program: Program) -> Callable[[], None]:
            def step() -> None:
                params, opt_state, value = program.call(*state[0], others, batch)
                state[0] = params, opt_state
                jax.block_until_ready((state, value))  # type: ignore[no-untyped-call]

            return step

        if programs_of.plain is None or programs_of.due is None:
            return Turn(stepping(programs_of.default))
        return Turn(
            stepping(programs_of.plain), stepping(programs_of.due), programs_of.interval
        )

    return {name: turn(name) for name in ours}


def make_torch_turns(
    task: Task, workload: Workload, names: list[str]
) -> dict[str, Turn]:
    """The same by PyTorch, from the same parameters, on the same batch."""
    params, _ = jax.jit(lambda: workloads.init(workload))()
    batch = make_batch(task, workload)
    start = trackers.power_iteration().init(params).eigenvector
    turns = {}
    for name in names:
        if name in torch_reference.METHODS:
            method = torch_reference.make_method(name, task.name, params, batch, start)
            turns[name] = Turn(method.step, method.due, torch_reference.UPDATE_INTERVAL)
    return turns


def make_batch(task: Task, workload: Workload) -> Batch:
    """The batch of `task`, on one device."""
    batch_size = task.batch.labels.shape[0]
    batch: Batch = jax.jit(lambda: workloads.make_batch(workload, batch_size))()
    return batch
