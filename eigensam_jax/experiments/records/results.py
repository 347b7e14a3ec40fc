"""Results files: what ran, where it ran, and what came out, as JSON."""

import json
import os
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from eigensam_jax.experiments.errors import UserError

PACKAGES = ("eigensam_jax", "jax", "jaxlib", "optax", "flax", "numpy", "scipy")
FILE = "results.json"
SCHEMA = 1  # described in notebooks/results/README.md
DIGITS = 6  # of a number, at least those of the tables
FEW_DIGITS = 2  # of a residual, which says how many of another number hold


def environment() -> dict[str, Any]:
    """Versions and device, for every results file."""
    device = jax.devices()[0]
    return {
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "processor": _processor(),
            "cores": os.cpu_count(),
        },
    }


def make_folder(out: Path) -> None:
    """Makes the folder of `--out`; raises UserError if files can't be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / "results.json.part"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be written to ({error.strerror}); name another folder"
        ) from error
    for taken in filter(Path.is_dir, out.glob("*.png")):
        raise UserError(f"{taken} is a folder, where a plot goes; name another --out")


def read(path: Path) -> dict[str, Any]:
    """Reads a results file.

    Raises:
      UserError: if it has another schema, or is no JSON of results.
      OSError: if it cannot be read.
    """
    try:
        document = dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} holds no results ({error})") from error
    found = document.get("schema")
    if found != SCHEMA:
        raise UserError(
            f"{path} has schema {found}, and this version of eigensam_jax reads "
            f"{SCHEMA}; read it by the version that wrote it"
        )
    return document


def check_command(path: Path, command: str) -> None:
    """UserError if a file at `path` has the results of another command."""
    try:
        made_by = str(read(path)["commands"][0])
    except (FileNotFoundError, UserError, KeyError, IndexError):
        return
    if made_by.split()[:2] != command.split()[:2]:
        raise UserError(
            f"--out {path.parent} holds the results of {made_by}; name another folder"
        )


def write(path: Path, document: dict[str, Any]) -> None:
    """Writes a results file by `replace`, each list of plain values on one line."""
    replace(path, (_text({"schema": SCHEMA, **document}) + "\n").encode())


def rounded(figures: Any, digits: int = DIGITS) -> Any:
    """Figures with the digits that results files keep.

    Round before a later run uses them: then a resumed study gives the same figures.
    """
    if isinstance(figures, dict):
        few = {key: FEW_DIGITS for key in figures if "residual" in key}
        return {key: rounded(x, few.get(key, digits)) for key, x in figures.items()}
    if isinstance(figures, list | tuple):
        return [rounded(x, digits) for x in figures]
    if isinstance(figures, float) and not figures.is_integer():
        return float(f"{figures:.{digits}g}")
    return figures


def ending(path: Path, document: Mapping[str, Any], *plots: str) -> str:
    """The last line of a command: its file, its plots beside it, and the time."""
    drawn = ", ".join(str(path.parent / plot) for plot in plots)
    named = "Plots" if len(plots) > 1 else "Plot"
    seconds = document["wall_time_s"]
    return f"Results: {path}   {named}: {drawn}   Wall time: {seconds:.0f} s"


def select(runs: Iterable[Mapping[str, Any]], **entries: Any) -> list[Any]:
    """The records that have these entries."""
    return [run for run in runs if entries.items() <= run.items()]


def replace(path: Path, content: bytes) -> None:
    """Writes a file in one piece: a reader sees the old or the new one."""
    draft = path.with_name(path.name + ".part")
    draft.write_bytes(content)
    draft.replace(path)


def _text(value: Any, indent: str = "\n") -> str:
    """JSON with each list or dict of plain values on one line."""
    if isinstance(value, dict) and any(map(_is_nested, value.values())):
        items = [(f"{json.dumps(key)}: ", x) for key, x in value.items()]
    elif isinstance(value, list) and any(map(_is_nested, value)):
        items = [("", x) for x in value]
    else:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    inside, text, line = indent + " ", "", True
    for key, x in items:  # plain values go on in the line of the last one
        line = line or _is_nested(x)
        text += f"{',' if text else ''}{inside if line else ' '}{key}{_text(x, inside)}"
        line = _is_nested(x)
    return f"{{{text}{indent}}}" if isinstance(value, dict) else f"[{text}{indent}]"


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict | list)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()
