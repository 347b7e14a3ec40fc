"""The wings: each answers some of the commands, and is known by four doors alone."""

import argparse
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from eigensam_jax.experiments.after_training import wing as after_training
from eigensam_jax.experiments.bench import wing as bench
from eigensam_jax.experiments.options import Parser
from eigensam_jax.experiments.sde import wing as sde
from eigensam_jax.experiments.spectrum import wing as spectrum
from eigensam_jax.experiments.study import wing as study
from eigensam_jax.experiments.track import wing as track


class Wing(Protocol):
    """The four doors of a wing."""

    def add_command(self, subparsers: Any) -> None:
        """Adds its commands."""

    def run(self, chosen: argparse.Namespace, command: str) -> None:
        """Runs the command and leaves a results file and plots in `--out`.

        Raises UserError for options that cannot be run, before any work is done, and
        when a run diverges. On KeyboardInterrupt, finished work is on disk.
        """

    def tables(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        """Functions from a page's argument to rows, by the table's name."""

    def plots(self, results: dict[str, Any], folder: Path) -> None:
        """Draws the plots of a results file."""


WINGS: dict[str, Wing] = {
    "study": study,
    "track": track,
    "spectrum": spectrum,
    "sde": sde,
    "bench": bench,
    "after_training": after_training,
}


def add_commands(subparsers: Any) -> dict[str, str]:
    """Adds the commands of all wings; returns of each the name of its wing."""
    found: dict[str, str] = {}
    for name, wing in WINGS.items():
        wing.add_command(subparsers)
        found |= {x: name for x in subparsers.choices if x not in found}
    return found


def wing_of(results: dict[str, Any]) -> str:
    """The name of the wing whose command made a results file."""
    return _wings()[results["commands"][0].split()[1]]


@cache
def _wings() -> dict[str, str]:
    return add_commands(Parser().add_subparsers())
