"""`eigensam after-training`: networks by each method, and what becomes of them."""

import argparse
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from eigensam_jax import tree_math
from eigensam_jax.experiments import options, registry
from eigensam_jax.experiments.after_training import sharpness, wing
from eigensam_jax.experiments.after_training import tables as own_tables
from eigensam_jax.experiments.after_training.changes import SIZES, changes
from eigensam_jax.experiments.data import load
from eigensam_jax.experiments.data.load import Dataset
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.records import progress, results, resumption, tables
from eigensam_jax.experiments.registry import METHODS
from eigensam_jax.experiments.training import loop, losses, measures
from eigensam_jax.experiments.training.methods import Setup, named
from eigensam_jax.experiments.training.steps import Begin, TrainState
from eigensam_jax.tree_math import PyTree

BATCH_SIZE = 128
AVERAGED = 10  # looks in the last quarter of a training, whose weights are averaged
NEXT_RATE, NEXT_EPOCHS = 0.01, 1  # of the training on other data

Record = dict[str, Any]


def run(chosen: argparse.Namespace, command: str) -> None:
    """Does what is missing; leaves `results.json` and `after_training.png` in `--out`.

    Raises:
      UserError: for what can't be run, before any training; or when a run diverges.
      KeyboardInterrupt: passed on, with the finished runs on disk.
    """
    console = Console()
    for name in ("optimizers", "rhos", "learning_rates"):
        setattr(chosen, name, list(dict.fromkeys(getattr(chosen, name))))
    options.check_radii(chosen.optimizers)
    options.check_label_noise(chosen.label_noise)
    whole = registry.dataset(chosen.dataset, chosen.data_dir)
    split = load.for_tuning(load.with_label_noise(whole, chosen.label_noise))
    dataset = split._replace(
        test_images=whole.test_images,
        test_labels=whole.test_labels,
        held_images=split.test_images,
        held_labels=split.test_labels,
    )
    _check_size(chosen.dataset, dataset)
    following = _next(chosen, dataset)
    results.make_folder(chosen.out)
    path = chosen.out / results.FILE
    config = {
        "dataset": chosen.dataset,
        "data_dir": chosen.data_dir and str(chosen.data_dir),
        "label_noise": chosen.label_noise,
        "next_dataset": chosen.next_dataset,
        **({"next_crc32": load.checksum(following)} if following else {}),
        "model": chosen.model,
        "epochs": chosen.epochs,
        "batch_size": BATCH_SIZE,
        "learning_rate": chosen.learning_rates[0],
        "alpha": chosen.alpha,
        **loop.protocol(dataset, chosen.base_optimizer, chosen.weight_decay),
        "curvature_examples": min(chosen.curvature_examples, len(dataset.train_labels)),
        "sizes": {kind: list(sizes) for kind, (_, sizes) in SIZES.items()},
    }
    document = resumption.of_runs(path, command, config, seeds=chosen.seeds)
    missing = _records(chosen, dataset, following, document, console)
    in_order = lambda runs: sorted(runs, key=lambda x: x["seed"])
    resumption.add_runs(path, document, missing, console, in_order)
    wing.plots(document, chosen.out)
    runs = document["runs"]
    title = registry.title(config)
    for table in own_tables.all_tables(runs, title):
        console.print(table)
    console.print(
        f"{tables.of_seeds(runs)} Of each method the setting that was best on a held-"
        f"out tenth.\n{results.ending(path, document, 'after_training.png')}"
    )


def jobs(chosen: argparse.Namespace) -> list[Record]:
    """What tells each network from the others, so that an early end leaves whole seeds.

    `tuned` is the learning rate of the base optimizer alone, and ρ of the others; of
    SAM at the radius of a method, the ρ of that. `longer` is how many times the epochs
    there are, `averaged` whether its weights are averages over the end of a training.
    """
    plain, kinds = chosen.base_optimizer, list[Record]()
    for rate in chosen.learning_rates:
        own = {"optimizer": plain, "tuned": rate}
        for longer in chosen.longer:
            kinds.append({**own, "longer": longer, "averaged": False})
            if longer == 1:  # right after it, as both share a training
                kinds.append({**own, "longer": 1, "averaged": True})
    for rho in chosen.rhos:
        for name in chosen.optimizers:
            tuned = rho * METHODS[METHODS[name].radius_of or name].rho_factor
            own = {"tuned": tuned, "longer": 1, "averaged": False}
            kinds.append({"optimizer": name, **own})
    kinds.sort(key=lambda job: bool(METHODS[job["optimizer"]].radius_of))
    return [{**job, "seed": seed} for seed in range(chosen.seeds) for job in kinds]


def _next(chosen: argparse.Namespace, dataset: Dataset) -> Dataset | None:
    """The data that the networks learn next, of the same shape."""
    if not chosen.next_dataset:
        if chosen.next_dir is not None:
            raise UserError(
                f"--next-dir {chosen.next_dir}: name --next-dataset, or leave it out"
            )
        return None
    try:
        found = registry.dataset(chosen.next_dataset, chosen.next_dir)
    except UserError as error:
        text = str(error).replace("--dataset", "--next-dataset")
        raise UserError(text.replace("--data-dir", "--next-dir")) from error
    shapes = [(x.train_images.shape[1:], x.num_classes) for x in (dataset, found)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"--next-dataset {chosen.next_dataset} has images and classes {shapes[1]}, "
            f"and {chosen.dataset} has {shapes[0]}; use one of the same"
        )
    _check_size(chosen.next_dataset, found)
    return found


def _check_size(name: str, dataset: Dataset) -> None:
    examples = len(dataset.train_labels)
    loop.check_batch_size(BATCH_SIZE, name, examples, is_option=False)


def _with_params(variables: PyTree, params: PyTree) -> PyTree:
    """One function for all networks, so that what begins from it is compiled once."""
    return {**variables, "params": params}


def _records(
    chosen: argparse.Namespace,
    dataset: Dataset,
    following: Dataset | None,
    document: Record,
    console: Console,
) -> Iterator[list[Record]]:
    """Does the jobs that the results file lacks; yields the record of each."""
    model = registry.model(chosen.model, dataset.num_classes)
    loss, means = losses.evaluation_loss(model), measures.make_means(model)
    few = slice(chosen.curvature_examples)
    images, labels = dataset.train_images[few], dataset.train_labels[few]
    value_fn = lambda params: loss(params, images, labels)
    common: Record = {
        "base": chosen.base_optimizer,
        "weight_decay": chosen.weight_decay,
    }
    latest: tuple[Any, list[loop.Point[PyTree]]] = (None, [])

    def keep(setup: Setup, state: TrainState, top: Any) -> tuple[PyTree, None]:
        del setup, top
        if not jnp.isfinite(tree_math.norm(state.params)):
            raise FloatingPointError("the weights are not finite")
        return jax.tree.map(jnp.copy, state.params), None

    @cache
    def trained_by(rate: float, longer: int) -> loop.Run[PyTree]:
        steps = longer * loop.num_steps(dataset, BATCH_SIZE, chosen.epochs)
        looks = np.linspace(0.75 * steps, steps, AVERAGED).round().astype(int)
        settings = loop.Settings(
            steps, BATCH_SIZE, rate, tuple(map(int, dict.fromkeys(looks))), **common
        )
        return loop.make_run(model, dataset, keep, settings)

    @cache
    def goes_on() -> loop.Run[PyTree]:
        assert following is not None
        steps = loop.num_steps(following, BATCH_SIZE, NEXT_EPOCHS)
        settings = loop.Settings(steps, BATCH_SIZE, NEXT_RATE, (steps,))
        return loop.make_run(model, following, keep, settings)

    def figures(params: PyTree, seed: int) -> Record:
        """All that is measured of a network."""
        test = dataset.test_images, dataset.test_labels
        train_loss, train_accuracy = means(
            params, dataset.train_images, dataset.train_labels
        )
        test_loss, test_accuracy = means(params, *test)
        assert dataset.held_images is not None
        _, held_accuracy = means(params, dataset.held_images, dataset.held_labels)
        found: Record = {
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "held_accuracy": held_accuracy,
            **sharpness.measured(value_fn, params),
        }
        after: dict[str, list[float]] = {}
        for kind, change in changes(value_fn, seed).items():
            scores = np.array(
                [
                    np.mean([means(x, *test) for x in change(params, size)], axis=0)
                    for size in SIZES[kind][1]
                ]
            )
            after[f"{kind}_loss"], after[f"{kind}_accuracy"] = scores.T.tolist()
        if following is not None:
            begin: Any = Begin(_with_params, params=params)  # type: ignore[no-untyped-call]
            (point,) = goes_on()(Setup("sgd"), seed, begin=begin)
            then = following.test_images, following.test_labels
            scores = np.array([means(point.measurement, *x) for x in (test, then)])
            after["next_loss"], after["next_accuracy"] = scores.T.tolist()
        return {**found, "after": after}

    def train(job: Record, advance: progress.Advance) -> list[Record]:
        nonlocal latest
        method, seed = METHODS[job["optimizer"]], job["seed"]
        rate = job["tuned"] if method.link is None else chosen.learning_rates[0]
        rho = 0.0 if method.link is None else job["tuned"]
        if method.radius_of:
            of_method = {**job, "optimizer": method.radius_of}
            (found,) = results.select(document["runs"], **of_method)
            rho = found["radius"]
        setup = named(job["optimizer"], rho, chosen.alpha)
        say = lambda doing: advance(0, doing)
        training = setup, rate, job["longer"], seed
        if latest[0] != training:
            train_it = trained_by(rate, job["longer"])
            latest = training, list(train_it(setup, seed, say=say))
        points = latest[1]
        advance(0, "measuring")
        weights = [point.measurement for point in points]
        params = weights[-1]
        if job["averaged"]:
            params = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *weights)
        gradients = setup.gradients(points[-1].step)
        found = {
            **job,
            "rho": rho,
            "learning_rate": rate,
            "radius": points[-1].radius,
            "gradients": gradients * job["longer"],
            "training_time_s": points[-1].progress.seconds,
            **figures(params, seed),
        }
        advance(1)
        return [found]

    work = []
    for job in resumption.missing(jobs(chosen), document["runs"]):
        name = f"{own_tables.label(job)} {job['tuned']:g}, seed {job['seed']}"
        work.append((name, partial(train, job)))
    return progress.done(work, len(work), console)
