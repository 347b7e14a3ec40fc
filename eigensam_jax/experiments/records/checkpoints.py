"""Checkpoint files: a tree of arrays and plain values, whole or not at all."""

import hashlib
from pathlib import Path
from typing import Any

import jax
from flax import serialization

from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.records import results

_DIGEST = hashlib.sha256


def write(path: Path, tree: dict[str, Any]) -> None:
    """Writes `tree` in one piece, in place of the checkpoint that is there.

    Args:
      path: of the file.
      tree: dicts and lists of arrays, numbers, texts and None. States are made such by
        `flax.serialization.to_state_dict`. Nothing in it may be a typed random key.
    """
    content = serialization.msgpack_serialize(jax.device_get(tree))
    results.replace(path, _DIGEST(content).digest() + content)


def read(path: Path) -> dict[str, Any] | None:
    """The tree at `path`, with NumPy's arrays; None where there is no file.

    Raises:
      UserError: if it is not as it was written.
    """
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
