"""`eigensam track`: how well each tracker follows the top eigenvector in training."""

import argparse
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

from rich.console import Console

from eigensam_jax.experiments import registry
from eigensam_jax.experiments.data import load
from eigensam_jax.experiments.data.load import Dataset
from eigensam_jax.experiments.records import progress, results, resumption, tables
from eigensam_jax.experiments.registry import TRACKERS
from eigensam_jax.experiments.track import looks, wing
from eigensam_jax.experiments.track import tables as track_tables
from eigensam_jax.experiments.training import loop, measures
from eigensam_jax.experiments.training.methods import named

RHO = 0.1
BATCH_SIZE = 128
TRAIN_EXAMPLES = 10_000

Record = dict[str, Any]


def run(chosen: argparse.Namespace, command: str) -> None:
    """Runs the benchmark; leaves `results.json` and `track.png` in `--out`."""
    console = Console()
    dataset = registry.dataset(chosen.dataset, chosen.data_dir)
    dataset = load.first(dataset, TRAIN_EXAMPLES)
    available = len(dataset.train_labels)
    loop.check_batch_size(BATCH_SIZE, chosen.dataset, available, is_option=False)
    results.make_folder(chosen.out)
    path = chosen.out / results.FILE
    calls = {name: TRACKERS[name].call for name in chosen.trackers}
    config = {  # everything that runs depend on, beside the job
        "dataset": chosen.dataset,
        "data_dir": chosen.data_dir and str(chosen.data_dir),
        "model": chosen.model,
        "rho": RHO,
        "steps": chosen.steps,
        "batch_size": BATCH_SIZE,
        "learning_rate": chosen.learning_rate,
        "evaluations": list(looks.look_steps(chosen.steps, chosen.evaluations)),
        **loop.protocol(dataset, chosen.base_optimizer, chosen.weight_decay),
        "curvature_examples": min(available, measures.CURVATURE_EXAMPLES),
        "curvature_tolerance": measures.CURVATURE_TOLERANCE,
    }
    document = resumption.of_runs(path, command, config, calls, seeds=chosen.seeds)
    missing = _records(chosen, dataset, document, console)
    in_order = lambda runs: sorted(runs, key=lambda x: (x["seed"], x["alpha"] or 0.0))
    resumption.add_runs(path, document, missing, console, in_order)
    wing.plots(document, chosen.out)
    title = registry.title(config)
    runs = document["runs"]
    for alpha in track_tables.alphas(runs):
        console.print(track_tables.table(runs, alpha, title))
    console.print(
        "Mean ± standard deviation over seeds; worst: the least of all looks. HVPs: "
        "Hessian-vector products per 100 steps. ratio: vᵀHv/λ_max of the v that a step "
        f"uses, and |cos| with the true one, on {config['curvature_examples']} "
        "training images."
    )
    console.print(track_tables.difference_table(runs, title))
    console.print(
        f"eigen_sam − SAM at its radius. {tables.of_seeds(runs)}\n"
        f"{results.ending(path, document, 'track.png')}"
    )


def jobs(chosen: argparse.Namespace) -> list[Record]:
    """The identity of each run; seed by seed, so that an early end leaves whole seeds.

    `optimizer` is "eigen_sam"; "sam", without tracker and α; or "sam_matched", SAM at
    the mean radius of the Eigen-SAM run with this tracker, α and seed.
    """
    kinds: list[tuple[str, str | None, float | None]] = [("sam", None, None)]
    for alpha in chosen.alpha:
        for name in chosen.trackers:
            kinds.append(("eigen_sam", name, alpha))
            if not TRACKERS[name].is_ceiling:
                kinds.append(("sam_matched", name, alpha))
    return [
        {"optimizer": optimizer, "tracker": name, "alpha": alpha, "seed": seed}
        for seed in range(chosen.seeds)
        for optimizer, name, alpha in kinds
    ]


def _records(
    chosen: argparse.Namespace, dataset: Dataset, document: Record, console: Console
) -> Iterator[list[Record]]:
    """Does the missing jobs; yields the record of each."""
    model, steps = registry.model(chosen.model, dataset.num_classes), chosen.steps
    measure = looks.make_measure(model, dataset, BATCH_SIZE, steps)

    @cache
    def runner(at: tuple[int, ...]) -> loop.Run[looks.Look]:
        settings = loop.Settings(
            *(steps, BATCH_SIZE, chosen.learning_rate, (*at, steps)),
            base=chosen.base_optimizer,
            weight_decay=chosen.weight_decay,
        )
        return loop.make_run(model, dataset, measure, settings)

    def train(job: Record, advance: progress.Advance) -> list[Record]:
        at: tuple[int, ...] = ()
        setup = named("sam", RHO, 0.0)
        if job["optimizer"] == "eigen_sam":
            at = looks.look_steps(steps, chosen.evaluations)
            setup = named("eigen_sam", RHO, job["alpha"], job["tracker"])
        elif job["optimizer"] == "sam_matched":
            of_tracker = {**job, "optimizer": "eigen_sam"}
            (found,) = results.select(document["runs"], **of_tracker)
            setup = setup._replace(rho=found["radius"])
        points: list[loop.Point[looks.Look]] = []
        say = lambda doing: advance(0, doing)
        for point in runner(at)(setup, job["seed"], say=say):
            advance(point.step - (points[-1].step if points else 0))
            points.append(point)
        return [{**job, "rho": setup.rho, **looks.summarise(points)}]

    work = []
    for job in resumption.missing(jobs(chosen), document["runs"]):
        where = f" {job['tracker']} α {job['alpha']:g}" if job["tracker"] else ""
        name = f"{job['optimizer']}{where}, seed {job['seed']}"
        work.append((name, partial(train, job)))
    return progress.done(work, len(work) * steps, console)
