import gzip
import struct

import numpy as np
import pytest

from eigensam_jax.experiments import registry
from eigensam_jax.experiments.data import idx, load
from eigensam_jax.experiments.errors import UserError


def idx_bytes(array):
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim)
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_folder(folder, *, joint="-", compress=False, train=20, test=10):
    """Four idx files as in the MNIST database; returns the arrays in them."""
    rng = np.random.default_rng(0)
    arrays = {}
    for prefix, count in (("train", train), ("t10k", test)):
        arrays[f"{prefix}-images{joint}idx3-ubyte"] = rng.integers(
            0, 256, (count, 5, 4), np.uint8
        )
        arrays[f"{prefix}-labels{joint}idx1-ubyte"] = rng.integers(
            0, 10, count, np.uint8
        )
    for name, array in arrays.items():
        content = idx_bytes(array)
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return list(arrays.values())


def test_digits_are_split_once_and_by_class():
    digits, again = registry.dataset("digits"), registry.dataset("digits")
    assert digits.train_images.shape == (1437, 8, 8, 1)
    assert digits.test_images.shape == (360, 8, 8, 1)
    assert digits.num_classes == 10
    np.testing.assert_array_equal(digits.test_labels, again.test_labels)
    counts = np.bincount(digits.test_labels)
    assert counts.min() >= 34  # of about 36
    np.testing.assert_allclose(digits.train_images.mean(), 0, atol=1e-5)
    np.testing.assert_allclose(digits.train_images.std(), 1, rtol=1e-5)
    together = np.concatenate([digits.train_images, digits.test_images])
    assert len(np.unique(together.reshape(1797, -1), axis=0)) == 1797


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("joint", ["-", "."])
@pytest.mark.parametrize("compress", [False, True])
def test_a_folder_of_idx_files(tmp_path, name, joint, compress):
    images, labels, test_images, test_labels = write_folder(
        tmp_path, joint=joint, compress=compress
    )
    loaded = registry.dataset(name, tmp_path)
    scale = lambda x: (x[..., None] - images.mean()) / images.std()
    np.testing.assert_allclose(loaded.train_images, scale(images), atol=1e-6)
    np.testing.assert_allclose(loaded.test_images, scale(test_images), atol=1e-6)
    np.testing.assert_array_equal(loaded.train_labels, labels)
    np.testing.assert_array_equal(loaded.test_labels, test_labels)
    assert loaded.train_images.dtype == np.float32
    assert loaded.train_labels.dtype == np.int32


@pytest.mark.skipif(
    not idx.DEBIAN_FASHION_MNIST.is_dir(), reason="dataset-fashion-mnist not installed"
)
def test_debians_fashion_mnist_is_the_real_one():
    images, labels, test_images, test_labels = registry.DATASETS["fashion_mnist"].read(
        None
    )
    assert images.shape == (60_000, 28, 28, 1)
    assert test_images.shape == (10_000, 28, 28, 1)
    np.testing.assert_allclose(images.mean() / 255, 0.28604, atol=1e-5)
    np.testing.assert_allclose(images.std() / 255, 0.35302, atol=1e-5)
    np.testing.assert_array_equal(np.bincount(labels), [6_000] * 10)
    np.testing.assert_array_equal(np.bincount(test_labels), [1_000] * 10)


TRAIN_IMAGES = "train-images-idx3-ubyte"


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-7])


def cut_off_compressed(path):
    path.with_suffix(".gz").write_bytes(gzip.compress(path.read_bytes())[:-20])
    path.unlink()


def not_compressed(path):
    path.rename(path.with_suffix(".gz"))


def labels_in_its_place(path):
    path.write_bytes(idx_bytes(np.zeros(20, np.uint8)))


def one_too_few(path):
    path.write_bytes(idx_bytes(np.zeros((19, 5, 4), np.uint8)))


def of_another_size(path):
    path.write_bytes(idx_bytes(np.zeros((20, 6, 6), np.uint8)))


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_off, r"train-images-idx3-ubyte should hold 400 bytes .* got 393"),
        (cut_off_compressed, r"train-images-idx3-ubyte.gz cannot be read"),
        (not_compressed, r"train-images-idx3-ubyte.gz cannot be read"),
        (labels_in_its_place, r"train-images-idx3-ubyte is not an idx file of 3-dim"),
        (one_too_few, r"train-images-idx3-ubyte has 19 images, .* has 20 labels"),
        (of_another_size, r"training images are \(6, 6, 1\), test images \(5, 4, 1\)"),
        (empty, r"train-images-idx3-ubyte is not an idx file"),
        (lambda path: path.unlink(), r"has no file train-images-idx3-ubyte, plain or"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, damage, message):
    write_folder(tmp_path)
    damage(tmp_path / TRAIN_IMAGES)
    with pytest.raises(UserError, match=message):
        registry.dataset("mnist", tmp_path)


def test_test_labels_of_other_classes_are_refused(tmp_path):
    digits = registry.dataset("digits")
    labels = np.asarray(digits.train_labels), np.asarray(digits.test_labels)
    images = np.asarray(digits.train_images), np.asarray(digits.test_images)
    read = lambda _: (images[0], labels[0], images[1], labels[1] + 1)
    with pytest.raises(UserError, match="is 9 in training and 10 in the test set"):
        load.load(read, tmp_path)


@pytest.mark.parametrize("same", ["pixels", "labels"])
def test_data_that_are_all_the_same_are_refused(same, tmp_path):
    images, labels, *_ = write_folder(tmp_path)
    name = "images-idx3" if same == "pixels" else "labels-idx1"
    alike = np.zeros_like(images if same == "pixels" else labels)
    (tmp_path / f"train-{name}-ubyte").write_bytes(idx_bytes(alike))
    with pytest.raises(UserError, match=f"all {same} of the training set are"):
        registry.dataset("mnist", tmp_path)


def test_a_folder_that_is_missing_or_not_asked_for(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="mnist needs --data-dir"):
        registry.dataset("mnist")
    with pytest.raises(UserError, match="nowhere is not a folder"):
        registry.dataset("mnist", tmp_path / "nowhere")
    with pytest.raises(UserError, match="digits comes with scikit-learn"):
        registry.dataset("digits", tmp_path)
    monkeypatch.setattr(idx, "DEBIAN_FASHION_MNIST", tmp_path / "not-installed")
    with pytest.raises(UserError, match=r"install Debian's package|name a folder"):
        registry.dataset("fashion_mnist")
