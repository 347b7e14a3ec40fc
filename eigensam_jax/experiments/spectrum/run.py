"""`eigensam spectrum`: the eigenvalues of the Hessian of a trained network."""

import json
import time
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress, TaskID

from eigensam_jax import eigen
from eigensam_jax.experiments import registry
from eigensam_jax.experiments.data.load import Dataset
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.records import checkpoints, progress, results, resumption
from eigensam_jax.experiments.spectrum import network, plots
from eigensam_jax.experiments.spectrum import tables as spectrum_tables
from eigensam_jax.experiments.spectrum.network import Config
from eigensam_jax.experiments.spectrum.wing import EXAMPLES
from eigensam_jax.experiments.training import loop, losses, measures
from eigensam_jax.hessian import Matvec
from eigensam_jax.tree_math import PyTree

TOLERANCE = 1e-4  # of the residuals, relative to λ_max

CHECKPOINT = "training.msgpack"
_IDENTITY = ("seed", "optimizer", "rho", "alpha", "learning_rate")


def run(config: Config, command: str) -> None:
    """Trains a network; leaves `results.json` and `spectrum.png` in `config.out`.

    Whatever ends the command, the same one goes on from the last checkpoint of the
    training, or from its end. Where the network or its Hessian is not finite, the next
    one begins again.

    Args:
      config: what to train, and what to find of its Hessian.
      command: the command line, for the results file.

    Raises:
      UserError: for what can't be run, before any training; or when training diverges.
    """
    console = Console()
    dataset = registry.dataset(config.dataset, config.data_dir)
    available = len(dataset.train_images)
    loop.check_batch_size(config.batch_size, config.dataset, available)
    model = registry.model(config.model, dataset.num_classes)
    dimension = _check(config, dataset, model)
    examples = config.examples or min(EXAMPLES, available)
    config = config._replace(examples=examples)
    results.make_folder(config.out)
    checkpoint, described = config.out / CHECKPOINT, _described(config, dataset)
    saved = checkpoints.read(checkpoint) or {"step": 0, "seconds": 0.0}
    if "described" in saved:
        resumption.check_same(config.out, json.loads(saved["described"]), described)
    start = time.perf_counter() - saved["seconds"]
    with progress.shown(console) as bar:
        total = loop.num_steps(dataset, config.batch_size, config.epochs)
        training_task = bar.add_task("training", total=total, completed=saved["step"])

        def keep(step: int, what: dict[str, Any]) -> None:
            bar.update(training_task, completed=step)
            kept = {"described": json.dumps(described), "step": step, **what}
            kept["seconds"] = time.perf_counter() - start
            checkpoints.write(checkpoint, kept)

        try:
            trained = network.train(config, dataset, saved, keep)
            product = measures.make_matvec(losses.cross_entropy(model))(
                *(trained.params, dataset.train_images[:examples]),
                *(dataset.train_labels[:examples], trained.batch_stats),
            )
            task = bar.add_task("top eigenvalues", total=None)
            began = time.perf_counter()
            matvec, products = _counted(product, bar, task)
            top = eigen.top_eigenpairs(
                matvec, trained.params, config.k, tol=TOLERANCE, host_loop=True
            )
            seconds, top_products = time.perf_counter() - began, products[0]

            count = config.num_matvecs * config.num_samples
            task = bar.add_task("spectral density", total=count)
            density = eigen.spectral_density(
                _counted(product, bar, task)[0],
                trained.params,
                num_matvecs=config.num_matvecs,
                num_samples=config.num_samples,
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
            f"{config.learning_rate:g})"
        )
    record = {
        **{key: getattr(config, key) for key in _IDENTITY},
        "top_wall_time_s": seconds,
        "top_matvecs": top_products,
        "parameters": dimension,
        "train_loss": trained.train_loss,
        "test_accuracy": trained.test_accuracy,
        "eigenvalues": top.eigenvalue.tolist(),
        "residuals": top.residual.tolist(),
        **spectrum_tables.summarise(density, dimension, float(top.eigenvalue[0])),
        "nodes": density.nodes.tolist(),
        "weights": density.weights.tolist(),
    }
    document: dict[str, Any] = {
        "commands": [command],
        "config": {
            **config._asdict(),
            "data_dir": config.data_dir and str(config.data_dir),
            "out": str(config.out),
            **loop.protocol(dataset, config.base_optimizer, config.weight_decay),
            "tolerance": TOLERANCE,
            "near_zero": spectrum_tables.NEAR_ZERO,
        },
        **results.environment(),
        "complete": True,
        "wall_time_s": time.perf_counter() - start,
        "runs": [results.rounded(record)],
    }
    path, plot = config.out / results.FILE, config.out / "spectrum.png"
    results.write(path, document)
    title = f"{config.dataset}, {config.model}, {config.optimizer}"
    plots.spectrum(document, title, plot)
    checkpoint.unlink(missing_ok=True)
    console.print(spectrum_tables.table(document, title))
    console.print(spectrum_tables.sentence(document))
    console.print(
        f"Results: {path}   Plot: {plot}   Wall time: {document['wall_time_s']:.0f} s"
    )


def _described(config: Config, dataset: Dataset) -> dict[str, Any]:
    """All that the trained network depends on."""
    later = ("k", "num_matvecs", "num_samples", "examples", "data_dir", "out")
    fields = {key: x for key, x in config._asdict().items() if key not in later}
    return {
        **fields,
        **loop.protocol(dataset, config.base_optimizer, config.weight_decay),
        **results.environment(),
    }


def _check(config: Config, dataset: Dataset, model: Any) -> int:
    """Refuses what can't be done, and returns the number of parameters."""
    images = len(dataset.train_images)
    if config.examples is not None and config.examples > images:
        raise UserError(
            f"--examples {config.examples} is more than the {images} training images "
            f"of {config.dataset}; use at most {images}"
        )
    shapes = jax.eval_shape(model.init, jax.random.key(0), dataset.train_images[:1])
    dimension = sum(int(x.size) for x in jax.tree.leaves(shapes["params"]))
    if config.k > dimension:
        raise UserError(
            f"--k {config.k} is more than the {dimension} parameters of "
            f"{config.model}; a few dozen are usual"
        )
    return dimension


def _counted(matvec: Matvec, bar: Progress, task: TaskID) -> tuple[Matvec, list[int]]:
    """`matvec`, and a list whose only entry counts its products, as `bar` does."""
    products = [0]

    def counted(vector: PyTree) -> PyTree:
        products[0] += 1
        bar.update(task, completed=products[0])
        return matvec(vector)

    return counted, products
