"""The options of `eigensam bench`."""

import argparse
from typing import Any

from eigensam_jax.experiments import options
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.training.trackers import TRACKERS

# Spelt out here so that --help need not import what builds them.
BENCH_MODELS = ("wide_mlp", "strided_cnn", "resnet18", "vit")
BENCH_OPTIMIZERS = (
    *("sgd", "sam", "optax_sam"),
    *(name for name, spec in TRACKERS.items() if not spec.is_ceiling),
    *("torch_sgd", "torch_sam", "torch_eigen_sam"),
)

_BENCH_SMOKE: dict[str, Any] = {
    "models": ("wide_mlp",),
    "optimizers": ("power_iteration", "secant"),
    "batch_size": 128,
    "steps": 2,
}
_BENCH_USUAL: dict[str, Any] = {
    "models": BENCH_MODELS,
    "optimizers": None,
    "batch_size": None,
    "steps": 50,
}
_DTYPES = ("float32", "bfloat16")


def add_bench(commands: Any) -> None:
    """Adds `eigensam bench`."""
    bench = commands.add_parser(
        "bench",
        help="what does a training step cost?",
        description="Compile and time one training step with SGD, SAM and Eigen-SAM, "
        "on random images from a fixed seed: operations, bytes, memory and collectives "
        "of the compiled programs, and times in turns. Prints tables and leaves "
        "results.json and bench.png in --out. Figures of other networks that are there "
        "already are kept.",
    )
    add = bench.add_argument
    add(
        "--models",
        metavar="NAME",
        nargs="+",
        choices=BENCH_MODELS,
        help=f"some of {', '.join(BENCH_MODELS)} [all]",
    )
    add(
        "--optimizers",
        metavar="NAME",
        nargs="+",
        choices=BENCH_OPTIMIZERS,
        help=f"some of {', '.join(BENCH_OPTIMIZERS)}, beside sgd and sam; what is a "
        "tracker's name is eigen_sam by it, and torch_… is PyTorch [all that can be]",
    )
    add("--batch-size", **options.count(), help="[256; 32 for resnet18 and vit]")
    add(
        "--dtype",
        metavar="NAME",
        choices=_DTYPES,
        default="float32",
        help=f"of the computation; parameters are float32. {options.any_of(_DTYPES)}",
    )
    add(
        "--devices",
        **options.count(),
        help="how many, each with a part of the batch; a CPU is divided [1]",
    )
    add("--steps", **options.count(), help=f"rounds timed [{_BENCH_USUAL['steps']}]")
    add(
        "--growth",
        action="store_true",
        help="instead: cost against the number of parameters, to 10⁸, and of devices, "
        "to 8, by compilation alone; leaves growth.png",
    )
    options.add_out(bench, "one network, 2 rounds: does it run at all?")
    bench.set_defaults(run=_bench)


def _bench(chosen: argparse.Namespace, command: str) -> None:
    if chosen.growth:
        _growth(chosen, command)
        return
    with options.extras():
        from rich.console import Console

        from eigensam_jax.experiments.bench import run as bench
    preset = _BENCH_SMOKE if chosen.smoke else _BENCH_USUAL
    optimizers = chosen.optimizers or preset["optimizers"]
    config = bench.Config(
        models=tuple(dict.fromkeys(chosen.models or preset["models"])),
        optimizers=optimizers and tuple(dict.fromkeys(optimizers)),
        batch_size=chosen.batch_size or preset["batch_size"],
        dtype=chosen.dtype,
        devices=chosen.devices or 1,
        rounds=chosen.steps or preset["steps"],
        out=chosen.out,
    )
    bench.run(config, command, Console())


def _growth(chosen: argparse.Namespace, command: str) -> None:
    for name in ("models", "optimizers", "devices", "steps"):
        if getattr(chosen, name):
            raise UserError(f"--growth has its own --{name}; leave --{name} out")
    with options.extras():
        from rich.console import Console

        from eigensam_jax.experiments.bench import growth
    few = 2 if chosen.smoke else None
    config = growth.Config(
        batch_size=chosen.batch_size or 256,
        dtype=chosen.dtype,
        widths=growth.WIDTHS[:few],
        devices=growth.DEVICES[:few],
        out=chosen.out,
    )
    growth.run(config, command, Console())
