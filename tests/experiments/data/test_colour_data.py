"""CIFAR-10, CIFAR-100 and SVHN, from small files in each of their formats."""

import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import io

from eigensam_jax.experiments import entries, registry
from eigensam_jax.experiments.data import cifar, integrity, svhn
from eigensam_jax.experiments.data import load as data
from eigensam_jax.experiments.errors import UserError

CLASSES = 4
TRAIN, TEST = 40, 8
EACH = TRAIN // 5  # as many as in the test set, as in CIFAR-10
BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
REAL_CIFAR10 = os.environ.get("CIFAR10_DIR")


def facts(arrays):
    """What the small set is known by; the checksums by their definition."""
    images, labels, test_images, test_labels = arrays
    means = tuple(images.reshape(-1, 3).mean(0))
    crc = lambda x, y: zlib.crc32(x.tobytes() + y.tobytes())
    parts = [slice(EACH * i, EACH * (i + 1)) for i in range(5)]
    sheets = [crc(images[part], labels[part]) for part in parts]
    sheets.append(crc(test_images, test_labels))
    per_class = TRAIN // CLASSES, TEST // CLASSES
    counts = [(count,) * CLASSES for count in per_class]
    return integrity.Facts("a small set", *counts, means, tuple(sheets))


@pytest.fixture(scope="module")
def arrays():
    """Images of noise, darker in each class, and labels in no order."""
    rng = np.random.default_rng(0)
    found = []
    for count in (TRAIN, TEST):
        labels = rng.permutation(np.arange(count) % CLASSES).astype(np.uint8)
        images = rng.integers(0, 200, (count, 32, 32, 3), np.uint8)
        found += [images + 10 * labels[:, None, None, None], labels]
    return found


def records(images, labels):
    """The binary version, written a pixel at a time."""
    content = bytearray()
    for image, label in zip(images, labels, strict=True):
        content += bytes(label)
        for channel in range(3):
            for row in range(32):
                content += bytes(
                    int(image[row, column, channel]) for column in range(32)
                )
    return bytes(content)


def write_binary(folder, arrays):
    images, labels, test_images, test_labels = arrays
    for i, name in enumerate(BATCHES):
        part = slice(EACH * i, EACH * (i + 1))
        content = records(images[part], labels[part, None])
        (folder / f"{name}.bin").write_bytes(content)
    content = records(test_images, test_labels[:, None])
    (folder / "test_batch.bin").write_bytes(content)


def write_fine(folder, arrays):
    images, labels, test_images, test_labels = arrays
    for name, x, y in (
        ("train", images, labels),
        ("test", test_images, test_labels),
    ):
        both = np.stack([19 - y, y], 1)
        (folder / f"{name}.bin").write_bytes(records(x, both))


def write_sheets(folder, arrays):
    images, labels, test_images, test_labels = arrays
    for i, name in enumerate(BATCHES):
        sheet = images[EACH * i : EACH * (i + 1)].reshape(EACH, 1024, 3)
        Image.fromarray(sheet).save(folder / f"{name}.png")
    sheet = test_images.reshape(TEST, 1024, 3)
    Image.fromarray(sheet).save(folder / "test_batch.png")
    for name, y in (("train", labels), ("test", test_labels)):
        (folder / f"{name}_lables.json").write_text(json.dumps(y.tolist()))


def write_mat(folder, arrays):
    """Digit 0, which is class 0 here, is label 10."""
    images, labels, test_images, test_labels = arrays
    for name, x, y in (
        ("train", images, labels),
        ("test", test_images, test_labels),
    ):
        y = np.where(y == 0, 10, y).astype(np.uint8)[:, None]
        content = {"X": x.transpose(1, 2, 3, 0), "y": y}
        io.savemat(folder / f"{name}_32x32.mat", content, do_compression=True)


def load(kind, folder, arrays):
    known = facts(arrays)
    match kind:
        case "binary" | "sheets":
            return cifar.cifar10(folder, known)
        case "fine":
            return cifar.cifar100(folder, known)
        case "mat":
            return svhn.svhn(folder, known)


WRITERS = {
    "binary": write_binary,
    "sheets": write_sheets,
    "fine": write_fine,
    "mat": write_mat,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_what_was_written_is_read(kind, arrays, tmp_path):
    WRITERS[kind](tmp_path, arrays)
    for ours, theirs in zip(load(kind, tmp_path, arrays), arrays, strict=True):
        assert ours.dtype == np.uint8
        np.testing.assert_array_equal(ours, theirs)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-40])


def empty(path):
    path.write_bytes(b"")


def gone(path):
    path.unlink()


def of_another_kind(path):
    path.write_bytes(b"GIF89a" + path.read_bytes()[6:])


def a_label_too_many(path):
    content = bytearray(path.read_bytes())
    content[1 if path.name == "train.bin" else 0] = 10
    path.write_bytes(content)


def in_place_of(other):
    def replace(path):
        shutil.copy(path.with_name(other), path)

    return replace


def darker(path):
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    content[2 if path.name == "train.bin" else 1 :][:1024] = 0
    path.write_bytes(content.tobytes())


def one_pixel_changed(path):
    image = Image.open(path)
    image.putpixel((500, 2), (0, 0, 0))
    image.save(path)


def grey(path):
    Image.open(path).convert("L").save(path)


def relabelled(change):
    def write(path):
        labels = json.loads(path.read_text())
        path.write_text(json.dumps(change(labels)))

    return write


def of_floats(path):
    content = io.loadmat(path)
    io.savemat(path, {"X": content["X"] / 255, "y": content["y"]})


def without_labels(path):
    io.savemat(path, {"X": io.loadmat(path)["X"]})


def labels_from_0(path):
    content = io.loadmat(path)
    io.savemat(path, {"X": content["X"], "y": content["y"] % 10})


@pytest.mark.parametrize(
    ("kind", "name", "damage", "message"),
    [
        ("binary", "data_batch_3.bin", cut_off, "8 records of 3073 bytes, 24584 in"),
        ("binary", "data_batch_3.bin", empty, "should hold 8 records"),
        ("binary", "data_batch_5.bin", gone, "has no file data_batch_5.bin"),
        ("binary", "data_batch_2.bin", a_label_too_many, "a label is 10, of classes"),
        ("binary", "test_batch.bin", in_place_of("data_batch_1.bin"), "of class"),
        ("binary", "data_batch_1.bin", darker, "to data_batch_5.bin: the channels'"),
        ("fine", "train.bin", cut_off, "40 records of 3074 bytes, 122960 in"),
        ("fine", "train.bin", in_place_of("test.bin"), "40 records of 3074 bytes"),
        ("fine", "test.bin", gone, "has no file test.bin; .*, CIFAR-100's binary"),
        ("fine", "train.bin", a_label_too_many, "a label is 10, of classes 0 to 3"),
        ("fine", "train.bin", darker, "the channels' means .* should be"),
        ("sheets", "data_batch_2.png", cut_off, "cannot be read as PNG"),
        ("sheets", "data_batch_2.png", empty, "cannot be read as PNG"),
        ("sheets", "data_batch_2.png", of_another_kind, "cannot be read as PNG"),
        ("sheets", "data_batch_2.png", gone, "has no file data_batch_2.png"),
        ("sheets", "data_batch_2.png", grey, "in RGB, got 1024×8 in L"),
        ("sheets", "data_batch_4.png", in_place_of("data_batch_5.png"), "checksum"),
        ("sheets", "test_batch.png", in_place_of("data_batch_5.png"), "checksum"),
        ("sheets", "test_batch.png", one_pixel_changed, "in test_lables.* checksum"),
        ("sheets", "train_lables.json", empty, "is not JSON"),
        ("sheets", "train_lables.json", in_place_of("test_lables.json"), "of 40 whole"),
        (
            *("sheets", "train_lables.json", relabelled(lambda y: [*y[:-1], 9])),
            "from 0 to 3",
        ),
        (
            *("sheets", "train_lables.json", relabelled(lambda y: [0, *y[:-1]])),
            "images of class . should be 10",
        ),
        ("mat", "train_32x32.mat", cut_off, "cannot be read as .mat"),
        ("mat", "train_32x32.mat", empty, "cannot be read as .mat"),
        ("mat", "test_32x32.mat", gone, "has no file test_32x32.mat; it should hold"),
        ("mat", "train_32x32.mat", of_floats, "X of shape .* got .* of float64"),
        ("mat", "train_32x32.mat", without_labels, "array y .* got none"),
        ("mat", "train_32x32.mat", labels_from_0, "labels are from 0 to 3"),
        (
            "mat",
            "train_32x32.mat",
            in_place_of("test_32x32.mat"),
            r"got \(32, 32, 3, 8",
        ),
    ],
)
def test_what_is_not_the_file_is_refused_by_name(
    kind, name, damage, message, arrays, tmp_path
):
    WRITERS[kind](tmp_path, arrays)
    damage(tmp_path / name)
    with pytest.raises(UserError, match=message) as error:
        load(kind, tmp_path, arrays)
    assert str(tmp_path) in str(error.value)
    assert name.split(".")[0] in str(error.value)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_class_too_often_is_refused(kind, arrays, tmp_path):
    images, labels, *test = arrays
    labels = labels.copy()
    labels[labels == 0] = 1
    WRITERS[kind](tmp_path, (images, labels, *test))
    with pytest.raises(UserError, match="0 images of class 0 should be 10"):
        load(kind, tmp_path, arrays)


@pytest.mark.parametrize("kind", ["sheets", "mat"])
def test_a_file_that_ends_anywhere_is_refused(kind, arrays, tmp_path):
    WRITERS[kind](tmp_path, arrays)
    path = sorted(tmp_path.iterdir())[0]
    content = path.read_bytes()
    for length in np.linspace(0, len(content) - 40, 60).astype(int):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=path.name):
            load(kind, tmp_path, arrays)


def test_the_python_version_is_told_apart(tmp_path):
    for name in BATCHES:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="not the Python version, as here"):
        cifar.cifar10(tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_a_folder_that_is_missing_or_empty(name, tmp_path):
    with pytest.raises(UserError, match=f"--dataset {name} needs --data-dir, the fold"):
        registry.dataset(name)
    with pytest.raises(UserError, match="nowhere is not a folder; it should hold"):
        registry.dataset(name, tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"{tmp_path} has no file .*; it should hold"):
        registry.dataset(name, tmp_path)


def test_channels_are_standardised_each_by_itself(arrays, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "_CHUNK", 3)
    read = lambda folder: (arrays[0] // [1, 2, 3], arrays[1], *arrays[2:])
    cast = lambda folder: tuple(x.astype(np.uint8) for x in read(folder))
    monkeypatch.setitem(registry.DATASETS, "cifar10", entries.DataSource(cast))
    loaded, raw = registry.dataset("cifar10"), cast(None)
    mean, deviation = raw[0].mean((0, 1, 2)), raw[0].std((0, 1, 2))
    for ours, theirs in (
        (loaded.train_images, raw[0]),
        (loaded.test_images, raw[2]),
    ):
        expected = ((theirs - mean) / deviation).astype(np.float32)
        np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(loaded.train_labels, arrays[1])


def test_the_facts_add_up():
    sizes = {
        "cifar10": (50_000, 10_000, 10),
        "cifar100": (50_000, 10_000, 100),
        "svhn": (73_257, 26_032, 10),
    }
    for name, (train, test, classes) in sizes.items():
        known = integrity.FACTS[name]
        assert (sum(known.train_counts), sum(known.test_counts)) == (train, test)
        assert len(known.train_counts) == len(known.test_counts) == classes


@pytest.mark.slow
@pytest.mark.skipif(not REAL_CIFAR10, reason="CIFAR10_DIR names no folder of CIFAR-10")
def test_the_real_cifar10():
    images, labels, test_images, test_labels = registry.DATASETS["cifar10"].read(
        Path(REAL_CIFAR10)
    )
    assert images.shape == (50_000, 32, 32, 3)
    assert test_images.shape == (10_000, 32, 32, 3)
    assert labels[:4].tolist() == [6, 9, 9, 4]  # a frog, two trucks, a deer
    np.testing.assert_array_equal(np.bincount(labels), [5_000] * 10)
    np.testing.assert_array_equal(np.bincount(test_labels), [1_000] * 10)
    integrity.check_means(images, integrity.FACTS["cifar10"].train_means, "")
