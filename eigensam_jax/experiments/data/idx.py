"""MNIST and Fashion-MNIST, from a folder of idx files, plain or gzipped."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from eigensam_jax.experiments.data import integrity
from eigensam_jax.experiments.data.integrity import Arrays
from eigensam_jax.experiments.errors import UserError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_UNSIGNED_BYTE = 0x08


def fashion_mnist(data_dir: Path | None) -> Arrays:
    """60,000 and 10,000 images of 28×28 pixels, by default of Debian's package."""
    if data_dir is None and not DEBIAN_FASHION_MNIST.is_dir():
        raise UserError(
            "--dataset fashion_mnist: no --data-dir is given and "
            f"{DEBIAN_FASHION_MNIST} does not exist; install Debian's package "
            "dataset-fashion-mnist, or name a folder with its four idx files"
        )
    return _idx_folder("fashion_mnist", data_dir or DEBIAN_FASHION_MNIST)


def mnist(data_dir: Path | None) -> Arrays:
    """60,000 and 10,000 images of 28×28 pixels."""
    return _idx_folder("mnist", data_dir)


def _idx_folder(name: str, data_dir: Path | None) -> Arrays:
    content = "its four idx files, train-images-idx3-ubyte[.gz] and so on"
    folder = integrity.folder_of(name, data_dir, content)
    images, labels = _idx_pair(folder, "train")
    test_images, test_labels = _idx_pair(folder, "t10k")
    if images.shape[1:] != test_images.shape[1:]:
        raise UserError(
            f"{folder}: training images are {images.shape[1:]}, test images "
            f"{test_images.shape[1:]}; they belong to different data sets"
        )
    return images, labels, test_images, test_labels


def _idx_pair(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, height, width, 1) and labels (n,)."""
    images_path = _find(folder, f"{prefix}-images", 3)
    labels_path = _find(folder, f"{prefix}-labels", 1)
    images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise UserError(
            f"{images_path} has {len(images)} images, {labels_path} has {len(labels)} "
            "labels; they must be of the same set"
        )
    return images[..., None], labels


def _find(folder: Path, stem: str, ndim: int) -> Path:
    names = [
        f"{stem}{separator}idx{ndim}-ubyte{suffix}"
        for separator in "-."
        for suffix in ("", ".gz")
    ]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} has no file {names[0]}, plain or gzipped (.gz)")


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """Reads an idx file: 0, 0, type, rank, each length as 4 big-endian bytes, data."""
    content = integrity.read(path)
    try:
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path} cannot be read ({error}); it may be cut off: fetch it anew"
        ) from error
    header = 4 + 4 * ndim
    magic = bytes([0, 0, _UNSIGNED_BYTE, ndim])
    if len(content) < header or content[:4] != magic:
        raise UserError(
            f"{path} is not an idx file of {ndim}-dimensional unsigned bytes: of its "
            f"{len(content)} bytes the first should be {magic.hex(' ')}"
        )
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", ndim, offset=4))
    if len(content) - header != math.prod(shape) or 0 in shape:
        raise UserError(
            f"{path} should hold {math.prod(shape)} bytes of data for its {shape}, got "
            f"{len(content) - header}: it is cut off or damaged, fetch it anew"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
