"""Results files that a later call of the same command carries on."""

import json
from pathlib import Path
from typing import Any

from eigensam_jax.experiments import results
from eigensam_jax.experiments.errors import UserError


def document(
    path: Path, command: str, config: dict[str, Any], trackers: dict[str, str]
) -> dict[str, Any]:
    """The results file at `path` to go on with, or an empty one where there is none.

    Args:
      path: of `results.json`, in the folder of `--out`.
      command: the command line of this call, which is added to those before it.
      config: all that the figures of every run depend on, in types that JSON knows.
      trackers: how each tracker is made; those of the file that it does not name may be
        any, and are kept.

    Raises:
      UserError: if the file is of another configuration or other versions, or is none.
    """
    new = {
        "commands": [command],
        "config": config,
        "trackers": trackers,
        **results.environment(),
        "complete": False,
        "wall_time_s": 0.0,
        "runs": [],
    }
    try:
        old = json.loads(path.read_text())
        kept = {key: old[key] for key in ("wall_time_s", "runs")}
        kept["commands"] = list(dict.fromkeys([*old["commands"], command]))
        kept["trackers"] = trackers | old["trackers"]
        pairs = [(old[key], new[key]) for key in ("config", "versions", "device")]
        pairs.append((kept["trackers"], kept["trackers"] | trackers))
    except FileNotFoundError:
        return new
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--out {path.parent}: its results.json cannot be read ({error!r}); name "
            "another folder"
        ) from error
    for before, now in pairs:
        for key in {**before, **now}:
            if before.get(key) != now.get(key):
                raise UserError(
                    f"--out {path.parent} holds results of another configuration "
                    f"({key} {before.get(key)}, now {now.get(key)}); name another "
                    "folder"
                )
    return new | kept
