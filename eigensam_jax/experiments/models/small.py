"""Small Flax networks: images (batch, height, width, channels) to logits."""

from collections.abc import Callable

import flax.linen as nn
import jax


class MLP(nn.Module):
    """Two hidden layers of `width` units."""

    num_classes: int
    width: int = 128
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of shape (batch, num_classes)."""
        x = images.reshape(len(images), -1)
        for _ in range(2):
            x = self.activation(nn.Dense(self.width)(x))
        return nn.Dense(self.num_classes)(x)


class CNN(nn.Module):
    """Two 3×3 convolutions (16 and 32 channels), then 64 units.

    Height and width are halved after each convolution by max-pooling or, if `strided`,
    by its stride.
    """

    num_classes: int
    strided: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of shape (batch, num_classes)."""
        x, half = images, (2, 2)
        for channels in (16, 32):
            x = nn.relu(nn.Conv(channels, (3, 3), half if self.strided else 1)(x))
            if not self.strided:
                x = nn.max_pool(x, half, half)  # type: ignore[no-untyped-call]
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(self.num_classes)(x)


class NormCNN(nn.Module):
    """Three 3×3 convolutions of stride 2 with batch normalisation, and a linear layer.

    They have 32, 64 and 64 channels, no bias, and He initialisation.
    """

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits of shape (batch, num_classes); `train` normalises by the batch."""
        x = images
        he = nn.initializers.he_normal()
        for channels in (32, 64, 64):
            convolution = nn.Conv(
                channels, (3, 3), strides=(2, 2), use_bias=False, kernel_init=he
            )
            norm = nn.BatchNorm(use_running_average=not train, momentum=0.9)
            x = nn.relu(norm(convolution(x)))
        return nn.Dense(self.num_classes)(x.reshape(len(x), -1))


class CNN6(nn.Module):
    """Five 3×3 convolutions (24 to 64 channels) and a linear layer.

    The first two and the fourth have stride 2, which makes the network cheap on a CPU.
    """

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of shape (batch, num_classes)."""
        x = images
        he = nn.initializers.he_normal()
        for channels, stride in ((24, 2), (48, 2), (48, 1), (64, 2), (64, 1)):
            strides = (stride, stride)
            x = nn.relu(nn.Conv(channels, (3, 3), strides, kernel_init=he)(x))
        return nn.Dense(self.num_classes)(x.reshape(len(x), -1))
