"""`eigensam compare`, `accuracy`, `frontier`, `ablate`: many runs, by a plan."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from eigensam_jax.experiments import options, registry
from eigensam_jax.experiments.data import load
from eigensam_jax.experiments.data.load import Dataset
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.models import pretrained
from eigensam_jax.experiments.models.pretrained import Pretrained
from eigensam_jax.experiments.records import progress, results, resumption, tables
from eigensam_jax.experiments.study import tables as study_tables
from eigensam_jax.experiments.study import wing
from eigensam_jax.experiments.study.ablations import PARTS
from eigensam_jax.experiments.study.jobs import (
    CHECKPOINT,
    LOOK_EXAMPLES,
    TOLERANCE,
    Config,
    Do,
    make_runs,
)
from eigensam_jax.experiments.study.plans import Job, Plan, Record
from eigensam_jax.experiments.training import loop, measures
from eigensam_jax.experiments.training.methods import Setup

_OVER_TRAINING = "main"  # the table whose records have curves
_USUAL = Job(Setup(""), 0.0, 0).fields  # omitted in records
_MEASURED = "at the look with the lowest validation loss"


def run(config: Config, plan: Plan, seeds: int, kind: str, command: str) -> None:
    """Does the missing runs; leaves a results file and a plot in `config.out`.

    The file is updated after each run, and a run has a checkpoint after each look, so
    the same command continues an interrupted one. `plan` has so many `seeds`; `kind` is
    the command's name, `command` the command line.

    Raises:
      UserError: for impossible options, before any training; or when a run diverges.
      KeyboardInterrupt: passed on, with the finished runs on disk.
    """
    console = Console()
    _check(config)
    weights = None
    if config.pretrained is not None:
        weights = pretrained.load(config.pretrained, config.model)
    dataset = registry.dataset(config.dataset, config.data_dir)
    used = load.first(dataset, config.train_examples)
    examples = len(used.train_labels)
    if examples < (config.train_examples or 0):
        raise UserError(
            f"--train-examples {config.train_examples} is more than the {examples} "
            f"training images of {config.dataset}; use at most {examples}"
        )
    if kind in ("accuracy", "frontier"):
        examples = min(examples, load.num_for_tuning(dataset))
    loop.check_batch_size(config.batch_size, config.dataset, examples)
    results.make_folder(config.out)
    path = config.out / results.FILE
    protocol = _protocol(config, used, weights)
    document = resumption.of_runs(path, command, protocol, seeds=seeds)
    noisy = load.with_label_noise(dataset, config.label_noise)
    described = {key: document[key] for key in ("config", "versions", "device")}
    do = make_runs(config, noisy, weights, described)
    missing = _records(do, plan, document["runs"], console)
    checkpoint = config.out / CHECKPOINT
    resumption.add_runs(path, document, missing, console, checkpoint=checkpoint)
    checkpoint.unlink(missing_ok=True)
    runs = document["runs"]
    title = registry.title(document["config"])
    for table in study_tables.all_tables(runs, title):
        console.print(table)
    wing.plots(document, config.out)
    console.print(
        f"{tables.of_seeds(runs)} λ_max on "
        f"{document['config']['curvature_examples']} training images.\n"
        f"{results.ending(path, document, f'{kind}.png')}"
    )


def _check(config: Config) -> None:
    """Raises UserError if the network or the batch does not fit an option."""
    registry.model(config.model, 10, config.resolution)  # refuses a resolution
    kind = registry.DATASETS[config.dataset].kind
    found = registry.MODELS[config.model]
    if found.kind != kind:
        able = [x for x, made in registry.MODELS.items() if made.kind == kind]
        raise UserError(
            f"--model {config.model} does not learn {config.dataset}: use "
            f"{', '.join(able)}"
        )
    if config.label_noise and kind != "images":
        raise UserError(f"--label-noise: {config.dataset} has no labels; leave it out")
    options.check_label_noise(config.label_noise)
    names, has_norms = config.plan.get("tables", ()), found.batch_norm
    if "norms" in names and not has_norms:
        able = [x for x, made in registry.MODELS.items() if made.batch_norm]
        raise UserError(
            f"--tables norms: {config.model} has no batch normalisation; use one of "
            f"{', '.join(able)}"
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
        **loop.protocol(dataset, config.base_optimizer, config.weight_decay),
        "curvature_examples": min(examples, config.curvature_examples),
        "look_examples": min(examples, config.curvature_examples, LOOK_EXAMPLES),
        "curvature_tolerance": TOLERANCE,
        "alignment_batches": measures.ALIGNMENT_BATCHES,
        **({} if dataset.held_labels is None else {"measured": _MEASURED}),
    }


def _records(
    do: Do, plan: Plan, runs: list[Record], console: Console
) -> Iterator[Record]:
    """Does the jobs that `runs` lacks; copies the record if another row had the job."""
    known = {_place(run["table"], run["row"], run): run for run in runs}
    done: dict[Job, Record] = {}
    total = sum(1 for _ in plan(_Anything()))
    with progress.shown(console) as bar:
        task = bar.add_task("", total=total)
        for count, (table, row, job) in enumerate(plan(done)):
            where = f"{table}: {row}, seed {job.seed}"
            say = lambda doing, share, where=where, count=count: bar.update(
                task, completed=count + share, description=f"{where}, {doing}"
            )
            bar.update(task, description=where)
            found = known.get(_place(table, row, job.fields))
            if found is None:
                figures = done.get(job) or do(job, say)
                found = {"table": table, "row": row, **figures}
                found |= {"table": table, "row": row}
                if table != _OVER_TRAINING:
                    found.pop("curves", None)
                yield found
            done[job] = found
            bar.update(task, completed=count + 1)


def _place(table: str, row: str, run: Record) -> tuple[Any, ...]:
    """What identifies a record: its place, and what was run."""
    return table, row, *(run.get(key, usual) for key, usual in _USUAL.items())


class _Anything(dict[Job, Record]):
    """A record of every job, to count a plan's jobs without running them."""

    def __missing__(self, job: Job) -> Record:
        return defaultdict(float)
