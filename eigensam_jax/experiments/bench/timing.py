"""Steps timed in turns, so that what the machine does beside them hits all alike."""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eigensam_jax import trackers
from eigensam_jax.experiments.bench import torch_reference, workloads
from eigensam_jax.experiments.bench.contenders import Contender
from eigensam_jax.experiments.bench.steps import Steps, Task
from eigensam_jax.experiments.training.programs import Program

WARM_UP = 2
_SETTLE = 0.005  # seconds: threads of the step before may wait for work in a loop
_SHARE = 20  # what is a smaller part of the whole than 1/20 is timed less often


class Turn(NamedTuple):
    """What is timed.

    Attributes:
      step: takes one step and waits until it is done.
      due: as `step`, of every `interval`-th step; None where all are the same.
      interval: steps from one `due` to the next.
    """

    step: Callable[[], object]
    due: Callable[[], object] | None = None
    interval: int = 1


class Times(NamedTuple):
    """Seconds a step.

    Attributes:
      rounds: of each round, the due steps weighed in.
      due: the median of a due step; None where all are the same.
    """

    rounds: np.ndarray
    due: float | None


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
        start = trackers.power_iteration().init(params).eigenvector
        method = torch_reference.make_method(name, task.name, params, batch, start)
        return Turn(method.step, method.due, torch_reference.UPDATE_INTERVAL)

    return {name: turn(name) if name in ours else torch_turn(name) for name in names}


def in_turns(
    turns: Mapping[str, Turn], rounds: int, advance: Callable[[], object]
) -> dict[str, Times]:
    """Times one step of each, `rounds` times over, after `WARM_UP` rounds.

    Due steps, which weigh 1/interval, have their turn in every round, or in every
    interval/20-th where that is less often. To the time of each round they add the
    median of all of them.

    Args:
      turns: by name.
      rounds: how many.
      advance: called after each round.
    """
    plain: dict[str, list[float]] = {name: [] for name in turns}
    due: dict[str, list[float]] = {name: [] for name in turns}
    for i in range(-WARM_UP, rounds):
        for name, turn in turns.items():
            plain[name].append(_seconds(turn.step))
            every = -(-turn.interval // _SHARE)
            if turn.due is not None and (i == -WARM_UP or i % every == 0):
                due[name].append(_seconds(turn.due))
        if i == -1:
            for samples in (*plain.values(), *due.values()):
                samples.clear()
        if i >= 0:
            advance()
    times = {}
    for name, turn in turns.items():
        of_rounds, median = np.array(plain[name]), None
        if turn.due is not None:
            median = float(np.median(due[name]))
            of_rounds += (median - of_rounds) / turn.interval
        times[name] = Times(of_rounds, median)
    return times


def quartiles(values: np.ndarray) -> list[float]:
    """The lower quartile, the median and the upper quartile."""
    return [float(x) for x in np.quantile(values, (0.25, 0.5, 0.75))]


def _seconds(step: Callable[[], object]) -> float:
    time.sleep(_SETTLE)
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
