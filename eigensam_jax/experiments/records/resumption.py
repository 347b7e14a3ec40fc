"""Results files that a later call of the same command continues."""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.records import checkpoints, results

# Values in older files, which do not record them.
_ONCE = {"base_optimizer": "sgd", "weight_decay": 0.0}
_NOT_ONCE = ("data_crc32", "next_crc32")  # whose values then are not known


def of_runs(
    path: Path,
    command: str,
    config: dict[str, Any],
    trackers: dict[str, str] | None = None,
    *,
    seeds: int | None = None,
) -> dict[str, Any]:
    """The results file at `path` to continue, or a new one without runs.

    `config` is everything that all runs depend on, in types of JSON. `trackers` says
    how each tracker is made, if the file should; others in the file are kept. The runs
    to do are of the first `seeds` seeds, if they have any.

    Raises:
      UserError: if the file is invalid, is unfinished and has more seeds, or has
        another configuration, device or versions; names the first difference.
    """
    new: dict[str, Any] = {
        "commands": [command],
        "config": config,
        **results.environment(),
        "complete": False,
        "wall_time_s": 0.0,
        "runs": [],
        **({} if trackers is None else {"trackers": trackers}),
    }
    try:
        old = results.read(path)
        for key in new:
            if type(old[key]) is not type(new[key]):
                raise TypeError(key)
    except FileNotFoundError:
        return new
    except (UserError, OSError, KeyError, TypeError) as error:
        raise UserError(
            f"--out {path.parent}: its {path.name} cannot be read as one of this "
            f"command ({error}); name another folder"
        ) from error
    for key in ("config", "versions", "device"):
        check_same(path.parent, old[key], new[key])
    of_seeds = [x for x in old["runs"] if "seed" in x and not x.get("tuning")]
    begun = 1 + max((x["seed"] for x in of_seeds), default=-1)
    if seeds is not None and begun > seeds and not old["complete"]:
        raise UserError(
            f"--out {path.parent} holds a part of the runs of {begun} seeds; finish "
            f"them by --seeds {begun}, or name another folder"
        )
    kept: dict[str, Any] = {key: old[key] for key in ("wall_time_s", "runs")}
    kept["commands"] = list(dict.fromkeys([*old["commands"], *new["commands"]]))
    if "trackers" in new:
        kept["trackers"] = new["trackers"] | old["trackers"]
        check_same(path.parent, kept["trackers"], kept["trackers"] | new["trackers"])
    return new | kept


def add_runs(
    path: Path,
    document: dict[str, Any],
    runs: Iterable[dict[str, Any] | list[dict[str, Any]]],
    console: Console,
    in_order: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = list,
    checkpoint: Path | None = None,
) -> None:
    """Adds runs to the results file one by one, as they end, and completes it.

    `runs` are the missing ones; a list holds runs that end together. `document` is the
    content of the file, updated in place; `in_order` sorts all runs. `checkpoint` is
    the file of a run in progress, if any.

    Raises:
      KeyboardInterrupt: passed on, like a UserError, with the finished runs on disk.
    """
    before, start = document["wall_time_s"], time.perf_counter()
    try:
        for run in runs:
            ended = run if isinstance(run, list) else [run]
            document["runs"] = in_order([*document["runs"], *ended])
            document["wall_time_s"] = before + time.perf_counter() - start
            results.write(path, document)
    except (KeyboardInterrupt, UserError):
        done = len(document["runs"])
        console.print(
            f"{done} finished runs are in {path}; the same command goes on from there."
            if done
            else "No run was finished."
        )
        if checkpoint is not None and checkpoint.exists():
            console.print(
                f"The one in progress is in {checkpoint}, up to its last look."
            )
        raise
    document["complete"] = True
    results.write(path, document)


def unfinished(checkpoint: Path, described: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint of a run that `described` describes; empty if there is none.

    Such checkpoints hold `described` as JSON. One of an earlier version does not.

    Raises:
      UserError: if the file is damaged, or its run has another description.
    """
    saved = checkpoints.read(checkpoint) or {}
    if "described" not in saved:
        return {}
    check_same(checkpoint.parent, json.loads(saved["described"]), described)
    return saved


def missing(
    jobs: Iterable[dict[str, Any]], runs: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The jobs that match no record, with numbers rounded as in records."""
    rounded = results.rounded(list(jobs))
    return [job for job in rounded if not results.select(runs, **job)]


def check_same(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UserError if `before` and `now` differ, other than in paths of folders."""
    for key in {**before, **now}:
        if key in _NOT_ONCE and key not in before:
            continue
        one, other = before.get(key, _ONCE.get(key)), now.get(key, _ONCE.get(key))
        if isinstance(one, dict) and isinstance(other, dict):
            check_same(out, one, other)
        # Folders may have moved, or be written differently.
        elif key not in ("out", "data_dir") and one != other:
            raise UserError(
                f"--out {out} holds results of another configuration "
                f"({key} {one}, now {other}); name another folder"
            )
