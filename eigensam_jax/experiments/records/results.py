"""Results files: what ran, where it ran, and what came out, as JSON."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from eigensam_jax.experiments.errors import UserError

PACKAGES = ("eigensam_jax", "jax", "jaxlib", "optax", "flax", "numpy", "scipy")


def environment() -> dict[str, Any]:
    """Versions and device, so that a number can be traced to what made it."""
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
    """Makes the folder of `--out`, before any work is done for it.

    Raises:
      UserError: if it cannot be written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / "results.json.part"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be written to ({error.strerror}); name another folder"
        ) from error


def write(path: Path, results: dict[str, Any]) -> None:
    """Writes `results` as `replace` does."""
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    replace(path, text.encode())


def replace(path: Path, content: bytes) -> None:
    """Writes a file in one piece: a reader sees the old one or the new one."""
    draft = path.with_name(path.name + ".part")
    draft.write_bytes(content)
    draft.replace(path)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()
