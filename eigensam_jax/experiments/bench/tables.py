"""Tables of what `eigensam bench` found."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from eigensam_jax.experiments.records import results, tables

Record = Mapping[str, Any]

UNITS = ("gradient", "hvp")  # in the place of an optimizer's name
SHARED = ("model", "parameters", "batch_size", "devices", "rounds", "wall_time_s")

HEADERS = ("optimizer", "ops", "MB", "MiB", "compile", "ms", "÷ SGD", "÷ SAM")
EXPLANATION = (
    "ops: operations of a step, in gradients. MB: bytes accessed. MiB: temporary "
    "memory. compile: time to compile, in SAM's. ms: median time of a step, and its "
    "ratios: median, and the quartiles around it. A step that is due every so many "
    "steps is weighed in. Random images and labels from a fixed seed."
)


def networks(runs: Sequence[Record]) -> list[Record]:
    """What the records of a results file say of each network, with all of them.

    `units` holds those of a gradient and a product, `optimizers` the others.
    """
    result: dict[str, dict[str, Any]] = {}
    for run in runs:
        shared = {key: run[key] for key in SHARED}
        empty: dict[str, Any] = {"units": {}, "optimizers": {}}
        network = result.setdefault(run["model"], shared | empty)
        kind = "units" if run["optimizer"] in UNITS else "optimizers"
        network[kind][run["optimizer"]] = run
    return list(result.values())


def network_tables(record: Record) -> list[Table]:
    """The figures of one network, and below them what its devices exchange, if any."""
    units = record["units"]
    product = units["hvp"]["operations"] / units["gradient"]["operations"]
    title = (
        f"{record['model']}: {record['parameters']:,} parameters, "
        f"batch {record['batch_size']}, {record['rounds']} rounds, "
        f"an HVP is {product:.2f} ops"
    )
    result = [tables.table(title, HEADERS, summary(record))]
    if record["devices"] > 1:
        title = f"{record['model']} on {record['devices']} devices"
        headers = ("optimizer", "exchanges", "MB exchanged")
        result.append(tables.table(title, headers, exchanges(record)))
    return result


def summary(record: Record) -> list[list[str]]:
    """A row an optimizer of the record of one network, by `HEADERS`."""
    gradient, sam = record["units"]["gradient"], record["optimizers"]["sam"]
    rows = []
    for name, run in record["optimizers"].items():
        compiled = ["–"] * 4  # nothing is known of another library's programs
        if "operations" in run:
            compiled = [
                f"{run['operations'] / gradient['operations']:.3f}",
                f"{run['bytes_accessed'] / 1e6:.4g}",
                f"{run['temp_bytes'] / 2**20:.4g}",
                f"{run['compile_s'] / sam['compile_s']:.2f}",
            ]
        low, middle, high = run["time_to_sam"]
        rows.append(
            [
                name,
                *compiled,
                f"{1e3 * run['time_s'][1]:.4g}",
                f"{run['time_to_sgd'][1]:.2f}",
                f"{middle:.3f} ({low:.2f}–{high:.2f})",
            ]
        )
    return rows


def across(records: Sequence[Record]) -> list[list[str]]:
    """A row an optimizer: operations, and time over SAM's, of each network."""
    summaries = [{row[0]: row for row in summary(record)} for record in records]
    names = dict.fromkeys(name for rows in summaries for name in rows)
    result = []
    for name in names:
        cells = [name]
        for rows in summaries:
            row = rows.get(name)
            cells += [row[1], row[-1].split()[0]] if row else ["–", "–"]
        result.append(cells)
    return result


def exchanges(record: Record) -> list[list[str]]:
    """A row an optimizer: how many exchanges between devices, and of how much."""
    return [
        [name, f"{run['collectives']:.4g}", f"{run['collective_bytes'] / 1e6:.4g}"]
        for name, run in record["optimizers"].items()
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
    """A row a size and optimizer: operations, bytes, memory, passes more than SAM's."""
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
    """A row a number of devices and optimizer: operations and what is exchanged."""
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
