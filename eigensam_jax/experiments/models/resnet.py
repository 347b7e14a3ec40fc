"""ResNet-18 for images of 32×32 pixels, in Flax."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))  # channels, stride of the first block
_BLOCKS = 2  # a stage


class ResNet18(nn.Module):
    """ResNet-18 with the usual stem for CIFAR: a 3×3 convolution without pooling.

    Convolutions have He initialisation (normal, variance 2/fan-in) and no bias, since
    batch normalisation follows each. In training, `apply` with
    `mutable=["batch_stats"]` returns the new running statistics too. Drop those of a
    pass at perturbed weights.

    References:
      He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016.
    """

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits (batch, num_classes); `train` normalises by the batch."""
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = _convolution(64)(images)
        x = nn.relu(norm()(x))
        for channels, first_stride in _STAGES:
            for block in range(_BLOCKS):
                stride = first_stride if block == 0 else 1
                x = BasicBlock(channels, stride, norm)(x)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes)(x)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a skip connection, 1×1 where the shape changes."""

    channels: int
    stride: int
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Shape (batch, height/stride, width/stride, channels)."""
        y = _convolution(self.channels, stride=self.stride)(x)
        y = nn.relu(self.norm()(y))
        y = self.norm()(_convolution(self.channels)(y))
        if x.shape != y.shape:
            x = self.norm()(_convolution(self.channels, size=1, stride=self.stride)(x))
        return nn.relu(x + y)


def _convolution(channels: int, size: int = 3, stride: int = 1) -> nn.Conv:
    return nn.Conv(
        channels,
        (size, size),
        strides=(stride, stride),
        padding=size // 2,
        use_bias=False,
        kernel_init=nn.initializers.he_normal(),
    )
