"""`eigensam compare`, `accuracy` and `ablate`: many runs of one network, by a plan."""

from collections import defaultdict
from collections.abc import Iterator
from inspect import signature
from typing import Any

from rich.console import Console

from eigensam_jax.experiments.data import load as data
from eigensam_jax.experiments.data.load import Dataset
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.models import pretrained
from eigensam_jax.experiments.models import small as models
from eigensam_jax.experiments.models.pretrained import Pretrained
from eigensam_jax.experiments.records import results, resumption, tables
from eigensam_jax.experiments.study import plots as study_plots
from eigensam_jax.experiments.study import runner
from eigensam_jax.experiments.study import tables as study_tables
from eigensam_jax.experiments.study.plans import PARTS, Job, Plan, Record
from eigensam_jax.experiments.study.runner import Config, Runner
from eigensam_jax.experiments.training import loop as training
from eigensam_jax.experiments.training import measures


def run(config: Config, plan: Plan, kind: str, command: str, console: Console) -> None:
    """Does the runs that are missing; leaves a results file and a plot in `config.out`.

    The results file is brought up to date after each run, and a run in progress has a
    checkpoint after every look. Whatever ends the command, the same one goes on.

    Args:
      config: what all runs share.
      plan: what to run.
      kind: the name of the command, a key of `study_plots.DRAW`.
      command: the command line, for the results file.
      console: where progress and the tables go.

    Raises:
      UserError: for what can't be run, before any training; or when a run diverges.
      KeyboardInterrupt: passed on, with the finished runs on disk.
    """
    _check(config)
    weights = None
    if config.pretrained is not None:
        weights = pretrained.load(config.pretrained, config.model)
    dataset = data.load(config.dataset, config.data_dir)
    if config.train_examples is not None:
        dataset = data.first(dataset, config.train_examples, config.dataset)
    examples = len(dataset.train_labels)
    if kind == "accuracy":
        examples = data.num_for_tuning(dataset)
    training.check_batch_size(config.batch_size, config.dataset, examples)
    results.make_folder(config.out)
    path = config.out / config.file
    document = resumption.of_runs(path, command, _protocol(config, dataset, weights))
    noisy = data.with_label_noise(dataset, config.label_noise)
    train = Runner(config, noisy, weights)
    missing = _records(train, plan, document["runs"], console)
    resumption.add_runs(path, document, missing, lambda runs: runs, console)
    (config.out / runner.CHECKPOINT).unlink(missing_ok=True)
    runs, title = document["runs"], f"{config.dataset}, {config.model}"
    for table in study_tables.all_tables(runs, title):
        console.print(table)
    plot = config.out / f"{kind}.png"
    study_plots.DRAW[kind](runs, title, plot)
    console.print(
        "Means over seeds with 95% intervals; differences are paired by seed. λ_max on "
        f"{document['config']['curvature_examples']} training images.\n"
        f"Results: {path}   Plot: {plot}   Wall time: {document['wall_time_s']:.0f} s"
    )


def _check(config: Config) -> None:
    """Raises UserError where the network or the batch does not fit an option."""
    model = models.make(config.model, 10, config.resolution)
    if config.label_noise > 1:
        raise UserError(
            f"--label-noise {config.label_noise:g} is a share of the labels; use at "
            "most 1"
        )
    names = config.plan.get("tables", ())
    has_norms = "train" in signature(type(model).__call__).parameters
    if "norms" in names and not has_norms:
        raise UserError(
            f"--tables norms: {config.model} has no batch normalisation; use norm_cnn, "
            "resnet18 or efficientnet_lite0"
        )
    if "parts" in names and has_norms:
        raise UserError(
            f"--tables parts: {config.model} normalises by the batch, which has no "
            "parts then; use mlp, or another without"
        )
    if "parts" in names and config.batch_size % PARTS[-1]:
        raise UserError(
            f"--batch-size {config.batch_size} cannot be cut into {PARTS[-1]} parts; "
            "use a multiple"
        )


def _protocol(
    config: Config, dataset: Dataset, weights: Pretrained | None
) -> dict[str, Any]:
    examples = len(dataset.train_images)
    return {
        **config._asdict(),
        "data_dir": config.data_dir and str(config.data_dir),
        "out": str(config.out),
        "pretrained": weights and weights.record(),
        **training.protocol(dataset),
        "curvature_examples": min(examples, config.curvature_examples),
        "look_examples": min(examples, config.curvature_examples, runner.LOOK_EXAMPLES),
        "curvature_tolerance": runner.TOLERANCE,
        "alignment_batches": measures.ALIGNMENT_BATCHES,
    }


def _records(
    train: Runner, plan: Plan, runs: list[Record], console: Console
) -> Iterator[Record]:
    """The records that `runs` lacks; of a job that is done, another row's is copied."""
    known = {(run["table"], run["row"], run["job"]): run for run in runs}
    done: dict[Job, Record] = {}
    total = sum(1 for _ in plan(_Anything()))
    with tables.progress_bar(console) as progress:
        task = progress.add_task("", total=total)
        for table, row, job in plan(done):
            progress.update(task, description=f"{table}: {row}, seed {job.seed}")
            key = str(job)
            found = known.get((table, row, key))
            if found is None:
                figures = done.get(job) or train(job)
                found = {**figures, "table": table, "row": row, "job": key}
                yield found
            done[job] = found
            progress.advance(task)


class _Anything(dict[Job, Record]):
    """A record of every job, to count a plan's jobs without running them."""

    def __missing__(self, job: Job) -> Record:
        return defaultdict(float)
