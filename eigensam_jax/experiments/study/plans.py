"""Plans: generators of jobs.

Before a plan is asked for the next job, `done` holds the record of the last one, so
that it can choose by the results so far.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from eigensam_jax.experiments.entries import GRADIENTS
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.registry import METHODS, matched
from eigensam_jax.experiments.training.methods import Setup, named

TUNING_SEED = 1_000  # which no other run has
_ALWAYS = ("optimizer", "rho", "learning_rate", "seed")

Record = dict[str, Any]


class Job(NamedTuple):
    """A training run.

    Attributes:
      method: the method and its settings.
      learning_rate: initial rate of the base optimizer.
      seed: of the initialisation and of the order of the examples.
      tuning: trains and measures on what `load.for_tuning` gives.
      longer: factor of the number of epochs.
    """

    method: Setup
    learning_rate: float
    seed: int
    tuning: bool = False
    longer: float = 1.0

    @property
    def fields(self) -> Record:
        """All that identifies this run."""
        chosen = self._asdict()
        return {**chosen.pop("method")._asdict(), **chosen}

    @property
    def record(self) -> Record:
        """The fields in `_ALWAYS`, and those that differ from the default."""
        usual = Job(Setup(""), 0.0, 0).fields
        return {k: x for k, x in self.fields.items() if k in _ALWAYS or x != usual[k]}


class Entry(NamedTuple):
    """A job, and where its record goes; several entries may share a job.

    Attributes:
      table, row, job: the place of the record, and what is run.
    """

    table: str
    row: str
    job: Job


Done = Mapping[Job, Record]
Plan = Callable[[Done], Iterator[Entry]]


class Grids(NamedTuple):
    """What is tried on the validation split.

    Attributes:
      learning_rates: of the base optimizer; every method uses the best.
      rhos, asam_rhos: of SAM, whose best both Eigen-SAMs use too, and of ASAM.
      paper_alphas, alphas: α with the paper's tracker, and with the secant.
    """

    learning_rates: Sequence[float]
    rhos: Sequence[float]
    asam_rhos: Sequence[float]
    paper_alphas: Sequence[float]
    alphas: Sequence[float]


def comparison(
    names: Sequence[str],
    rho: float,
    alpha: float,
    learning_rates: Mapping[str, float],
    seeds: int,
) -> Plan:
    """The named methods at the same ρ and α, seed by seed."""

    def plan(done: Done) -> Iterator[Entry]:
        for seed in range(seeds):
            for name in names:
                if METHODS[name].radius_of:
                    continue
                job = Job(named(name, rho, alpha), learning_rates[name], seed)
                if matched(name) in names:
                    yield from with_matched("main", name, job, done)
                else:
                    yield Entry("main", name, job)

    return plan


def accuracy(grids: Grids, seeds: int, plain: str = "sgd") -> Plan:
    """Tunes each method on a validation split, then trains it on all data.

    One seed chooses by validation accuracy; on a tie the first value wins.
    """

    def plan(done: Done) -> Iterator[Entry]:
        chosen: dict[str, float] = {}
        names = (plain, "sam", "asam", "eigen_sam_paper", "eigen_sam")
        tuned = partial(best, done, chosen)
        yield from tuned(plain, grids.learning_rates, lambda x: (Setup(plain), x))
        rate = chosen[plain]
        yield from tuned("sam", grids.rhos, lambda x: (Setup("sam", x), rate))
        yield from tuned("asam", grids.asam_rhos, lambda x: (Setup("asam", x), rate))
        rho = chosen["sam"]
        for name, alphas in zip(names[3:], grids[3:], strict=True):
            make = lambda x, name=name: (named(name, rho, x), rate)
            yield from tuned(name, alphas, make)
        setups = {
            name: named(name, chosen["asam"] if name == "asam" else rho, chosen[name])
            for name in names
        }
        for seed in range(seeds):
            for row, setup in setups.items():
                yield from with_matched("main", row, Job(setup, rate, seed), done)

    return plan


def frontier(
    names: Sequence[str],
    learning_rates: Sequence[float],
    rhos: Sequence[float],
    alphas: Sequence[float],
    seeds: int,
    plain: str = "sgd",
    asam_rhos: Sequence[float] | None = None,
) -> Plan:
    """Tunes each method by as many trials, then trains at equal steps and gradients.

    The best of `plain`'s learning rates is that of all; the others are tuned over ρ,
    and Eigen-SAM over α too, which takes more trials if there are several. With as many
    gradients a step as SAM, equal steps are equal gradients.
    """

    def plan(done: Done) -> Iterator[Entry]:
        chosen: dict[str, Any] = {}
        tuned = partial(best, done, chosen)
        yield from tuned(plain, learning_rates, lambda x: (Setup(plain), x))
        rate, setups = chosen[plain], {plain: Setup(plain)}
        for name in names:
            if METHODS[name].radius_of:
                continue
            grid = [METHODS[name].rho_factor * rho for rho in rhos]
            if name == "asam":
                grid = list(asam_rhos or grid)
            tried = alphas if METHODS[name].tracker else alphas[:1]
            make = lambda x, name=name: (named(name, *x), rate)
            yield from tuned(name, [(rho, x) for x in tried for rho in grid], make)
            setups[name] = named(name, *chosen[name])
        for seed in range(seeds):
            for name, setup in setups.items():
                job = Job(setup, rate, seed)
                if matched(name) in names:
                    yield from with_matched("steps", name, job, done)
                else:
                    yield Entry("steps", name, job)
                longer = GRADIENTS / setup.gradients(1_000)
                job = job._replace(longer=round(longer, 2))
                if job.longer != 1:
                    yield Entry("gradients", name, job)

    return plan


def best(
    done: Done,
    chosen: dict[str, Any],
    row: str,
    grid: Sequence[Any],
    make: Callable[[Any], tuple[Setup, float]],
) -> Iterator[Entry]:
    """The trials of a grid of numbers, or (ρ, α); puts the best into `chosen`.

    UserError is raised if all diverge.
    """
    jobs = {value: Job(*make(value), TUNING_SEED, True) for value in grid}
    chosen[row] = grid[0]
    if len(grid) > 1:
        for job in jobs.values():
            yield Entry("tuning", row, job)
        scores = {value: score(done[job]) for value, job in jobs.items()}
        if max(scores.values()) == -math.inf:
            values = [x[0] if isinstance(x, tuple) else x for x in grid]
            shown = ", ".join(f"{x:g}" for x in dict.fromkeys(values))
            raise UserError(
                f"{row}: training diverged in each trial, of {shown}; give smaller "
                "values"
            )
        chosen[row] = max(grid, key=scores.__getitem__)


def score(record: Record) -> float:
    """Validation accuracy of a trial, or minus its loss where that has none."""
    if "diverged" in record:
        return -math.inf
    if record.get("test_accuracy") is not None:
        return float(record["test_accuracy"])
    return -float(record["test_loss"])


def with_matched(table: str, row: str, job: Job, done: Done) -> Iterator[Entry]:
    """A job, then for Eigen-SAM the job of SAM at its mean ‖ε‖."""
    yield Entry(table, row, job)
    name, setup = job.method.optimizer, job.method.matched
    if setup is not None:
        own = row.replace(name, str(matched(name)), 1)
        setup = setup._replace(rho=done[job]["radius"])
        yield Entry(table, own, job._replace(method=setup))
