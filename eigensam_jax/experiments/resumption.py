"""Results files that a later call of the same command carries on."""

import json
from pathlib import Path
from typing import Any

from eigensam_jax.experiments import results
from eigensam_jax.experiments.errors import UserError


def of_trackers(
    path: Path, command: str, config: dict[str, Any], trackers: dict[str, str]
) -> dict[str, Any]:
    """The results file of runs with trackers: that at `path`, or one without runs.

    Args:
      path: of `results.json`, in the folder of `--out`.
      command: the command line of this call, which is added to those before it.
      config: all that the figures of every run depend on, in types that JSON knows.
      trackers: how each tracker is made.

    Raises:
      UserError: as `document`.
    """
    return document(
        path,
        {
            "commands": [command],
            "config": config,
            "trackers": trackers,
            **results.environment(),
            "complete": False,
            "wall_time_s": 0.0,
            "runs": [],
        },
    )


def document(path: Path, new: dict[str, Any]) -> dict[str, Any]:
    """The results file at `path` to go on with, or `new` where there is none.

    Args:
      path: of `results.json`, in the folder of `--out`.
      new: the results of this call, before its first run.

    Raises:
      UserError: if the file is of another configuration or other versions, or is none.
    """
    try:
        old = json.loads(path.read_text())
        for key in new:
            if type(old[key]) is not type(new[key]):
                raise TypeError(key)
    except FileNotFoundError:
        return new
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--out {path.parent}: its results.json cannot be read ({error!r}); name "
            "another folder"
        ) from error
    return carried_on(path.parent, old, new)


def carried_on(out: Path, old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` with the runs of `old`.

    Args:
      out: the folder of `--out`.
      old: results of an earlier call.
      new: those of this call: `config` is all that the figures of every run depend on,
        in types that JSON knows; `commands`, if there, are added to those before;
        `trackers`, if there, say how each is made, and those of `old` that are not
        among them may be any, and are kept.

    Raises:
      UserError: for the first difference, by its name.
    """
    for key in ("config", "versions", "device"):
        _check_same(out, old[key], new[key])
    carried = ("command", "wall_time_s", "runs")
    kept: dict[str, Any] = {key: old[key] for key in carried if key in new}
    if "commands" in new:
        kept["commands"] = list(dict.fromkeys([*old["commands"], *new["commands"]]))
    if "trackers" in new:
        kept["trackers"] = new["trackers"] | old["trackers"]
        _check_same(out, kept["trackers"], kept["trackers"] | new["trackers"])
    return new | kept


def is_unfinished(path: Path) -> bool:
    """Whether the results at `path` are of a command that did not come to its end."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("complete") is False


def _check_same(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for key in {**before, **now}:
        # The folder may have been moved, or be named in another way.
        if key != "out" and before.get(key) != now.get(key):
            raise UserError(
                f"--out {out} holds results of another configuration "
                f"({key} {before.get(key)}, now {now.get(key)}); name another folder"
            )
