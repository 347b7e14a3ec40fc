"""Files in torch's old format, written here by hand."""

import contextlib
import io
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.models import torch_file

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
SYSTEM = {"protocol_version": PROTOCOL, "little_endian": True, "type_sizes": {}}
KINDS = {
    "?": "Bool",
    "u1": "Byte",
    "i1": "Char",
    "i2": "Short",
    "i4": "Int",
    "i8": "Long",
    "f2": "Half",
    "f4": "Float",
    "f8": "Double",
}
PATH = Path("some.pth")


class Named:
    """Stands for a function or class of another module, which is not here."""

    def __init__(self, module, name):
        self.module, self.name = module, name

    def __call__(self):
        raise AssertionError("only a name, which pickle wants to be callable")


class Called:
    """A call of such a function, on loading."""

    def __init__(self, named, *arguments):
        self.call = named, arguments

    def __reduce__(self):
        return self.call


class Storage:
    def __init__(self, key, array, kind=None):
        self.key, self.array = key, np.asarray(array)
        code = self.array.dtype.str.lstrip("<|").replace("b1", "?")
        self.kind = kind or f"{KINDS[code]}Storage"


def tensor(storage, offset=0, shape=None, strides=None):
    shape = storage.array.shape if shape is None else shape
    strides = (1,) if strides is None else strides
    rebuild = Named("torch._utils", "_rebuild_tensor_v2")
    return Called(rebuild, storage, offset, shape, strides, False, OrderedDict())


class Pickler(pickle._Pickler):
    """Writes a name as it is, and of a storage what torch says of it."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def persistent_id(self, thing):
        if isinstance(thing, Storage):
            named = Named("torch", thing.kind)
            return ("storage", named, thing.key, "cpu", len(thing.array), None)
        return None

    def save_named(self, named):
        self.write(b"c" + f"{named.module}\n{named.name}\n".encode())

    dispatch[Named] = save_named


def pickled(thing):
    stream = io.BytesIO()
    Pickler(stream, 2).dump(thing)
    return stream.getvalue()


def written(tensors, storages, system=SYSTEM):
    """A file; the storages in another order than the tensors."""
    parts = [pickled(x) for x in (MAGIC, PROTOCOL, system, tensors)]
    ordered = sorted(storages, key=lambda storage: storage.key)
    parts.append(pickled([storage.key for storage in ordered]))
    for storage in ordered:
        parts.append(np.int64(len(storage.array)).tobytes())
        parts.append(storage.array.tobytes())
    return b"".join(parts)


def small():
    """A state dict with tensors of every kind of view, and what they are."""
    numbers = np.arange(24, dtype="<f4")
    floats, count = Storage("9", numbers), Storage("10", np.array([7]))
    tensors = OrderedDict(
        whole=tensor(floats, 0, (2, 3, 4), (12, 4, 1)),
        turned=tensor(floats, 0, (4, 3, 2), (1, 4, 12)),
        part=tensor(floats, 5, (3, 2), (6, 2)),
        one=tensor(floats, 23, (1,), (1,)),
        none=tensor(floats, 24, (0, 3), (3, 1)),
        count=tensor(count, 0, (), ()),
    )
    cube = numbers.reshape(2, 3, 4)
    rows = [[5, 7], [11, 13], [17, 19]]
    expected = {
        "whole": cube,
        "turned": cube.transpose(2, 1, 0),
        "part": np.array(rows, "<f4"),
        "one": numbers[23:],
        "none": np.zeros((0, 3), "<f4"),
        "count": np.array(7),
    }
    return written(tensors, [floats, count]), expected


def test_tensors_are_views_with_their_strides():
    content, expected = small()
    found = torch_file.arrays(content, PATH)
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
        assert not found[name].flags.writeable
    assert np.shares_memory(found["whole"], found["turned"])
    assert np.shares_memory(found["whole"], found["part"])


@pytest.mark.parametrize("code", KINDS)
def test_every_kind_of_storage(code):
    array = np.array([1, 0, 1, 1]).astype(np.dtype(code).newbyteorder("<"))
    storage = Storage("0", array)
    found = torch_file.arrays(written({"x": tensor(storage)}, [storage]), PATH)["x"]
    np.testing.assert_array_equal(found, array)
    assert found.dtype == array.dtype


def test_attributes_of_a_state_dict_are_left_alone():
    """torch hangs `_metadata` on it; another name hides no method from the reader."""
    storage = Storage("0", np.ones(2, "<f4"))
    tensors = Called(Named("collections", "OrderedDict"), [["x", tensor(storage)]])
    hidden = dict.fromkeys(("items", "values", "keys"), "a text")
    tensors.call = *tensors.call, {"_metadata": OrderedDict(version=1), **hidden}
    found = torch_file.arrays(written(tensors, [storage]), PATH)
    assert list(found) == ["x"]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("numpy", "load"),
        ("torch", "load"),
        ("torch", "FloatStorage.__class__"),
        ("torch.storage", "_load_from_bytes"),
        ("collections", "OrderedDict.fromkeys"),
        ("collections", "namedtuple"),
        ("eigensam_jax.experiments.models.torch_file", "Path"),
    ],
)
@pytest.mark.parametrize("where", ["first", "system", "tensors", "keys"])
def test_a_file_that_calls_anything_else_is_refused(module, name, where, tmp_path):
    left = tmp_path / "left"
    evil = Called(Named(module, name), f"touch {left}")
    things = {"first": MAGIC, "version": PROTOCOL, "system": SYSTEM, "tensors": {}}
    things = {**things, "keys": [], where: evil}
    content = b"".join(map(pickled, things.values()))
    with pytest.raises(UserError) as error:
        torch_file.arrays(content, PATH)
    assert str(error.value).startswith(f"some.pth asks for {module}.{name}, which")
    assert not left.exists()


def test_the_file_that_is_refused_would_have_run(tmp_path):
    """By the usual reader, so that the test above is one."""
    left = tmp_path / "left"
    pickle.loads(pickled(Called(Named("os", "system"), f"touch {left}")))
    assert left.exists()


def test_a_pickle_changes_nothing_for_the_next():
    """It may set attributes of what it is given, but gets its own."""
    named = Named("torch._utils", "_rebuild_tensor_v2")
    stream = io.BytesIO()
    pickler = Pickler(stream, 2)
    pickler.write(pickle.PROTO + b"\x02")
    pickler.save(named)
    pickler.save((None, {"__defaults__": (1, 2, 3, 4), "__kwdefaults__": {}}))
    pickler.write(pickle.BUILD + pickle.STOP)
    with pytest.raises(UserError, match="magic number"):
        torch_file.arrays(stream.getvalue(), PATH)
    content, expected = small()
    assert list(torch_file.arrays(content, PATH)) == list(expected)


def test_a_file_that_ends_anywhere_is_refused():
    content, _ = small()
    for length in range(len(content)):
        with pytest.raises(UserError, match=r"some\.pth .*fetch it anew"):
            torch_file.arrays(content[:length], PATH)
    with pytest.raises(UserError, match="more follows the last storage"):
        torch_file.arrays(content + b"\0", PATH)


def test_a_file_with_a_byte_changed_is_read_or_refused():
    content, _ = small()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(content), 500):
        changed = bytearray(content)
        changed[place] = rng.integers(256)
        with contextlib.suppress(UserError):
            torch_file.arrays(bytes(changed), PATH)


STORAGE = Storage("0", np.arange(6, dtype="<f4"))


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ((0, (7,), (1,)), "not within 6 elements"),
        ((1, (6,), (1,)), "not within 6 elements"),
        ((0, (2, 3), (4, 1)), "not within 6 elements"),
        ((6, (), ()), "not within 6 elements"),
        ((-1, (2,), (1,)), "no shape with strides"),
        ((5, (2,), (-1,)), "no shape with strides"),
        ((0, (-2,), (1,)), "no shape with strides"),
        ((0, (2, 3), (1,)), "no shape with strides"),
        ((0, (2.0,), (1,)), "no shape with strides"),
        ((0, (10**30,), (0,)), "cannot be read to its end"),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(view, message):
    content = written({"x": tensor(STORAGE, *view)}, [STORAGE])
    with pytest.raises(UserError, match=message):
        torch_file.arrays(content, PATH)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no torch file from before"),
        (b"GIF89a", "no torch file from before"),
        (pickled(MAGIC) + pickled(1000), "no magic number"),
        (b"PK\x03\x04 and more", "_use_new_zipfile_serialization=False"),
        (written([], []), "holds a list; it should hold a state dict"),
        (written({"epoch": 3}, []), "'epoch' is a int; .*model.state_dict"),
        (written({"state_dict": {}}, []), "'state_dict' is a dict; .*nothing around"),
        (written({}, [], {"little_endian": False}), "was written big-endian"),
        (written({}, [STORAGE]), "storages are not those of the tensors"),
        (written({"x": tensor(STORAGE)}, []), "storages are not those of the tensors"),
        (
            written({"x": tensor(Storage("0", np.ones(5, "<f4")))}, [STORAGE]),
            "storage 0 has 6 of 5 elements",
        ),
        (
            written({"x": tensor(Storage("0", STORAGE.array, "QInt8Storage"))}, []),
            "asks for torch.QInt8Storage",
        ),
    ],
)
def test_what_is_no_state_dict_is_refused(content, message):
    with pytest.raises(UserError, match=message) as error:
        torch_file.arrays(content, PATH)
    assert "some.pth" in str(error.value)
    assert os.linesep not in str(error.value)
