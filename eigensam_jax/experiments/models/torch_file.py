"""State dicts in PyTorch's format before version 1.6, read without PyTorch.

A file is a sequence of pickles: a magic number, the protocol version, the writer's
system, the state dict, the keys of its storages. The storages follow in that order,
each a count of elements (int64) and the elements. A tensor is a storage with an offset,
a shape and strides, counted in elements.

A pickle may name any function for its reader to call. This reader accepts three kinds
of names and nothing else, so no code from the file can run.
"""

import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eigensam_jax.experiments.errors import UserError

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_ZIP = b"PK\x03\x04"
_COUNT = np.dtype("<i8")
_DTYPES = {
    f"{kind}Storage": np.dtype(code)
    for kind, code in (
        *(("Bool", "?"), ("Byte", "u1"), ("Char", "i1"), ("Short", "<i2")),
        *(("Int", "<i4"), ("Long", "<i8")),
        *(("Half", "<f2"), ("Float", "<f4"), ("Double", "<f8")),
    )
}


class _Storage(NamedTuple):
    """A storage as the pickle describes it; its elements come later in the file.

    Attributes:
      kind: a key of `_DTYPES`.
      key, size: its name in the file, and its number of elements.
    """

    kind: str
    key: str
    size: int


class _Tensor(NamedTuple):
    """A view of a storage, counted in elements.

    Attributes:
      storage, offset, shape, strides: as in `torch.as_strided`.
    """

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def arrays(content: bytes, path: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict by name, in the order of the file.

    Errors name `path`. The arrays are read-only views of `content`; tensors that shared
    memory still do.

    Raises:
      UserError: if the file has another format, is cut off or damaged, or if its
        pickles name anything that a state dict of tensors does not need.
    """
    if content.startswith(_ZIP):
        raise UserError(
            f"{path} is a torch file of version 1.6 or later; write the state dict "
            "anew by torch.save(..., _use_new_zipfile_serialization=False)"
        )
    try:
        return _state_dict(io.BytesIO(content), path)
    except UserError:
        raise
    except Exception as error:  # damaged pickles raise all kinds of errors
        raise UserError(
            f"{path} is no torch file from before version 1.6, or cannot be read to "
            f"its end ({error}); it may be another file, cut off or damaged: fetch it "
            "anew"
        ) from error


def _state_dict(stream: io.BytesIO, path: Path) -> dict[str, np.ndarray]:
    def load() -> Any:
        return _Unpickler(stream, path).load()

    if load() != _MAGIC or load() != _PROTOCOL:
        raise ValueError("no magic number")
    system = load()
    if system["little_endian"] is not True:
        raise UserError(
            f"{path} was written big-endian; load and save it on another machine"
        )
    tensors = load()
    if type(tensors) is not OrderedDict and type(tensors) is not dict:
        raise UserError(
            f"{path} holds a {type(tensors).__name__}; it should hold a state dict: "
            "write model.state_dict()"
        )
    # dict's own method: a pickle may set an attribute that hides the instance's.
    for name, tensor in dict.items(tensors):
        if type(name) is not str or type(tensor) is not _Tensor:
            raise UserError(
                f"{path}: {name!r} is a {type(tensor).__name__}; in a state dict it "
                "should be a tensor: write model.state_dict() and nothing around it"
            )
    known = {tensor.storage.key: tensor.storage for tensor in dict.values(tensors)}
    keys = load()
    if len(keys) != len(set(keys)) or set(keys) != set(known):
        raise ValueError("storages are not those of the tensors")
    storages = {key: _elements(stream, known[key]) for key in keys}
    if stream.read(1):
        raise ValueError("more follows the last storage")
    return {
        name: _view(tensor, storages[tensor.storage.key])
        for name, tensor in dict.items(tensors)
    }


class _Unpickler(pickle.Unpickler):
    """Rebuilds the tensors of a state dict, and refuses any other function."""

    def __init__(self, stream: io.BytesIO, path: Path):
        super().__init__(stream)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            # A new one every time: a pickle may change the attributes of what it gets.
            return lambda storage, offset, shape, strides, *_: _Tensor(
                storage, offset, shape, strides
            )
        if module == "torch" and name in _DTYPES:
            return name
        raise UserError(
            f"{self._path} asks for {module}.{name}, which a state dict of tensors "
            "does not need; nothing of it was run. If you trust it, write "
            "model.state_dict() alone from PyTorch, else fetch it from elsewhere"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        tag, kind, key, _, size, view = pid
        if tag != "storage" or kind not in _DTYPES or view is not None:
            raise ValueError(f"{pid!r} is no storage")
        return _Storage(kind, key, size)


def _elements(stream: io.BytesIO, storage: _Storage) -> np.ndarray:
    """The elements of the next storage in the file."""
    (size,) = np.frombuffer(stream.read(_COUNT.itemsize), _COUNT)
    if size != storage.size:
        raise ValueError(f"storage {storage.key} has {size} of {storage.size} elements")
    start, dtype = stream.tell(), _DTYPES[storage.kind]
    found = np.frombuffer(stream.getbuffer().toreadonly(), dtype, storage.size, start)
    stream.seek(start + found.nbytes)
    return found


def _view(tensor: _Tensor, elements: np.ndarray) -> np.ndarray:
    """The tensor as an array, if it lies within its storage."""
    _, offset, shape, strides = tensor
    whole = all(type(n) is int and n >= 0 for n in (offset, *shape, *strides))
    if not whole or len(shape) != len(strides):
        raise ValueError(f"{shape}, {strides} is no shape with strides")
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if 0 not in shape and offset + last >= len(elements):
        raise ValueError(f"{shape} at {offset} is not within {len(elements)} elements")
    steps = [s * elements.itemsize for s in strides]
    return np.lib.stride_tricks.as_strided(
        elements[offset:], shape, steps, writeable=False
    )
