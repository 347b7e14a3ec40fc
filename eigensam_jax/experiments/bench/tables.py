"""The tables of `eigensam bench`."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from eigensam_jax.experiments.records import results, tables

Record = Mapping[str, Any]

UNITS = ("gradient", "hvp")  # recorded like optimizers

HEADERS = ("optimizer", "ops", "MB", "MiB", "compile", "ms", "÷ SGD", "÷ SAM")
EXPLANATION = (
    "ops: operations of a step, in gradients. MB: bytes accessed. MiB: temporary "
    "memory. compile: time to compile, in SAM's. ms: median time of a step, and its "
    "ratios: median, and the quartiles around it. A step that is due every so many "
    "steps is weighed in. Random images and labels from a fixed seed."
)


def networks(runs: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each network."""
    names = dict.fromkeys(run["model"] for run in runs)
    return {name: results.select(runs, model=name) for name in names}


def named(runs: Sequence[Record]) -> tuple[dict[str, Record], dict[str, Record]]:
    """One network's records by name: the units', and the optimizers'."""
    found = {run["optimizer"]: run for run in runs}
    return {name: found.pop(name) for name in UNITS}, found


def network_tables(runs: Sequence[Record]) -> list[Table]:
    """The figures of one network and, with several devices, their exchanges."""
    (gradient, product), run = named(runs)[0].values(), runs[0]
    title = (
        f"{run['model']}: {run['parameters']:,} parameters, batch {run['batch_size']}, "
        f"{run['rounds']} rounds, an HVP is "
        f"{product['operations'] / gradient['operations']:.2f} ops"
    )
    result = [tables.table(title, HEADERS, summary(runs))]
    if run["devices"] > 1:
        title = f"{run['model']} on {run['devices']} devices"
        headers = ("optimizer", "exchanges", "MB exchanged")
        result.append(tables.table(title, headers, exchanges(runs)))
    return result


def summary(runs: Sequence[Record]) -> list[list[str]]:
    """A row per optimizer of one network, by `HEADERS`."""
    units, optimizers = named(runs)
    gradient, sam = units["gradient"], optimizers["sam"]
    rows = []
    for name, run in optimizers.items():
        compiled = ["–"] * 4  # programs of other libraries are unknown
        if "operations" in run:
            compiled = [
                f"{run['operations'] / gradient['operations']:.3f}",
                f"{run['bytes_accessed'] / 1e6:.4g}",
                f"{run['temp_bytes'] / 2**20:.4g}",
                f"{run['compile_s'] / sam['compile_s']:.2f}",
            ]
        low, middle, high = run["time_to_sam"]
        times = (f"{1e3 * run['time_s'][1]:.4g}", f"{run['time_to_sgd'][1]:.2f}")
        rows.append([name, *compiled, *times, f"{middle:.3f} ({low:.2f}–{high:.2f})"])
    return rows


def across(runs: Sequence[Record]) -> list[list[str]]:
    """A row per optimizer: operations, and time over SAM's, on each network."""
    of_networks = [summary(network) for network in networks(runs).values()]
    names = dict.fromkeys(row[0] for rows in of_networks for row in rows)
    cells = [
        {row[0]: [row[1], row[-1].split()[0]] for row in rows} for rows in of_networks
    ]
    return [[x, *(y for of in cells for y in of.get(x, ["–", "–"]))] for x in names]


def exchanges(runs: Sequence[Record]) -> list[list[str]]:
    """A row per optimizer: the number and size of exchanges between devices."""
    return [
        [name, f"{run['collectives']:.4g}", f"{run['collective_bytes'] / 1e6:.4g}"]
        for name, run in named(runs)[1].items()
        if "collectives" in run
    ]


def growth_tables(runs: Sequence[Record]) -> list[Table]:
    """Cost against parameters and against devices."""
    return [
        tables.table(
            "cost against parameters",
            ("parameters", "optimizer", "Gop", "MB", "MiB", "passes over SAM"),
            growth_summary(runs),
        ),
        tables.table(
            "cost on each of several devices",
            ("devices", "optimizer", "Gop", "exchanges", "MB exchanged"),
            devices_summary(runs),
        ),
    ]


def growth_summary(runs: Sequence[Record]) -> list[list[str]]:
    """A row per size and optimizer: operations, bytes, memory, passes over SAM's."""
    return [
        [
            f"{run['parameters']:,}",
            run["optimizer"],
            f"{run['operations'] / 1e9:.4g}",
            f"{run['bytes_accessed'] / 1e6:.4g}",
            f"{run['temp_bytes'] / 2**20:.4g}",
            f"{run['passes_over_sam']:+.2f}",
        ]
        for run in results.select(runs, scaled="parameters")
    ]


def devices_summary(runs: Sequence[Record]) -> list[list[str]]:
    """A row per number of devices and optimizer: operations and exchanges."""
    return [
        [
            f"{run['devices']}",
            run["optimizer"],
            f"{run['operations'] / 1e9:.4g}",
            f"{run['collectives']:.4g}",
            f"{run['collective_bytes'] / 1e6:.4g}",
        ]
        for run in results.select(runs, scaled="devices")
    ]
