"""The tables of `eigensam ablate`, each of which changes one thing."""

from collections.abc import Callable, Iterator, Sequence

from eigensam_jax.experiments.study.plans import Done, Entry, Job, Plan, with_matched
from eigensam_jax.experiments.training.methods import Setup, named

PARTS = (1, 4, 16)  # of a batch

Row = tuple[str, Setup]


def ablations(
    tables: Sequence[str],
    rho: float,
    alpha: float,
    learning_rate: float,
    seeds: int,
    plain: str = "sgd",
) -> Plan:
    """The plan of the named tables of `ABLATIONS`, seed by seed.

    All but `tracker` begin with `plain`, the method that does not perturb.
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
