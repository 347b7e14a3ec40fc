"""The options of `eigensam track` and `eigensam bench`."""

import argparse
from typing import Any

from eigensam_jax.experiments import options
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.track.trackers import TRACKERS

# Spelt out here so that --help need not import what builds them.
BENCH_MODELS = ("wide_mlp", "strided_cnn", "resnet18", "vit")
BENCH_OPTIMIZERS = (
    *("sgd", "sam", "optax_sam"),
    *(name for name, spec in TRACKERS.items() if not spec.is_ceiling),
    *("torch_sgd", "torch_sam", "torch_eigen_sam"),
)

_TRACK_SMOKE: dict[str, Any] = {
    "seeds": 1,
    "steps": 20,
    "evaluations": 2,
    "alpha": [1.0],
    "trackers": [name for name, spec in TRACKERS.items() if not spec.is_ceiling],
}
_TRACK_USUAL: dict[str, Any] = {
    "seeds": 5,
    "steps": 1200,
    "evaluations": 10,
    "alpha": [0.2, 1.0],
    "trackers": list(TRACKERS),
}
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


def add_track(commands: Any) -> None:
    """Adds `eigensam track`."""
    track = commands.add_parser(
        "track",
        help="how well does each tracker follow the top eigenvector?",
        description="Train a network with Eigen-SAM by each tracker, and SAM at the "
        "radius of each run. Prints tables and leaves results.json and track.png in "
        "--out. Runs that are there already are kept: the same command goes on where "
        "it was interrupted, and a tracker, an α or a seed can be added.",
    )
    add = track.add_argument
    options.add_problem(track, options.SMALL_MODELS)
    add(
        "--trackers",
        metavar="NAME",
        nargs="+",
        choices=tuple(TRACKERS),
        help=f"some of {', '.join(TRACKERS)} [all]",
    )
    add(
        "--alpha",
        metavar="X",
        nargs="+",
        type=options.number(float, above=0),
        help="α, one or several [0.2 1]",
    )
    add("--seeds", **options.count(), help=f"how many [{_TRACK_USUAL['seeds']}]")
    add("--steps", **options.count(), help=f"a run [{_TRACK_USUAL['steps']}]")
    options.add_out(track, "1 seed, 20 steps: does it run at all?")
    track.set_defaults(run=_track)


def _track(chosen: argparse.Namespace, command: str) -> None:
    with options.extras():
        from rich.console import Console

        from eigensam_jax.experiments.track import run as track
    preset = _TRACK_SMOKE if chosen.smoke else _TRACK_USUAL
    config = track.Config(
        dataset=chosen.dataset,
        data_dir=chosen.data_dir,
        model=chosen.model,
        trackers=tuple(dict.fromkeys(chosen.trackers or preset["trackers"])),
        alphas=tuple(dict.fromkeys(chosen.alpha or preset["alpha"])),
        seeds=chosen.seeds or preset["seeds"],
        steps=chosen.steps or preset["steps"],
        evaluations=preset["evaluations"],
        out=chosen.out,
    )
    track.run(config, command, Console())


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
