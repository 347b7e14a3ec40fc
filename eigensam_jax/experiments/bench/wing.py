"""`eigensam bench`: its options, tables and plots."""

import argparse
from pathlib import Path
from typing import Any

from eigensam_jax.experiments import options
from eigensam_jax.experiments.bench import contenders, torch_reference, workloads

Document = dict[str, Any]

_MODELS = tuple(workloads.WORKLOADS)
_OPTIMIZERS = (*contenders.NAMES, *torch_reference.METHODS)
_SMOKE: dict[str, Any] = {
    "models": ("wide_mlp",),
    "optimizers": ("power_iteration", "secant"),
    "batch_size": 128,
    "steps": 2,
}
_USUAL: dict[str, Any] = {
    "models": _MODELS,
    "optimizers": None,
    "batch_size": None,
    "devices": 1,
    "steps": 50,
}


def add_command(subparsers: Any) -> None:
    """Adds `eigensam bench`."""
    bench = subparsers.add_parser(
        "bench",
        help="measure the cost of a training step",
        description="Compile and time one training step with SGD, SAM and Eigen-SAM, "
        "on random images from a fixed seed: operations, bytes, memory and collectives "
        "of the compiled programs, and times in turns. Prints tables and leaves "
        "results.json and bench.png in --out. Earlier results of other networks are "
        "kept.",
    )
    options.add_choices(bench, "models", _MODELS)
    options.add_choices(
        *(bench, "optimizers", _OPTIMIZERS),
        "; sgd and sam always run. A tracker's name stands for eigen_sam with it, "
        "torch_… for PyTorch [all available]",
    )
    options.add_counts(bench, {"batch-size": "[256; 32 for resnet18 and vit]"})
    what = "dtype of the computation; parameters are float32: "
    options.add_choice(bench, "dtype", ("float32", "bfloat16"), "float32", what)
    counts = {
        "devices": "number of devices that share the batch; a CPU is divided [1]",
        "steps": f"timed rounds [{_USUAL['steps']}]",
    }
    options.add_counts(bench, counts)
    bench.add_argument(
        "--growth",
        action="store_true",
        help="only compile, for up to 10⁸ parameters and 8 devices; leaves growth.png",
    )
    options.add_out(bench, "quick check: one network, 2 rounds")


def run(chosen: argparse.Namespace, command: str) -> None:
    """Measures what was chosen; leaves `results.json` and a plot in `--out`."""
    if chosen.growth:
        from eigensam_jax.experiments.bench import growth

        growth.run(chosen, command)
    else:
        from eigensam_jax.experiments.bench import run as bench

        bench.run(options.filled(chosen, _USUAL, _SMOKE), command)


def tables(results: list[Document]) -> dict[str, Any]:
    """Functions from a page's argument to rows, by the table's name."""
    from eigensam_jax.experiments.bench import tables as made

    runs = results[0]["runs"]
    return {
        "bench": lambda model: made.summary(made.networks(runs)[model]),
        "bench_across": lambda _: made.across(runs),
        "growth": lambda _: made.growth_summary(runs),
        "devices": lambda _: made.devices_summary(runs),
    }


def plots(results: Document, folder: Path) -> None:
    """Draws the plot of a results file."""
    from eigensam_jax.experiments.bench import plots as drawn

    grown = "scaled" in results["runs"][0]
    draw, name = (drawn.growth, "growth") if grown else (drawn.bench, "bench")
    draw(results["runs"], folder / f"{name}.png")
