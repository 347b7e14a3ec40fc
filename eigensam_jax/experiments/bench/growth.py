"""`eigensam bench --growth`: how a step's cost grows with parameters and devices."""

import time
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from eigensam_jax.experiments.bench import contenders, placement, steps, workloads
from eigensam_jax.experiments.bench import plots as bench_plots
from eigensam_jax.experiments.bench import tables as bench_tables
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.records import progress, results, resumption
from eigensam_jax.experiments.registry import TRACKERS

OPTIMIZERS = ("sgd", "sam", "secant", "power_iteration")
WIDTHS = (12, 112, 676, 2790, 9610)  # 10⁴, 10⁵, … 10⁸ parameters, about
DEVICES = (1, 2, 4, 8)
DEVICES_WIDTH = 676

Record = dict[str, Any]


class Config(NamedTuple):
    """The options of the command; see `eigensam bench --help`."""

    batch_size: int
    dtype: str
    widths: tuple[int, ...]
    devices: tuple[int, ...]
    out: Path


def run(config: Config, command: str) -> None:
    """Compiles all; leaves `results.json` and `growth.png` in `config.out`.

    Nothing is run and no array is made: 10⁸ parameters take no memory.

    Args:
      config: what to compile; numbers of devices that there are not are left out.
      command: the command line, for the results file.

    Raises:
      UserError: for what can't be compiled, before any work is done.
    """
    console = Console()
    batch_size, most = config.batch_size, max(config.devices)
    if batch_size % most:
        raise UserError(
            f"--batch-size {batch_size} cannot be divided by {most} devices; use a "
            "multiple"
        )
    there = len(placement.available(most))
    config = config._replace(devices=tuple(n for n in config.devices if n <= there))
    results.make_folder(config.out)
    path, start = config.out / results.FILE, time.perf_counter()
    calls = {name: TRACKERS[name].call for name in OPTIMIZERS if name in TRACKERS}
    document = resumption.of_runs(path, command, protocol(config), calls)
    document["runs"] = [results.rounded(x) for x in records(config, console)]
    document["wall_time_s"] = time.perf_counter() - start
    document["complete"] = True
    results.write(path, document)
    bench_plots.growth(document["runs"], config.out / "growth.png")
    for table in bench_tables.growth_tables(document["runs"]):
        console.print(table)
    console.print(
        "Of a step on one device, by the compiled program; steps that are due every so "
        "many steps are weighed in. passes over SAM: bytes accessed beyond SAM's, in "
        "passes over the parameters.\n"
        f"Results: {path}   Plot: {config.out / 'growth.png'}   "
        f"Wall time: {document['wall_time_s']:.0f} s"
    )


def protocol(config: Config) -> dict[str, Any]:
    """All that the figures depend on."""
    return {
        "dtype": config.dtype,
        "batch_size": config.batch_size,
        "widths": list(config.widths),
        "devices": list(config.devices),
        "network": "mlp, 784-width-width-10",
    }


def records(config: Config, console: Console) -> list[Record]:
    """A record a network, number of devices and optimizer."""
    by_size = [("parameters", width, 1) for width in config.widths]
    by_devices = [("devices", DEVICES_WIDTH, count) for count in config.devices]
    every, result = contenders.make_contenders(), []
    with progress.shown(console) as bar:
        cases = by_size + by_devices
        task_id = bar.add_task("", total=len(cases) * len(OPTIMIZERS))
        for scaled, width, count in cases:
            placed = placement.data_parallel(placement.claim(count))
            task = steps.make_task(
                "mlp", workloads.mlp(width), config.batch_size, config.dtype, placed
            )
            for name in OPTIMIZERS:
                where = f"{task.parameters:,} parameters, {count} devices"
                bar.update(task_id, description=f"{name}, {where}")
                compiled = steps.compile_steps(task, every[name])
                result.append(
                    {
                        "scaled": scaled,
                        "parameters": task.parameters,
                        "devices": count,
                        "seed": workloads.SEED,
                        "optimizer": name,
                        **steps.figures(compiled),
                    }
                )
                bar.advance(task_id)
    return with_passes(result)


def with_passes(runs: list[Record]) -> list[Record]:
    """Adds `passes_over_sam`: bytes beyond SAM's, over four bytes a parameter."""

    def case(run: Record) -> tuple[Any, ...]:
        return run["scaled"], run["parameters"], run["devices"]

    sam = {
        case(run): run["bytes_accessed"] for run in runs if run["optimizer"] == "sam"
    }
    return [
        {
            **run,
            "passes_over_sam": (run["bytes_accessed"] - sam[case(run)])
            / (4 * run["parameters"]),
        }
        for run in runs
    ]
