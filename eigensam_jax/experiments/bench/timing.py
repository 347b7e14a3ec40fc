"""Steps timed in turns, so that disturbances of the machine affect all alike."""

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
_SETTLE = 0.005  # seconds, until threads of the last step stop spinning
_SHARE = 20  # steps with a weight below 1/20 are timed less often


class Turn(NamedTuple):
    """What is timed.

    Attributes:
      step: takes one step and waits for it.
      due: as `step`, for every `interval`-th step; None if all are the same.
      interval: steps from one `due` to the next.
    """

    step: Callable[[], object]
    due: Callable[[], object] | None = None
    interval: int = 1


class Times(NamedTuple):
    """Seconds per step.

    Attributes:
      rounds: of each round, with due steps weighed in.
      due: the median of a due step; None if all are the same.
    """

    rounds: np.ndarray
    due: float | None


def make_turns(
    task: Task, names: list[str], ours: dict[str, Contender], steps: dict[str, Steps]
) -> dict[str, Turn]:
    """Training by each of `names`, from the same parameters and batch.

    Names that are not among `ours`, whose programs are `steps`, are PyTorch's.
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
    """Times one step of each, `rounds` times, after `WARM_UP` rounds.

    Due steps weigh 1/interval. They are timed in every round, or every interval/20-th
    if that is less often. Their median is weighed into the time of each round.
    `advance` is called after each round.
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
