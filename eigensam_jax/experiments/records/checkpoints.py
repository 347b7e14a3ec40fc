"""Checkpoint files: a tree of arrays and plain values, complete or absent."""

import hashlib
from pathlib import Path
from typing import Any

import jax
from flax import serialization

from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.records import results

_DIGEST = hashlib.sha256


def write(path: Path, tree: dict[str, Any]) -> None:
    """Writes `tree` in one piece, in place of an earlier checkpoint.

    It may hold dicts and lists of arrays, numbers, strings and None, but no typed
    random keys. `flax.serialization.to_state_dict` converts states.
    """
    content = serialization.msgpack_serialize(jax.device_get(tree))
    results.replace(path, _DIGEST(content).digest() + content)


def read(path: Path) -> dict[str, Any] | None:
    """The tree at `path` in NumPy arrays, None without a file; UserError if damaged."""
    try:
        found = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(
            f"--out {path.parent}: its {path.name} cannot be read ({error.strerror}); "
            "name another folder"
        ) from error
    size = _DIGEST().digest_size
    digest, content = found[:size], found[size:]
    if _DIGEST(content).digest() != digest:
        raise UserError(
            f"{path} is damaged; delete it, and the run in progress begins again: "
            "finished ones are in results.json"
        )
    tree: dict[str, Any] = serialization.msgpack_restore(content)
    return tree
