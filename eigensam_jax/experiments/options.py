"""Options that the commands share, and their types."""

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from eigensam_jax.experiments.entries import DataSource, Network
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.registry import (
    BASE_OPTIMIZERS,
    DATASETS,
    METHODS,
    MODELS,
)

Config = TypeVar("Config")


def usual_methods(base: str) -> list[str]:
    """The methods that `compare` trains by default, the base optimizer first."""
    return [base, *(x for x in METHODS if METHODS[x].usual)]


def add_problem(
    parser: argparse.ArgumentParser,
    models: Sequence[str] | None = None,
    others: bool = False,
) -> None:
    """Adds --dataset, --data-dir and --model; `others` admits what are not images."""
    add_data(parser, others)
    models = models or tuple(MODELS if others else names_of(MODELS))
    add_choice(parser, "model", models, "mlp")


def names_of(entries: Mapping[str, DataSource | Network]) -> list[str]:
    """Of data sets or networks, those of images."""
    return [name for name, entry in entries.items() if entry.kind == "images"]


def add_data(parser: argparse.ArgumentParser, others: bool = False) -> None:
    """Adds --dataset and --data-dir; `others` admits what are not images."""
    names = DATASETS if others else names_of(DATASETS)
    files = {name: DATASETS[name].files for name in names}
    add_choice(parser, "dataset", tuple(files), "digits")
    first = {what: name for name, what in reversed(files.items()) if what}
    text = "files of " + "; ".join(f"{k}: {x}" for x, k in reversed(first.items()))
    parser.add_argument("--data-dir", metavar="DIR", type=folder, help=text)


def add_method(
    parser: argparse.ArgumentParser,
    rho: float = 0.1,
    alpha: float = 0.2,
    above: float | None = None,
) -> None:
    """Adds --learning-rate, and --rho and --alpha, at least 0 or above `above`."""
    usual = (f"{x.learning_rates[0]:g} for {k}" for k, x in BASE_OPTIMIZERS.items())
    add_learning_rate(parser, ", ".join(usual))
    add_number(parser, "rho", rho, "ρ", above)
    add_number(parser, "alpha", alpha, "α", above)


def add_learning_rate(parser: argparse.ArgumentParser, usual: str) -> None:
    """Adds --learning-rate; the help names the `usual` one."""
    parser.add_argument(
        "--learning-rate",
        metavar="X",
        type=number(float, above=0),
        help=f"[{usual}]",
    )


def add_base(parser: argparse.ArgumentParser, usual: str = "") -> None:
    """Adds --base-optimizer, None if there is another `usual` one, and its decay."""
    names = ", ".join(BASE_OPTIMIZERS)
    parser.add_argument(
        "--base-optimizer",
        metavar="NAME",
        choices=tuple(BASE_OPTIMIZERS),
        default=None if usual else "sgd",
        help=f"{names} [{usual or 'sgd'}]",
    )
    add_number(parser, "weight-decay", 0.0)


def add_runs(parser: argparse.ArgumentParser, usual: Mapping[str, Any]) -> None:
    """Adds the options of a study of many runs."""
    add_problem(parser, others=True)
    parser.add_argument(
        "--pretrained",
        metavar="FILE",
        type=Path,
        help="pretrained weights of efficientnet_lite0",
    )
    counts = {
        "resolution": "resize images to N×N [the network's own]",
        "train-examples": "train on the first N images only [all]",
        "curvature-examples": "training images for λ_max at the end [%(default)s]",
        "seeds": f"number of seeds [{usual['seeds']}]",
        "epochs": f"number of epochs [{usual['epochs']}]",
        "batch-size": "[%(default)s]",
        "looks": f"measurements on the way [{usual['looks']}]",
    }
    add_counts(parser, counts, {"curvature-examples": 5_000, "batch-size": 128})
    add_label_noise(parser)
    add_base(parser, usual.get("base_optimizer", ""))
    add_no_augment(parser)


def add_label_noise(parser: argparse.ArgumentParser) -> None:
    """Adds --label-noise."""
    add_number(parser, "label-noise", 0.0, "share of the training labels redrawn")


def check_label_noise(share: float) -> None:
    """Raises UserError for more than all labels."""
    if share > 1:
        raise UserError(
            f"--label-noise {share:g} is a share of the labels; use at most 1"
        )


def check_radii(names: Sequence[str]) -> None:
    """Raises UserError where SAM lacks the method whose radius it takes."""
    for name in names:
        if METHODS[name].radius_of not in ("", *names):
            raise UserError(
                f"--optimizers: {name} takes its radius from the run of "
                f"{METHODS[name].radius_of}; name {METHODS[name].radius_of} too, or "
                f"leave {name} out"
            )


def add_no_augment(parser: argparse.ArgumentParser) -> None:
    """Adds --no-augment."""
    names = [name for name in DATASETS if DATASETS[name].augment is not None]
    parser.add_argument(
        "--no-augment",
        dest="augment",
        action="store_false",
        help=f"no random shifts and flips of {', '.join(names)}",
    )


def is_augmented(chosen: argparse.Namespace) -> bool:
    """Whether training images are augmented: if usual for the data set, and wanted."""
    return DATASETS[chosen.dataset].augment is not None and chosen.augment


def add_out(parser: argparse.ArgumentParser, smoke: str) -> None:
    """Adds --out and --smoke."""
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=folder,
        default=Path(parser.prog.replace(" ", "-")),
        help="folder of the results [%(default)s]",
    )
    parser.add_argument("--smoke", action="store_true", help=smoke)


def add_counts(
    parser: argparse.ArgumentParser,
    counts: Mapping[str, str],
    usual: Mapping[str, int] = {},
) -> None:
    """Adds options for whole numbers above 0; `counts` has their help by name."""
    for name, text in counts.items():
        keywords: Any = {"metavar": "N", "type": number(int, above=0), "help": text}
        parser.add_argument(f"--{name}", **keywords, default=usual.get(name))


def add_number(
    parser: argparse.ArgumentParser,
    name: str,
    usual: float,
    what: str = "",
    above: float | None = None,
) -> None:
    """Adds an option for a number of at least 0, or above `above`."""
    keywords: Any = {"metavar": "X", "type": number(float, above), "default": usual}
    parser.add_argument(f"--{name}", **keywords, help=f"{what} [%(default)s]".strip())


def add_grid(
    parser: argparse.ArgumentParser,
    name: str,
    what: str,
    usual: Sequence[float] | str,
) -> None:
    """Adds an option for several numbers above 0; usual learning rates are SGD's."""
    whose = "sgd: " if name == "learning_rates" else ""
    usual = usual if isinstance(usual, str) else " ".join(f"{x:g}" for x in usual)
    parser.add_argument(
        f"--{name.replace('_', '-')}",
        metavar="X",
        nargs="+",
        type=number(float, above=0),
        help=f"{what} [{whose}{usual}]",
    )


def add_choice(
    parser: argparse.ArgumentParser,
    name: str,
    names: Sequence[str],
    usual: str,
    what: str = "",
) -> None:
    """Adds an option for one of `names`."""
    keywords: Any = {"metavar": "NAME", "choices": names, "default": usual}
    text = f"{what}{', '.join(names)} [%(default)s]"
    parser.add_argument(f"--{name}", **keywords, help=text)


def add_choices(
    parser: argparse.ArgumentParser,
    name: str,
    names: Sequence[str],
    what: str = " [all]",
) -> None:
    """Adds an option for one or more of `names`."""
    keywords: Any = {"metavar": "NAME", "nargs": "+", "choices": names}
    text = f"some of {', '.join(names)}{what}"
    parser.add_argument(f"--{name}", **keywords, help=text)


def filled(
    chosen: argparse.Namespace, usual: Mapping[str, Any], smoke: Mapping[str, Any]
) -> argparse.Namespace:
    """The options; those not given have the usual value, or the smoke test's."""
    preset = {**usual, **smoke} if chosen.smoke else {**usual}
    asked = {key: x for key, x in vars(chosen).items() if x is not None}
    return argparse.Namespace(**{**vars(chosen), **preset, **asked})


def config(kind: type[Config], chosen: argparse.Namespace, **others: Any) -> Config:
    """A command's configuration; its fields come from the options or from `others`."""
    fields: tuple[str, ...] = kind._fields  # type: ignore[attr-defined]
    values = {**vars(chosen), **others}
    return kind(**{key: values[key] for key in fields})


@contextmanager
def extras() -> Iterator[None]:
    """Says what to install if an import of the extras fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        name, *_ = str(error.name).split(".")
        if name == "eigensam_jax":
            raise
        raise UserError(
            f"{name} is not installed; in a clone, pip install '.[experiments]'"
        ) from error


def folder(text: str) -> Path:
    """A parser of paths; an empty one, which would be this folder, is refused."""
    if not text:
        raise argparse.ArgumentTypeError("'' names no folder")
    return Path(text)


_LARGE = 3e38  # beyond it float32 ends


def number(kind: type[Any], above: float | None = None) -> Callable[[str], Any]:
    """Builds a parser of numbers of at least 0, or above `above`, and below 3e38."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (0 <= value < _LARGE if above is None else above < value < _LARGE):
            noun = "whole number" if kind is int else "number"
            bound = "of at least 0" if above is None else f"above {above:g}"
            bound = f"below {_LARGE:g}" if value >= _LARGE else bound
            raise argparse.ArgumentTypeError(f"{text!r} is not a {noun} {bound}")
        return value

    return parse


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations, whose usage and errors are one line."""

    def __init__(self, **kwargs: Any):
        shaped = partial(argparse.HelpFormatter, max_help_position=25)
        usual: Any = {"usage": "%(prog)s [options]", "allow_abbrev": False}
        super().__init__(**(usual | {"formatter_class": shaped} | kwargs))

    def error(self, message: str) -> NoReturn:
        """Ends the command with one line."""
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")
