"""Steps timed in turns, so that what the machine does beside them hits all alike."""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

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
    return {
        name: _weighed(plain[name], due[name], turn.interval)
        for name, turn in turns.items()
    }


def quartiles(values: np.ndarray) -> list[float]:
    """The lower quartile, the median and the upper quartile."""
    return [float(x) for x in np.quantile(values, (0.25, 0.5, 0.75))]


def _weighed(plain: list[float], due: list[float], interval: int) -> Times:
    rounds = np.array(plain)
    if not due:
        return Times(rounds, None)
    median = float(np.median(due))
    return Times(rounds + (median - rounds) / interval, median)


def _seconds(step: Callable[[], object]) -> float:
    time.sleep(_SETTLE)
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
