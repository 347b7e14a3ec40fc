"""The `eigensam` command line."""

import argparse
import io
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from eigensam_jax.benchmarks.specs import TRACKERS
from eigensam_jax.experiments.errors import UserError

# Spelt out here so that --help need not import what reads, builds and trains them.
DATASETS = ("digits", "fashion_mnist", "mnist")
MODELS = ("mlp", "cnn", "strided_cnn")
OPTIMIZERS = ("sgd", "sam", "sam_matched", "eigen_sam")

_DATA_DIR = (
    "folder of the four idx files of mnist or fashion_mnist; the latter is found where "
    "Debian's dataset-fashion-mnist puts it"
)
_INTERRUPTED = 130
_SMOKE = {"seeds": 1, "epochs": 2, "evaluations": 2}
_USUAL = {"seeds": 3, "epochs": 100, "evaluations": 20}
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
_SPECTRUM_SMOKE = {"epochs": 2, "k": 3, "num_matvecs": 8, "num_samples": 2}
_SPECTRUM_USUAL = {"epochs": 100, "k": 10, "num_matvecs": 64, "num_samples": 8}
_EXAMPLES = 2_000


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def command() -> NoReturn:
    """The `eigensam` command: `main`, and a way out that is safe in every terminal."""
    for stream in (sys.stdout, sys.stderr):  # an encoding may have no λ
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    code = main()
    if code == _INTERRUPTED:  # a program that still runs may outlive what it uses
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, 2 for a bad option, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    line = shlex.join(["eigensam", *arguments])
    try:
        run: Callable[[argparse.Namespace, str], None] = options.run
        run(options, line)
    except UserError as error:
        print(f"eigensam {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"eigensam {options.command}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="eigensam", description="Experiments with Eigen-SAM.")
    parser.add_argument(
        "--version", action="version", version=f"eigensam_jax {version('eigensam_jax')}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_compare(commands)
    _add_track(commands)
    _add_spectrum(commands)
    return parser


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare",
        help="train a network with SGD, SAM and Eigen-SAM, and show the difference",
        description="Train the same network from the same seeds with each optimizer. "
        "Prints a table and leaves results.json and compare.png in --out, in place of "
        "those of an earlier run.",
    )
    add = compare.add_argument
    _add_problem(compare)
    add(
        "--optimizers",
        metavar="NAME",
        nargs="+",
        choices=OPTIMIZERS,
        default=OPTIMIZERS,
        help=f"some of {', '.join(OPTIMIZERS)}, where sam_matched is SAM at the radius "
        "that eigen_sam had [all]",
    )
    add("--seeds", **_count(), help=f"how many [{_USUAL['seeds']}]")
    _add_training(compare, _USUAL["epochs"])
    _add_out(compare, "1 seed, 2 epochs: does it run at all?")
    compare.set_defaults(run=_compare)


def _add_track(commands: Any) -> None:
    track = commands.add_parser(
        "track",
        help="how well does each tracker follow the top eigenvector?",
        description="Train a network with Eigen-SAM by each tracker, and SAM at the "
        "radius of each run. Prints tables and leaves results.json and track.png in "
        "--out. Runs that are there already are kept: the same command goes on where "
        "it was interrupted, and a tracker, an α or a seed can be added.",
    )
    add = track.add_argument
    _add_problem(track)
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
        type=_number(float, above=0),
        help="α, one or several [0.2 1]",
    )
    add("--seeds", **_count(), help=f"how many [{_TRACK_USUAL['seeds']}]")
    add("--steps", **_count(), help=f"a run [{_TRACK_USUAL['steps']}]")
    _add_out(track, "1 seed, 20 steps: does it run at all?")
    track.set_defaults(run=_track)


def _add_spectrum(commands: Any) -> None:
    spectrum = commands.add_parser(
        "spectrum",
        help="the eigenvalues of the Hessian of a trained network",
        description="Train a network, and find the largest eigenvalues of the Hessian "
        "of its training loss, with residuals, and how all of them are spread. Prints "
        "a table and leaves results.json and spectrum.png in --out, in place of those "
        "of an earlier run.",
    )
    add, usual = spectrum.add_argument, _SPECTRUM_USUAL
    trained = tuple(name for name in OPTIMIZERS if name != "sam_matched")
    _add_problem(spectrum)
    add(
        "--optimizer",
        metavar="NAME",
        choices=trained,
        default="eigen_sam",
        help=_any(trained),
    )
    add("--seed", metavar="N", type=_number(int), default=0, help="[%(default)s]")
    _add_training(spectrum, usual["epochs"])
    add("--k", **_count(), help=f"how many top eigenvalues [{usual['k']}]")
    add(
        "--num-matvecs",
        **_count(),
        help=f"products per random vector, for the density [{usual['num_matvecs']}]",
    )
    add(
        "--num-samples",
        **_count(),
        help=f"random vectors, for the density [{usual['num_samples']}]",
    )
    add(
        "--examples",
        **_count(),
        help="training images that the Hessian is taken on, the first ones "
        f"[{_EXAMPLES}, or all if less]",
    )
    _add_out(spectrum, "2 epochs, few products: does it run at all?")
    spectrum.set_defaults(run=_spectrum)


def _add_problem(parser: argparse.ArgumentParser) -> None:
    """The options of what is learnt, by what."""
    add: Any = parser.add_argument
    names = {"metavar": "NAME"}
    add("--dataset", **names, choices=DATASETS, default="digits", help=_any(DATASETS))
    add("--data-dir", metavar="DIR", type=Path, help=_DATA_DIR)
    add("--model", **names, choices=MODELS, default="mlp", help=_any(MODELS))


def _add_training(parser: argparse.ArgumentParser, epochs: int) -> None:
    """The options of how it is learnt."""
    add: Any = parser.add_argument
    number = {"metavar": "X", "type": _number(float)}
    add("--epochs", **_count(), help=f"how many [{epochs}]")
    add("--batch-size", **_count(), default=128, help="[%(default)s]")
    add(
        "--learning-rate",
        metavar="X",
        type=_number(float, above=0),
        default=0.05,
        help="[%(default)s]",
    )
    add("--rho", **number, default=0.1, help="ρ [%(default)s]")
    add("--alpha", **number, default=0.2, help="α [%(default)s]")


def _add_out(parser: argparse.ArgumentParser, smoke: str) -> None:
    """The options of where results go, and of a run that only tries whether they do."""
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path(parser.prog.replace(" ", "-")),
        help="where results go [%(default)s]",
    )
    parser.add_argument("--smoke", action="store_true", help=smoke)


def _count() -> dict[str, Any]:
    return {"metavar": "N", "type": _number(int, above=0)}


def _any(names: Sequence[str]) -> str:
    return f"{' or '.join(names)} [%(default)s]"


def _compare(options: argparse.Namespace, command: str) -> None:
    with _extras():
        from rich.console import Console

        from eigensam_jax.experiments import compare
    preset = _SMOKE if options.smoke else _USUAL
    config = compare.Config(
        dataset=options.dataset,
        data_dir=options.data_dir,
        model=options.model,
        optimizers=tuple(dict.fromkeys(options.optimizers)),
        seeds=options.seeds or preset["seeds"],
        epochs=options.epochs or preset["epochs"],
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        rho=options.rho,
        alpha=options.alpha,
        evaluations=preset["evaluations"],
        out=options.out,
    )
    compare.run(config, command, Console())


def _track(options: argparse.Namespace, command: str) -> None:
    with _extras():
        from rich.console import Console

        from eigensam_jax.benchmarks import track
    preset = _TRACK_SMOKE if options.smoke else _TRACK_USUAL
    config = track.Config(
        dataset=options.dataset,
        data_dir=options.data_dir,
        model=options.model,
        trackers=tuple(dict.fromkeys(options.trackers or preset["trackers"])),
        alphas=tuple(dict.fromkeys(options.alpha or preset["alpha"])),
        seeds=options.seeds or preset["seeds"],
        steps=options.steps or preset["steps"],
        evaluations=preset["evaluations"],
        out=options.out,
    )
    track.run(config, command, Console())


def _spectrum(options: argparse.Namespace, command: str) -> None:
    with _extras():
        from rich.console import Console

        from eigensam_jax.experiments import spectrum
    preset = _SPECTRUM_SMOKE if options.smoke else _SPECTRUM_USUAL
    config = spectrum.Config(
        dataset=options.dataset,
        data_dir=options.data_dir,
        model=options.model,
        optimizer=options.optimizer,
        seed=options.seed,
        epochs=options.epochs or preset["epochs"],
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        rho=options.rho,
        alpha=options.alpha,
        k=options.k or preset["k"],
        num_matvecs=options.num_matvecs or preset["num_matvecs"],
        num_samples=options.num_samples or preset["num_samples"],
        examples=options.examples,
        out=options.out,
    )
    spectrum.run(config, command, Console())


@contextmanager
def _extras() -> Iterator[None]:
    """Says what to install where an import of the extras fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed; pip install 'eigensam_jax[experiments]'"
        ) from error


def _number(kind: type[Any], above: float | None = None) -> Callable[[str], Any]:
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
