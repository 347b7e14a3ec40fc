"""`eigensam bench`: what a training step costs, by optimizer."""

import argparse
import time
from typing import Any

from rich.console import Console

from eigensam_jax.experiments.bench import (
    contenders,
    placement,
    steps,
    timing,
    torch_reference,
    wing,
    workloads,
)
from eigensam_jax.experiments.bench import tables as bench_tables
from eigensam_jax.experiments.bench.placement import Placement
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.records import progress, results, resumption
from eigensam_jax.experiments.registry import TRACKERS

BASELINES = ("sgd", "sam")

Record = dict[str, Any]


def run(chosen: argparse.Namespace, command: str) -> None:
    """Runs the benchmark; leaves `results.json` and `bench.png` in `--out`."""
    console = Console()
    names = {model: optimizers(chosen, model) for model in chosen.models}
    placed = placement.data_parallel(placement.claim(chosen.devices))
    results.make_folder(chosen.out)
    path = chosen.out / results.FILE
    calls = {name: spec.call for name, spec in TRACKERS.items() if not spec.is_ceiling}
    config = {
        "dtype": chosen.dtype,
        "devices": chosen.devices,
        "cores": placement.usable_cores(),
        "rho": contenders.RHO,
        "alpha": contenders.ALPHA,
        "learning_rate": contenders.LEARNING_RATE,
        "momentum": contenders.MOMENTUM,
        "seed": workloads.SEED,
        "data": "random images and labels",
    }
    document = resumption.of_runs(path, command, config, calls)
    order = list(workloads.WORKLOADS)
    for model in names:
        start = time.perf_counter()
        try:
            measured = measure(chosen, model, names[model], placed, console)
        except KeyboardInterrupt:
            done = ", ".join(bench_tables.networks(document["runs"]))
            console.print(
                f"{path} holds {done}." if done else "No network was finished."
            )
            raise
        seconds = {"wall_time_s": time.perf_counter() - start}
        measured = [results.rounded(run | seconds) for run in measured]
        others = [run for run in document["runs"] if run["model"] != model]
        document["runs"] = sorted(
            [*others, *measured], key=lambda run: order.index(run["model"])
        )
        networks = bench_tables.networks(document["runs"]).values()
        document["wall_time_s"] = sum(runs[0]["wall_time_s"] for runs in networks)
        document["complete"] = model == list(names)[-1]
        results.write(path, document)
        for table in bench_tables.network_tables(measured):
            console.print(table)
    wing.plots(document, chosen.out)
    console.print(bench_tables.EXPLANATION)
    console.print(results.ending(path, document, "bench.png"))


def optimizers(chosen: argparse.Namespace, model: str) -> list[str]:
    """The baselines, and the chosen optimizers or all that can be measured here.

    Raises:
      UserError: if the batch size or a chosen optimizer is not possible.
    """
    batch_size = chosen.batch_size or workloads.WORKLOADS[model].batch_size
    if batch_size % chosen.devices:
        raise UserError(
            f"--batch-size {batch_size} of {model} cannot be divided by --devices "
            f"{chosen.devices}; use a multiple"
        )
    missing = _without_torch(chosen, model)
    known = [*contenders.NAMES, *(() if missing else torch_reference.METHODS)]
    wanted = [*BASELINES, *(chosen.optimizers or known)]
    for name in wanted:
        if name not in known:
            raise UserError(f"--optimizers {name}: {missing}")
    return [name for name in known if name in wanted]


def measure(
    chosen: argparse.Namespace,
    model: str,
    names: list[str],
    placed: Placement,
    console: Console,
) -> list[Record]:
    """All figures of one network: a record per unit and optimizer."""
    workload = workloads.WORKLOADS[model]
    batch_size = chosen.batch_size or workload.batch_size
    task = steps.make_task(model, workload, batch_size, chosen.dtype, placed)
    every = contenders.make_contenders()
    ours = {name: every[name] for name in names if name in every}
    compiled: dict[str, steps.Steps] = {}
    with progress.shown(console) as bar:
        task_id = bar.add_task(f"{model}: compiling", total=len(ours) + chosen.steps)
        units = steps.compile_units(task)
        for name, contender in ours.items():
            bar.update(task_id, description=f"{model}: compiling {name}")
            compiled[name] = steps.compile_steps(task, contender)
            bar.advance(task_id)
        bar.update(task_id, description=f"{model}: timing")
        torch_version = None
        if len(ours) < len(names):
            torch_version = torch_reference.start(placement.usable_cores())
        timed = timing.make_turns(task, names, ours, compiled)
        times = timing.in_turns(timed, chosen.steps, lambda: bar.advance(task_id))
    shared = {
        "model": model,
        "seed": workloads.SEED,
        "parameters": task.parameters,
        "batch_size": batch_size,
        "devices": chosen.devices,
        "rounds": chosen.steps,
    }
    by_name: dict[str, Record] = {name: unit.figures() for name, unit in units.items()}
    for name in names:
        own: Record = {"torch": torch_version}
        if name in compiled:
            own = steps.figures(compiled[name])
        rounds, due = times[name]
        own |= {"time_s": timing.quartiles(rounds), "due_time_s": due}
        for base in BASELINES:
            ratios = rounds / times[base].rounds
            own[f"time_to_{base}"] = timing.quartiles(ratios)
        by_name[name] = own
    return [{**shared, "optimizer": name, **x} for name, x in by_name.items()]


def _without_torch(chosen: argparse.Namespace, model: str) -> str | None:
    """Why PyTorch cannot take part; None if it can."""
    if model not in torch_reference.NETWORKS:
        known = " ".join(torch_reference.NETWORKS)
        return f"there is no {model} in PyTorch here; use --models {known}"
    if chosen.devices > 1 or chosen.dtype != "float32":
        return "it runs on one device in float32; leave --devices and --dtype out"
    if not torch_reference.is_installed():
        return "PyTorch is not installed; pip install torch"
    return None
