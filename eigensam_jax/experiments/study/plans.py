"""What an experiment trains, in which order: jobs, some of which need others first.

A plan is a generator of jobs. Before it is asked for the next job, `done` holds the
record of the last one, so that a plan can choose by what it found.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from eigensam_jax.experiments.training.methods import Method, by_paper, by_secant, named

TUNING_SEED = 1_000  # which no other run has

PARTS = (1, 4, 16)  # of a batch

Record = dict[str, Any]
Row = tuple[str, Method]


class Job(NamedTuple):
    """A training run.

    Attributes:
      method: how it is trained.
      learning_rate: of SGD, at its start.
      seed: of the initialisation and of the order of the examples.
      tuning: on nine tenths of the training set, measured on the last tenth and not on
        the test set.
    """

    method: Method
    learning_rate: float
    seed: int
    tuning: bool = False


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
    names: Sequence[str], rho: float, alpha: float, learning_rate: float, seeds: int
) -> Plan:
    """The plan of the named methods at the same ρ and α, seed by seed.

    `sam_matched` is SAM at the mean radius that `eigen_sam` had from the same seed, and
    comes after it.
    """

    def plan(done: Done) -> Iterator[Entry]:
        for seed in range(seeds):
            for name in names:
                if name == "sam_matched":
                    continue
                job = Job(named(name, rho, alpha), learning_rate, seed)
                if name == "eigen_sam" and "sam_matched" in names:
                    yield from with_matched("main", name, job, done)
                else:
                    yield Entry("main", name, job)

    return plan


def accuracy(grids: Grids, seeds: int) -> Plan:
    """The plan that tunes each method on a validation split, then trains it anew.

    What a grid has several of is chosen by accuracy on the validation split, of one
    seed; on a tie the first. `sam_matched` is SAM at the mean radius that `eigen_sam`
    had from the same seed, `sam_matched_paper` at that of `eigen_sam_paper`.
    """

    def plan(done: Done) -> Iterator[Entry]:

        def best(
            row: str,
            grid: Sequence[float],
            make: Callable[[float], tuple[Method, float]],
        ) -> Iterator[Entry]:
            jobs = {value: Job(*make(value), TUNING_SEED, True) for value in grid}
            chosen[row] = grid[0]
            if len(grid) > 1:
                for job in jobs.values():
                    yield Entry("tuning", row, job)
                chosen[row] = max(grid, key=lambda x: done[jobs[x]]["test_accuracy"])

        chosen: dict[str, float] = {}
        paper, secant = "eigen_sam_paper", "eigen_sam"
        yield from best("sgd", grids.learning_rates, lambda x: (Method("sgd"), x))
        rate = chosen["sgd"]
        yield from best("sam", grids.rhos, lambda x: (Method("sam", x), rate))
        yield from best("asam", grids.asam_rhos, lambda x: (Method("asam", x), rate))
        rho = chosen["sam"]
        yield from best(paper, grids.paper_alphas, lambda x: (by_paper(rho, x), rate))
        yield from best(secant, grids.alphas, lambda x: (by_secant(rho, x), rate))
        rows = [
            ("sgd", Method("sgd")),
            ("sam", Method("sam", rho)),
            ("asam", Method("asam", chosen["asam"])),
            (paper, by_paper(rho, chosen[paper])),
            (secant, by_secant(rho, chosen[secant])),
        ]
        for seed in range(seeds):
            for row, method in rows:
                yield from with_matched("main", row, Job(method, rate, seed), done)

    return plan


def with_matched(table: str, row: str, job: Job, done: Done) -> Iterator[Entry]:
    """A job; after one of Eigen-SAM, SAM at the mean radius that it had."""
    yield Entry(table, row, job)
    if job.method.optimizer == "eigen_sam":
        matched = job.method._replace(
            optimizer="sam",
            rho=done[job]["radius"],
            alpha=0.0,
            tracker="",
            num_products=0,
            update_interval=1,
        )
        name = row.replace("eigen_sam", "sam_matched", 1)
        yield Entry(table, name, job._replace(method=matched))


def ablations(
    tables: Sequence[str], rho: float, alpha: float, learning_rate: float, seeds: int
) -> Plan:
    """The plan of the named tables of `ABLATIONS`, seed by seed."""

    def plan(done: Done) -> Iterator[Entry]:
        for seed in range(seeds):
            for table in tables:
                for row, method in ABLATIONS[table](rho, alpha):
                    job = Job(method, learning_rate, seed)
                    if table in MATCHED:
                        yield from with_matched(table, row, job, done)
                    else:
                        yield Entry(table, row, job)

    return plan


def _alpha(rho: float, alpha: float) -> list[Row]:
    del alpha
    rows = [("sgd", Method("sgd")), ("sam", Method("sam", rho))]
    for value in (0.2, 0.5, 1.0, 2.0, 3.0):
        rows.append((f"eigen_sam_paper, α {value:g}", by_paper(rho, value)))
        rows.append((f"eigen_sam, α {value:g}", by_secant(rho, value)))
    return rows


def _rho(rho: float, alpha: float) -> list[Row]:
    rows = [("sgd", Method("sgd"))]
    for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
        value = factor * rho
        rows.append((f"sam, ρ {value:g}", Method("sam", value)))
        rows.append((f"eigen_sam_paper, ρ {value:g}", by_paper(value, alpha)))
        rows.append((f"eigen_sam, ρ {value:g}", by_secant(value, alpha)))
    return rows


def _tracker(rho: float, alpha: float) -> list[Row]:
    def products(name: str, num_products: int, interval: int) -> Row:
        method = Method("eigen_sam", rho, alpha, name, num_products, interval)
        return f"{name}, {num_products} products every {interval} steps", method

    return [
        ("sam", Method("sam", rho)),
        ("secant, every step", by_secant(rho, alpha)),
        ("secant, every 5 steps", by_secant(rho, alpha)._replace(update_interval=5)),
        products("ritz", 1, 20),
        products("lanczos", 5, 100),
        *(products("power_iteration", 5, interval) for interval in (10, 100, 1000)),
        *(products("power_iteration", count, 100) for count in (1, 20)),
    ]


def _when(rho: float, alpha: float) -> list[Row]:
    rows = [("sgd", Method("sgd"))]
    for name, method in _pair(rho, alpha):
        rows.append((f"{name}, every step", method))
        for every in (2, 5, 10):
            rows.append((f"{name}, every {every} steps", method._replace(every=every)))
        for last in (0.25, 0.1):
            row = f"{name}, the last {last:.0%} of steps"
            rows.append((row, method._replace(last=last)))
    return rows


def _norms(rho: float, alpha: float) -> list[Row]:
    rows = [("sgd", Method("sgd"))]
    for name, method in _pair(rho, alpha):
        rows.append((f"{name}, all parameters", method))
        for factor in (1.0, 2.0, 4.0):
            only = method._replace(rho=factor * rho, norms_only=True)
            rows.append((f"{name}, norms only, ρ {factor * rho:g}", only))
    return rows


def _parts(rho: float, alpha: float) -> list[Row]:
    rows = [("sgd", Method("sgd"))]
    for name, method in _pair(rho, alpha):
        for parts in PARTS:
            rows.append((f"{name}, {parts} parts", method._replace(parts=parts)))
    return rows


def _pair(rho: float, alpha: float) -> list[Row]:
    return [("sam", Method("sam", rho)), ("eigen_sam", by_secant(rho, alpha))]


ABLATIONS: dict[str, Callable[[float, float], list[Row]]] = {
    "alpha": _alpha,
    "rho": _rho,
    "tracker": _tracker,
    "when": _when,
    "parts": _parts,
    "norms": _norms,
}
MATCHED = ("alpha",)
