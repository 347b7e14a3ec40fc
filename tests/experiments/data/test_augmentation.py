import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eigensam_jax.experiments import registry
from eigensam_jax.experiments.data import augmentation

IMAGES = np.random.default_rng(0).normal(size=(7, 6, 5, 3)).astype(np.float32)


def cropped(key, images):
    """One image after the other, in NumPy."""
    count, height, width, _ = images.shape
    p = augmentation.PADDING
    corners = np.asarray(jax.random.randint(key, (2, count, 1), 0, 2 * p + 1))[..., 0]
    out = []
    for image, row, column in zip(images, *corners, strict=True):
        padded = np.pad(image, ((p, p), (p, p), (0, 0)))
        out.append(padded[row : row + height, column : column + width])
    return np.stack(out)


@pytest.mark.parametrize("seed", range(3))
def test_a_crop_is_a_part_of_the_padded_image(seed):
    key = jax.random.key(seed)
    ours = jax.jit(augmentation.crop)(key, IMAGES)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, cropped(key, IMAGES))


@pytest.mark.parametrize("seed", range(3))
def test_a_flip_turns_left_to_right(seed):
    key = jax.random.key(seed)
    crop_key, flip_key = jax.random.split(key)
    flipped = np.asarray(jax.random.bernoulli(flip_key, shape=(7, 1, 1, 1))).ravel()
    expected = cropped(crop_key, IMAGES)
    for i in np.flatnonzero(flipped):
        expected[i] = np.fliplr(expected[i])
    ours = jax.jit(augmentation.crop_and_flip)(key, IMAGES)
    np.testing.assert_array_equal(ours, expected)


def test_every_shift_and_side_is_as_likely():
    count = 20_000
    images = np.zeros((count, 9, 9, 1), np.float32)
    images[:, 4, 4], images[:, 4, 5] = 1, 2
    shifted = jax.jit(augmentation.crop_and_flip)(jax.random.key(0), images)[..., 0]
    whole = shifted.sum((1, 2)) == 3  # the shift has not cut off one of the two
    rows, columns = np.unravel_index(
        np.argmax((shifted == 1).reshape(count, -1), 1), (9, 9)
    )
    places = np.bincount(9 * rows[whole] + columns[whole], minlength=81)
    # 81 shifts; by flips all columns but the outer ones are reached in two ways.
    ways = np.tile([1, *[2] * 7, 1], 9) / 162
    np.testing.assert_allclose(places / count, ways, atol=5 * np.sqrt(1 / 81 / count))
    right = jnp.roll(shifted, -1, 2) - 2 * shifted  # zero at the 1 where 2 is right
    at_one = right.reshape(count, -1)[np.arange(count), 9 * rows + columns]
    sided = np.asarray(at_one)[np.asarray(whole)] == 0
    np.testing.assert_allclose(sided.mean(), 0.5, atol=0.02)


def test_what_is_augmented_by_default():
    changed = {x for x in registry.DATASETS if registry.augmentation(x, True)}
    assert changed == {"cifar10", "cifar100", "svhn"}
    assert registry.augmentation("cifar10", True) is augmentation.crop_and_flip
    assert registry.augmentation("svhn", True) is augmentation.crop
    assert registry.augmentation("cifar10", False) is None
    assert registry.augmentation("fashion_mnist", True) is None
