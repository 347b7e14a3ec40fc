"""`eigensam bench`: what a training step costs, by each optimizer."""

import time
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from eigensam_jax.experiments.bench import (
    contenders,
    placement,
    steps,
    timing,
    torch_reference,
    turns,
    workloads,
)
from eigensam_jax.experiments.bench import plots as bench_plots
from eigensam_jax.experiments.bench import tables as bench_tables
from eigensam_jax.experiments.bench.placement import Placement
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.records import progress, results, resumption
from eigensam_jax.experiments.registry import TRACKERS

BASELINES = ("sgd", "sam")

Record = dict[str, Any]


class Config(NamedTuple):
    """The options of the command; see `eigensam bench --help`."""

    models: tuple[str, ...]
    optimizers: tuple[str, ...] | None
    batch_size: int | None
    dtype: str
    devices: int
    rounds: int
    out: Path


def run(config: Config, command: str) -> None:
    """Runs the benchmark; leaves `results.json` and `bench.png` in `config.out`.

    Figures of other networks that are there already are kept, those of the same network
    are replaced.

    Args:
      config: what to run.
      command: the command line, for the results file.

    Raises:
      UserError: for what can't be run, before any work is done.
      KeyboardInterrupt: passed on, with the finished networks on disk.
    """
    console = Console()
    names = {model: optimizers(config, model) for model in config.models}
    placed = placement.data_parallel(placement.claim(config.devices))
    results.make_folder(config.out)
    path = config.out / results.FILE
    calls = {name: spec.call for name, spec in TRACKERS.items() if not spec.is_ceiling}
    document = resumption.of_runs(path, command, protocol(config), calls)
    for model in config.models:
        start = time.perf_counter()
        try:
            measured = measure(config, model, names[model], placed, console)
        except KeyboardInterrupt:
            done = ", ".join(dict.fromkeys(run["model"] for run in document["runs"]))
            console.print(
                f"{path} holds {done}." if done else "No network was finished."
            )
            raise
        seconds = {"wall_time_s": time.perf_counter() - start}
        measured = [results.rounded({**run, **seconds}) for run in measured]
        others = [run for run in document["runs"] if run["model"] != model]
        document["runs"] = in_order([*others, *measured])
        networks = bench_tables.networks(document["runs"])
        document["wall_time_s"] = sum(x["wall_time_s"] for x in networks)
        document["complete"] = model == config.models[-1]
        results.write(path, document)
        for table in bench_tables.network_tables(*bench_tables.networks(measured)):
            console.print(table)
    bench_plots.bench(document["runs"], config.out / "bench.png")
    console.print(bench_tables.EXPLANATION)
    console.print(
        f"Results: {path}   Plot: {config.out / 'bench.png'}   "
        f"Wall time: {document['wall_time_s']:.0f} s"
    )


def in_order(runs: list[Record]) -> list[Record]:
    """As `workloads.WORKLOADS` has the networks, whenever they were measured."""
    order = list(workloads.WORKLOADS)
    return sorted(runs, key=lambda run: order.index(run["model"]))


def optimizers(config: Config, model: str) -> list[str]:
    """What to measure on this network: the baselines, and what is asked for or all.

    Raises:
      UserError: for what is asked for and can't be, on any device.
    """
    batch_size = config.batch_size or workloads.WORKLOADS[model].batch_size
    if batch_size % config.devices:
        raise UserError(
            f"--batch-size {batch_size} of {model} cannot be divided by --devices "
            f"{config.devices}; use a multiple"
        )
    ours = list(contenders.make_contenders())
    torch = [] if _without_torch(config, model) else list(torch_reference.METHODS)
    if config.optimizers is None:
        return ours + torch
    for name in config.optimizers:
        if name not in ours + torch:
            raise UserError(f"--optimizers {name}: {_without_torch(config, model)}")
    chosen = {*BASELINES, *config.optimizers}
    return [name for name in ours + torch if name in chosen]


def protocol(config: Config) -> dict[str, Any]:
    """All that the figures of every network depend on."""
    return {
        "dtype": config.dtype,
        "devices": config.devices,
        "cores": placement.usable_cores(),
        "rho": contenders.RHO,
        "alpha": contenders.ALPHA,
        "learning_rate": contenders.LEARNING_RATE,
        "momentum": contenders.MOMENTUM,
        "seed": workloads.SEED,
        "data": "random images and labels",
    }


def measure(
    config: Config, model: str, names: list[str], placed: Placement, console: Console
) -> list[Record]:
    """All figures of one network: a record a unit and an optimizer."""
    workload = workloads.WORKLOADS[model]
    batch_size = config.batch_size or workload.batch_size
    task = steps.make_task(model, workload, batch_size, config.dtype, placed)
    every = contenders.make_contenders()
    ours = {name: every[name] for name in names if name in every}
    with progress.shown(console) as bar:
        task_id = bar.add_task("", total=len(ours) + config.rounds)

        def say(what: str) -> None:
            bar.update(task_id, description=f"{model}: {what}")

        def advance() -> None:
            bar.advance(task_id)

        say("compiling")
        units = steps.compile_units(task)
        compiled: dict[str, steps.Steps] = {}
        for name, contender in ours.items():
            say(f"compiling {name}")
            compiled[name] = steps.compile_steps(task, contender)
            advance()
        say("timing")
        timed = turns.make_turns(task, workload, ours, compiled)
        torch_version = None
        if any(name in torch_reference.METHODS for name in names):
            torch_version = torch_reference.start(placement.usable_cores())
            timed |= turns.make_torch_turns(task, workload, names)
        times = timing.in_turns(timed, config.rounds, advance)
    shared = {
        "model": model,
        "seed": workloads.SEED,
        "parameters": task.parameters,
        "batch_size": batch_size,
        "devices": config.devices,
        "rounds": config.rounds,
    }
    by_name: dict[str, Record] = {name: unit.figures() for name, unit in units.items()}
    for name in names:
        own: Record = {"torch": torch_version}
        if name in compiled:
            own = steps.figures(compiled[name])
        by_name[name] = {**own, **times_of(times, name)}
    return [{**shared, "optimizer": name, **x} for name, x in by_name.items()]


def times_of(times: dict[str, timing.Times], name: str) -> Record:
    """Quartiles of an optimizer's time and of its ratios, for the results file."""
    rounds = times[name].rounds
    return {
        "time_s": timing.quartiles(rounds),
        "due_time_s": times[name].due,
        **{
            f"time_to_{base}": timing.quartiles(rounds / times[base].rounds)
            for base in BASELINES
        },
    }


def _without_torch(config: Config, model: str) -> str | None:
    """Why PyTorch has no part in this; None where it has."""
    if model not in torch_reference.NETWORKS:
        known = " ".join(torch_reference.NETWORKS)
        return f"there is no {model} in PyTorch here; use --models {known}"
    if config.devices > 1 or config.dtype != "float32":
        return "it runs on one device in float32; leave --devices and --dtype out"
    if not torch_reference.is_installed():
        return "PyTorch is not installed; pip install torch"
    return None
