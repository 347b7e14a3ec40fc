"""`eigensam bench --growth`: how a step's cost grows with parameters and devices."""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

from rich.console import Console

from eigensam_jax.experiments.bench import contenders, placement, steps, wing, workloads
from eigensam_jax.experiments.bench import tables as bench_tables
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.records import progress, results, resumption
from eigensam_jax.experiments.registry import TRACKERS

OPTIMIZERS = ("sgd", "sam", "secant", "power_iteration")
WIDTHS = (12, 112, 676, 2790, 9610)  # 10⁴, 10⁵, … 10⁸ parameters, about
DEVICES = (1, 2, 4, 8)
DEVICES_WIDTH = 676
BATCH_SIZE = 256

Record = dict[str, Any]


def run(chosen: argparse.Namespace, command: str) -> None:
    """Compiles all; leaves `results.json` and `growth.png` in `--out`.

    Nothing is run and no array is made: 10⁸ parameters take no memory. Unavailable
    numbers of devices are left out. Figures of the same configuration are kept.
    """
    for name in ("models", "optimizers", "devices", "steps"):
        if getattr(chosen, name):
            raise UserError(f"--growth has its own --{name}; leave --{name} out")
    console, few = Console(), 2 if chosen.smoke else None
    batch_size, devices = chosen.batch_size or BATCH_SIZE, DEVICES[:few]
    if batch_size % max(devices):
        raise UserError(
            f"--batch-size {batch_size} cannot be divided by {max(devices)} devices; "
            "use a multiple"
        )
    there = len(placement.available(max(devices)))
    config = {
        "dtype": chosen.dtype,
        "batch_size": batch_size,
        "widths": list(WIDTHS[:few]),
        "devices": [count for count in devices if count <= there],
        "network": "mlp, 784-width-width-10",
    }
    results.make_folder(chosen.out)
    path = chosen.out / results.FILE
    calls = {name: TRACKERS[name].call for name in OPTIMIZERS if name in TRACKERS}
    document = resumption.of_runs(path, command, config, calls)
    resumption.add_runs(path, document, _records(document, console), console)
    wing.plots(document, chosen.out)
    for table in bench_tables.growth_tables(document["runs"]):
        console.print(table)
    console.print(
        "Of a step on one device, by the compiled program; steps that are due every so "
        "many steps are weighed in. passes over SAM: bytes accessed beyond SAM's, in "
        "passes over the parameters.\n"
        f"{results.ending(path, document, 'growth.png')}"
    )


def _records(document: Record, console: Console) -> Iterator[list[Record]]:
    """Yields the missing records, one network and number of devices at a time."""
    config, every, work = document["config"], contenders.make_contenders(), []

    def compiled(
        task: steps.Task, shared: Record, advance: progress.Advance
    ) -> list[Record]:
        found = {}
        for name in OPTIMIZERS:
            figures = steps.figures(steps.compile_steps(task, every[name]))
            found[name] = {**shared, "optimizer": name, **figures}
            advance(1)
        for figures in found.values():  # a pass is four bytes per parameter
            beyond = figures["bytes_accessed"] - found["sam"]["bytes_accessed"]
            figures["passes_over_sam"] = beyond / (4 * task.parameters)
        return list(found.values())

    for scaled, width, count in (
        *(("parameters", width, 1) for width in config["widths"]),
        *(("devices", DEVICES_WIDTH, count) for count in config["devices"]),
    ):
        placed = placement.data_parallel(placement.claim(count))
        task = steps.make_task(
            "mlp", workloads.mlp(width), config["batch_size"], config["dtype"], placed
        )
        shared = {"scaled": scaled, "parameters": task.parameters, "devices": count}
        shared["seed"] = workloads.SEED
        if not results.select(document["runs"], **shared):
            name = f"{task.parameters:,} parameters, {count} devices"
            work.append((name, partial(compiled, task, shared)))
    return progress.done(work, len(work) * len(OPTIMIZERS), console)
