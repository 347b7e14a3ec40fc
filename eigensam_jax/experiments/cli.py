"""The `eigensam` command line."""

import argparse
import io
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import jax

from eigensam_jax.experiments import options
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.wings import WINGS, add_commands

_INTERRUPTED = 130


def command() -> NoReturn:
    """The `eigensam` command: runs `main` and exits."""
    for stream in (sys.stdout, sys.stderr):  # an encoding may lack λ
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    code = main()
    if code == _INTERRUPTED:  # skip teardown: a program may still be running
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, 2 after a `UserError`, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = _parser().parse_args(arguments)
    if getattr(chosen, "smoke", False):
        compile_fast()
    try:
        with options.extras():
            chosen.run(chosen, shlex.join(["eigensam", *arguments]))
    except UserError as error:
        print(f"eigensam {chosen.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"eigensam {chosen.command}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return 0


def compile_fast() -> None:
    """Makes compilation about four times faster, for runs of seconds.

    Call it before JAX is first used. Flags set in the environment stay in force.
    """
    flags = ["--xla_cpu_parallel_codegen_split_count=1"]
    if jax.__version_info__ < (0, 11):  # the older code generator
        flags.append("--xla_cpu_use_fusion_emitters=false")
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = " ".join([*(f for f in flags if f not in given), given])
    name = "jax_disable_most_optimizations"
    if name.upper() not in os.environ:
        config: Any = jax.config
        config.update(name, True)
        os.environ[name.upper()] = "1"


def _parser() -> argparse.ArgumentParser:
    parser = options.Parser(
        prog="eigensam", usage=None, description="Experiments with Eigen-SAM."
    )
    parser.add_argument(
        "--version", action="version", version=f"eigensam_jax {version('eigensam_jax')}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, wing in add_commands(commands).items():
        commands.choices[name].set_defaults(run=WINGS[wing].run)
    _add_report(commands)
    return parser


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="rewrite the tables and plots of a clone from its results",
        description="Rewrite the rows of every table in the pages of a clone from its "
        "results files, and redraw every plot.",
    )
    report.add_argument(
        "--root",
        metavar="DIR",
        type=options.folder,
        default=Path(),
        help="folder of the clone [this one]",
    )
    report.add_argument(
        "--only",
        metavar="WING",
        choices=tuple(WINGS),
        help=f"one of {', '.join(WINGS)}; study holds compare, accuracy, frontier and "
        "ablate [all]",
    )
    report.set_defaults(run=_report)


def _report(chosen: argparse.Namespace, command: str) -> None:
    del command
    from eigensam_jax.experiments import report

    for path in report.run(chosen.root, chosen.only):
        print(path)
