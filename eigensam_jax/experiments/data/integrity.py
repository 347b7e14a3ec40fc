"""Known facts of the real data sets, to check files against."""

import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eigensam_jax.experiments.errors import UserError

_TOLERANCE = 0.05  # of a channel's mean, from 0 to 255
_CHUNK = 1_000  # images per sum, which makes a wider copy

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class Facts(NamedTuple):
    """Known facts of a data set of 32×32×3 images.

    Attributes:
      name: of the data set.
      train_counts, test_counts: images of each class.
      train_means: of each channel over the training set, from 0 to 255.
      sheets: the `checksum` of each sheet with its labels, the test set's last, if any.
    """

    name: str
    train_counts: tuple[int, ...]
    test_counts: tuple[int, ...]
    train_means: tuple[float, float, float]
    sheets: tuple[int, ...] = ()


FACTS = {
    "cifar10": Facts(
        "CIFAR-10",
        (5_000,) * 10,
        (1_000,) * 10,
        (125.307, 122.950, 113.865),
        (0x9F99E422, 0x8D68A4C9, 0x0A0F8A91, 0xE7FCDFD6, 0xE50FBA54, 0x4F953B48),
    ),
    "cifar100": Facts(
        "CIFAR-100", (500,) * 100, (100,) * 100, (129.304, 124.070, 112.434)
    ),
    "svhn": Facts(
        "SVHN's cropped digits",
        (4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659),
        (1744, 5099, 4149, 2882, 2523, 2384, 1977, 2019, 1660, 1595),
        (111.609, 113.161, 120.565),
    ),
}


def folder_of(name: str, data_dir: Path | None, content: str) -> Path:
    """`data_dir` if it is a folder; else raises UserError and names the `content`."""
    if data_dir is None:
        raise UserError(f"--dataset {name} needs --data-dir, the folder with {content}")
    if not data_dir.is_dir():
        raise UserError(
            f"--data-dir {data_dir} is not a folder; it should hold {content}"
        )
    return data_dir


def check_there(paths: list[Path], content: str) -> None:
    """Raises UserError if a file is missing, and names the `content`."""
    for path in paths:
        if not path.is_file():
            is_pickled = path.suffix == ".bin" and path.with_suffix("").is_file()
            raise UserError(
                f"{path.parent} has no file {path.name}; it should hold {content}"
                + (" (not the Python version, as here)" if is_pickled else "")
            )


def read(path: Path) -> bytes:
    """The bytes of a file; raises UserError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); let it be readable"
        ) from error


def check_counts(labels: np.ndarray, counts: tuple[int, ...], source: str) -> None:
    """Raises UserError if a class has another number of images."""
    found = np.bincount(labels, minlength=len(counts))
    wrong = np.flatnonzero(found != counts)
    if len(wrong):
        i = wrong[0]
        raise UserError(
            f"{source}: {found[i]} images of class {i} should be {counts[i]}; files "
            "are mixed up or damaged, fetch them anew"
        )


def check_means(images: np.ndarray, means: tuple[float, ...], source: str) -> None:
    """Raises UserError if a channel has another mean."""
    sums = [
        images[i : i + _CHUNK].sum((0, 1, 2), np.int64)
        for i in range(0, len(images), _CHUNK)
    ]
    found = np.sum(sums, axis=0) / (images.size // images.shape[-1])
    if not np.allclose(found, means, rtol=0, atol=_TOLERANCE):
        got, known = (" ".join(f"{mean:.3f}" for mean in x) for x in (found, means))
        raise UserError(
            f"{source}: the channels' means {got} should be {known}; files are mixed "
            "up or damaged, fetch them anew"
        )


def checksum(images: np.ndarray, labels: np.ndarray) -> int:
    """CRC-32 of the pixels, then of the labels, all uint8."""
    return zlib.crc32(labels.tobytes(), zlib.crc32(images.tobytes()))
