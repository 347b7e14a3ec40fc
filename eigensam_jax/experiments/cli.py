"""The `eigensam` command line."""

import argparse
import io
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from eigensam_jax.experiments import options
from eigensam_jax.experiments.bench.command import add_bench
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.options import Parser
from eigensam_jax.experiments.sde.command import add_sde
from eigensam_jax.experiments.spectrum.command import add_spectrum
from eigensam_jax.experiments.study.command import (
    add_ablate,
    add_accuracy,
    add_compare,
)
from eigensam_jax.experiments.track.command import add_track

_INTERRUPTED = 130


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
    parser = Parser(prog="eigensam", description="Experiments with Eigen-SAM.")
    parser.add_argument(
        "--version", action="version", version=f"eigensam_jax {version('eigensam_jax')}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_compare(commands)
    add_accuracy(commands)
    add_ablate(commands)
    add_track(commands)
    add_spectrum(commands)
    add_sde(commands)
    add_bench(commands)
    _add_report(commands)
    return parser


def _add_report(commands: Any) -> None:
    """Adds `eigensam report`."""
    report = commands.add_parser(
        "report",
        help="bring the tables and plots of a clone up to date with its results",
        description="Write the rows of every table in the pages of a clone from its "
        "results files, and draw every plot anew.",
    )
    report.add_argument(
        "--root",
        metavar="DIR",
        type=Path,
        default=Path(),
        help="folder of the clone [this one]",
    )
    report.set_defaults(run=_report)


def _report(chosen: argparse.Namespace, command: str) -> None:
    del command
    with options.extras():
        from eigensam_jax.experiments import report
    for path in report.run(chosen.root):
        print(path)
