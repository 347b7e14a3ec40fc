"""`eigensam spectrum`: the Hessian's eigenvalues of a trained network."""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from rich.console import Console
from rich.progress import TaskID

from eigensam_jax import eigen
from eigensam_jax.experiments import registry
from eigensam_jax.experiments.data.load import Dataset
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.records import checkpoints, progress, results, resumption
from eigensam_jax.experiments.spectrum import tables as spectrum_tables
from eigensam_jax.experiments.spectrum import wing
from eigensam_jax.experiments.spectrum.wing import EXAMPLES
from eigensam_jax.experiments.training import loop, losses, measures, methods
from eigensam_jax.experiments.training.methods import Setup
from eigensam_jax.experiments.training.steps import TrainState
from eigensam_jax.hessian import Matvec
from eigensam_jax.tree_math import PyTree

TOLERANCE = 1e-4  # of the residuals, relative to λ_max
CHECKPOINT = "training.msgpack"
CHECKPOINTS = 10  # of a training, beside the one at its end
_TRAINING = (
    *("dataset", "model", "optimizer", "seed", "epochs", "batch_size"),
    *("learning_rate", "rho", "alpha", "augment"),
)
_SPECTRUM = ("k", "num_matvecs", "num_samples", "examples")
_IDENTITY = ("seed", "optimizer", "rho", "alpha", "learning_rate")


def run(chosen: argparse.Namespace, command: str) -> None:
    """Trains a network; leaves `results.json` and `spectrum.png` in `--out`.

    An interrupted command continues from its last checkpoint, which is deleted if the
    network or its Hessian is not finite.
    """
    console = Console()
    dataset = registry.dataset(chosen.dataset, chosen.data_dir)
    available = len(dataset.train_images)
    loop.check_batch_size(chosen.batch_size, chosen.dataset, available)
    model = registry.model(chosen.model, dataset.num_classes)
    dimension = _check(chosen, dataset, model)
    chosen.examples = chosen.examples or min(EXAMPLES, available)
    results.make_folder(chosen.out)
    path = chosen.out / results.FILE
    results.check_command(path, command)
    method = methods.named(chosen.optimizer, chosen.rho, chosen.alpha)
    chosen.rho, chosen.alpha = method.rho, method.alpha  # 0 where it uses none
    training = {
        **{key: getattr(chosen, key) for key in _TRAINING},
        **loop.protocol(dataset, chosen.base_optimizer, chosen.weight_decay),
    }
    checkpoint, described = chosen.out / CHECKPOINT, training | results.environment()
    saved: dict[str, Any] = {"step": 0, "seconds": 0.0}
    saved |= resumption.unfinished(checkpoint, described)
    start = time.perf_counter() - saved["seconds"]
    with progress.shown(console) as bar:
        total = loop.num_steps(dataset, chosen.batch_size, chosen.epochs)
        training_task = bar.add_task("training", total=total, completed=saved["step"])

        def keep(step: int, what: dict[str, Any]) -> None:
            bar.update(training_task, completed=step)
            kept = {"described": json.dumps(described), "step": step, **what}
            kept["seconds"] = time.perf_counter() - start
            checkpoints.write(checkpoint, kept)

        def counted(task: TaskID) -> Matvec:
            def product(vector: PyTree) -> PyTree:
                bar.advance(task)
                return matvec(vector)

            return product

        try:
            trained = train(chosen, dataset, saved, keep)
            params, few = trained["params"], slice(chosen.examples)
            matvec = measures.make_matvec(losses.evaluation_loss(model))(
                *(params, dataset.train_images[few]),
                *(dataset.train_labels[few], trained["batch_stats"]),
            )
            task = bar.add_task("top eigenvalues", total=None)
            began = time.perf_counter()
            top = eigen.top_eigenpairs(
                *(counted(task), params, chosen.k),
                tol=TOLERANCE,
                max_matvecs=max(1_000, 20 * chosen.k),
                thorough=True,  # the residuals are by products
                host_loop=True,
            )
            seconds, products = time.perf_counter() - began, bar.tasks[task].completed
            count = chosen.num_matvecs * chosen.num_samples
            density = eigen.spectral_density(
                counted(bar.add_task("spectral density", total=count)),
                params,
                num_matvecs=chosen.num_matvecs,
                num_samples=chosen.num_samples,
                host_loop=True,
            )
        except loop.DivergedError:
            checkpoint.unlink(missing_ok=True)  # a lower rate may use this folder
            raise
        except KeyboardInterrupt:
            if checkpoint.exists():
                console.print(
                    f"The training so far is in {checkpoint}; the same command goes on "
                    "from there."
                )
            raise
    if not all(np.isfinite(x).all() for x in (top.residual, density.nodes)):
        checkpoint.unlink(missing_ok=True)
        raise UserError(
            "the Hessian's products are not finite; lower --learning-rate (now "
            f"{chosen.learning_rate:g})"
        )
    record = {
        **{key: getattr(chosen, key) for key in _IDENTITY},
        "top_wall_time_s": seconds,
        "top_matvecs": int(products),
        "parameters": dimension,
        **{key: trained[key] for key in ("train_loss", "test_accuracy")},
        "eigenvalues": top.eigenvalue.tolist(),
        "residuals": top.residual.tolist(),
        **spectrum_tables.summarise(density, dimension, float(top.eigenvalue[0])),
        "nodes": density.nodes.tolist(),
        "weights": density.weights.tolist(),
    }
    document: dict[str, Any] = {
        "commands": [command],
        "config": {
            **training,
            **{key: getattr(chosen, key) for key in _SPECTRUM},
            "data_dir": chosen.data_dir and str(chosen.data_dir),
            "out": str(chosen.out),
            "tolerance": TOLERANCE,
            "near_zero": spectrum_tables.NEAR_ZERO,
        },
        **results.environment(),
        "complete": True,
        "wall_time_s": time.perf_counter() - start,
        "runs": [results.rounded(record)],
    }
    results.write(path, document)
    wing.plots(document, chosen.out)
    checkpoint.unlink(missing_ok=True)
    console.print(spectrum_tables.table(document, wing.title(document)))
    console.print(spectrum_tables.sentence(document))
    console.print(results.ending(path, document, "spectrum.png"))


def train(
    chosen: argparse.Namespace,
    dataset: Dataset,
    saved: dict[str, Any] | None = None,
    keep: Callable[[int, dict[str, Any]], None] = lambda step, what: None,
) -> dict[str, Any]:
    """Trains; returns `params`, `batch_stats`, `train_loss` and `test_accuracy`.

    `saved` is what an interrupted training gave to `keep`, which is called on the way
    and at the end, with the steps so far and what to continue from.

    Raises:
      DivergedError: if the loss is not finite.
    """
    saved = saved or {}
    if "trained" in saved:
        arrays = {key: saved["trained"][key] for key in ("params", "batch_stats")}
        return {**saved["trained"], **jax.tree.map(jnp.asarray, arrays)}
    steps = loop.num_steps(dataset, chosen.batch_size, chosen.epochs)
    settings = loop.Settings(
        *(steps, chosen.batch_size, chosen.learning_rate),
        looks=loop.evaluation_steps(steps, CHECKPOINTS + 1)[1:],
        augment=registry.augmentation(chosen.dataset, chosen.augment),
        base=chosen.base_optimizer,
        weight_decay=chosen.weight_decay,
    )
    model = registry.model(chosen.model, dataset.num_classes)
    means = measures.make_means(model)

    def measure(setup: Setup, state: TrainState, top: Any) -> tuple[Any, None]:
        del setup, top
        if int(state.step) < steps:
            return None, None
        params, stats = jax.tree.map(jnp.copy, (state.params, state.batch_stats))
        train_loss, _ = means(params, dataset.train_images, dataset.train_labels, stats)
        if not np.isfinite(train_loss):
            raise FloatingPointError(f"the training loss is {train_loss}")
        _, accuracy = means(params, dataset.test_images, dataset.test_labels, stats)
        end = {"train_loss": train_loss, "test_accuracy": accuracy}
        return {"params": params, "batch_stats": stats, **end}, None

    method = methods.named(chosen.optimizer, chosen.rho, chosen.alpha)
    run = loop.make_run(model, dataset, measure, settings)
    for point in run(method, chosen.seed, saved.get("progress")):
        if point.step < steps:
            progress = serialization.to_state_dict(point.progress)
            keep(point.step, {"progress": progress})
    trained: dict[str, Any] = point.measurement
    keep(steps, {"trained": trained})
    return trained


def _check(chosen: argparse.Namespace, dataset: Dataset, model: Any) -> int:
    """Refuses impossible options; returns the number of parameters."""
    images = len(dataset.train_images)
    if chosen.examples is not None and chosen.examples > images:
        raise UserError(
            f"--examples {chosen.examples} is more than the {images} training images "
            f"of {chosen.dataset}; use at most {images}"
        )
    shapes = jax.eval_shape(model.init, jax.random.key(0), dataset.train_images[:1])
    dimension = sum(int(x.size) for x in jax.tree.leaves(shapes["params"]))
    if chosen.k > dimension:
        raise UserError(
            f"--k {chosen.k} is more than the {dimension} parameters of "
            f"{chosen.model}; a few dozen are usual"
        )
    return dimension
