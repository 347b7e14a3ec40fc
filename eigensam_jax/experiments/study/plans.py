"""What an experiment trains, in which order: jobs, some of which need others first.

A plan is a generator of jobs. Before it is asked for the next job, `done` holds the
record of the last one, so that a plan can choose by what it found.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from eigensam_jax.experiments.registry import METHODS, matched
from eigensam_jax.experiments.training.methods import Setup, named

TUNING_SEED = 1_000  # which no other run has

PARTS = (1, 4, 16)  # of a batch

Record = dict[str, Any]
Row = tuple[str, Setup]


class Job(NamedTuple):
    """A training run.

    Attributes:
      method: how it is trained.
      learning_rate: of SGD, at its start.
      seed: of the initialisation and of the order of the examples.
      tuning: on nine tenths of the training set, measured on the last tenth and not on
        the test set.
    """

    method: Setup
    learning_rate: float
    seed: int
    tuning: bool = False

    @property
    def record(self) -> Record:
        """What the record of this run says of it, field by field."""
        chosen = self._asdict()
        return {**chosen.pop("method")._asdict(), **chosen}


class Entry(NamedTuple):
    """A job, and where its record goes: several may be of the same job.

    Attributes:
      table: the name of the table.
      row: the name of the row.
      job: what is run.
    """

    table: str
    row: str
    job: Job


Done = Mapping[Job, Record]
Plan = Callable[[Done], Iterator[Entry]]


class Grids(NamedTuple):
    """What is tried on the validation split.

    Attributes:
      learning_rates: for SGD; the best is that of every method.
      rhos: ρ for SAM; the best is that of both Eigen-SAMs too.
      asam_rhos: ρ for ASAM.
      paper_alphas: α for Eigen-SAM with the paper's tracker.
      alphas: α for Eigen-SAM with the secant.
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
    """The plan of the named methods at the same ρ and α, seed by seed.

    SAM at the mean radius that a method had from the same seed comes after it.
    """

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
    """The plan that tunes each method on a validation split, then trains it anew.

    What a grid has several of is chosen by accuracy on the validation split, of one
    seed; on a tie the first. `sam_matched` is SAM at the mean radius that `eigen_sam`
    had from the same seed, `sam_matched_paper` at that of `eigen_sam_paper`. `plain` is
    the method that does not perturb.
    """

    def plan(done: Done) -> Iterator[Entry]:

        def best(
            row: str,
            grid: Sequence[float],
            make: Callable[[float], tuple[Setup, float]],
        ) -> Iterator[Entry]:
            jobs = {value: Job(*make(value), TUNING_SEED, True) for value in grid}
            chosen[row] = grid[0]
            if len(grid) > 1:
                for job in jobs.values():
                    yield Entry("tuning", row, job)
                chosen[row] = max(grid, key=lambda x: done[jobs[x]]["test_accuracy"])

        chosen: dict[str, float] = {}
        names = (plain, "sam", "asam", "eigen_sam_paper", "eigen_sam")
        yield from best(plain, grids.learning_rates, lambda x: (Setup(plain), x))
        rate = chosen[plain]
        yield from best("sam", grids.rhos, lambda x: (Setup("sam", x), rate))
        yield from best("asam", grids.asam_rhos, lambda x: (Setup("asam", x), rate))
        rho = chosen["sam"]
        for name, alphas in zip(names[3:], grids[3:], strict=True):
            make = lambda x, name=name: (named(name, rho, x), rate)
            yield from best(name, alphas, make)
        setups = {
            name: named(name, chosen["asam"] if name == "asam" else rho, chosen[name])
            for name in names
        }
        for seed in range(seeds):
            for row, setup in setups.items():
                yield from with_matched("main", row, Job(setup, rate, seed), done)

    return plan


def with_matched(table: str, row: str, job: Job, done: Done) -> Iterator[Entry]:
    """A job; after one of Eigen-SAM, SAM at the mean radius that it had."""
    yield Entry(table, row, job)
    name, setup = job.method.optimizer, job.method.matched
    if setup is not None:
        own = row.replace(name, str(matched(name)), 1)
        setup = setup._replace(rho=done[job]["radius"])
        yield Entry(table, own, job._replace(method=setup))


def ablations(
    tables: Sequence[str],
    rho: float,
    alpha: float,
    learning_rate: float,
    seeds: int,
    plain: str = "sgd",
) -> Plan:
    """The plan of the named tables of `ABLATIONS`, seed by seed.

    All but one begin with `plain`, the method that does not perturb.
    """

    def plan(done: Done) -> Iterator[Entry]:
        for seed in range(seeds):
            for table in tables:
                without = [] if table == "tracker" else [(plain, Setup(plain))]
                for row, setup in without + ABLATIONS[table](rho, alpha):
                    job = Job(setup, learning_rate, seed)
                    if table in MATCHED:
                        yield from with_matched(table, row, job, done)
                    else:
                        yield Entry(table, row, job)

    return plan


def _alpha(rho: float, alpha: float) -> list[Row]:
    del alpha
    rows = [("sam", Setup("sam", rho))]
    for value in (0.2, 0.5, 1.0, 2.0, 3.0):
        for name in ("eigen_sam_paper", "eigen_sam"):
            rows.append((f"{name}, α {value:g}", named(name, rho, value)))
    return rows


def _rho(rho: float, alpha: float) -> list[Row]:
    rows = []
    for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
        value = factor * rho
        for name in ("sam", "eigen_sam_paper", "eigen_sam"):
            rows.append((f"{name}, ρ {value:g}", named(name, value, alpha)))
    return rows


def _tracker(rho: float, alpha: float) -> list[Row]:
    secant = named("eigen_sam", rho, alpha)

    def products(name: str, num_products: int, interval: int) -> Row:
        method = Setup("eigen_sam", rho, alpha, name, num_products, interval)
        return f"{name}, {num_products} products every {interval} steps", method

    return [
        ("sam", Setup("sam", rho)),
        ("secant, every step", secant),
        ("secant, every 5 steps", secant._replace(update_interval=5)),
        products("ritz", 1, 20),
        products("lanczos", 5, 100),
        *(products("power_iteration", 5, interval) for interval in (10, 100, 1000)),
        *(products("power_iteration", count, 100) for count in (1, 20)),
    ]


def _when(rho: float, alpha: float) -> list[Row]:
    rows = []
    for name, method in _pair(rho, alpha):
        rows.append((f"{name}, every step", method))
        for every in (2, 5, 10):
            rows.append((f"{name}, every {every} steps", method._replace(every=every)))
        for last in (0.25, 0.1):
            row = f"{name}, the last {last:.0%} of steps"
            rows.append((row, method._replace(last=last)))
    return rows


def _norms(rho: float, alpha: float) -> list[Row]:
    rows = []
    for name, method in _pair(rho, alpha):
        rows.append((f"{name}, all parameters", method))
        for factor in (1.0, 2.0, 4.0):
            only = method._replace(rho=factor * rho, norms_only=True)
            rows.append((f"{name}, norms only, ρ {factor * rho:g}", only))
    return rows


def _parts(rho: float, alpha: float) -> list[Row]:
    rows = []
    for name, method in _pair(rho, alpha):
        for parts in PARTS:
            rows.append((f"{name}, {parts} parts", method._replace(parts=parts)))
    return rows


def _pair(rho: float, alpha: float) -> list[Row]:
    return [("sam", Setup("sam", rho)), ("eigen_sam", named("eigen_sam", rho, alpha))]


ABLATIONS: dict[str, Callable[[float, float], list[Row]]] = {
    "alpha": _alpha,
    "rho": _rho,
    "tracker": _tracker,
    "when": _when,
    "parts": _parts,
    "norms": _norms,
}
MATCHED = ("alpha",)
