"""EfficientNet-Lite0 in Flax, and its ImageNet weights in PyTorch's naming."""

from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.models.depthwise import Depthwise
from eigensam_jax.tree_math import PyTree

# blocks, depthwise kernel size, stride of the first block, expansion, channels
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM = 32
_HEAD = 1280
_IMAGENET_CLASSES = 1000
_COUNTED = "num_batches_tracked"  # not used here

# Our names, and those of the package efficientnet_lite_pytorch.
_NAMES = {
    **{"stem": "_conv_stem", "head": "_conv_head", "classifier": "_fc"},
    **{"stem_norm": "_bn0", "head_norm": "_bn1"},
    **{"expand": "_expand_conv", "expand_norm": "_bn0"},
    **{"depthwise": "_depthwise_conv", "depthwise_norm": "_bn1"},
    **{"project": "_project_conv", "project_norm": "_bn2"},
    **{"kernel": "weight", "scale": "weight", "bias": "bias"},
    **{"mean": "running_mean", "var": "running_var"},
}


class EfficientNetLite0(nn.Module):
    """EfficientNet-B0 without squeeze-and-excitation, and with ReLU6 for swish.

    It has 4.65 million parameters for a thousand classes. Padding is TensorFlow's
    "SAME", as the published weights need: at stride 2, more below and to the right.

    Images are resized bilinearly to `resolution` (the authors' is 224), and grey ones
    are repeated over three channels. The published weights expect pixels (x − 127)/128;
    data standardised otherwise differs by a shift and a factor, which batch
    normalisation removes as its statistics adapt. There is no dropout and no dropped
    blocks, so that the loss of a batch is a function of the weights.

    References:
      Tan, Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural
      Networks", ICML 2019. Liu, "Higher accuracy on vision models with
      EfficientNet-Lite", TensorFlow blog, 2020.
    """

    num_classes: int
    resolution: int = 96

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits (batch, num_classes); `train` normalises by the batch."""
        norm = partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-3
        )
        side = self.resolution
        x = jax.image.resize(
            images, (len(images), side, side, images.shape[-1]), "bilinear"
        )
        x = jnp.broadcast_to(x, (*x.shape[:-1], 3))
        he = nn.initializers.he_normal()
        stem = nn.Conv(_STEM, (3, 3), 2, use_bias=False, kernel_init=he, name="stem")
        x = nn.relu6(norm(name="stem_norm")(stem(x)))
        shapes = (
            (channels, size, stride if block == 0 else 1, expansion)
            for blocks, size, stride, expansion, channels in _STAGES
            for block in range(blocks)
        )
        for i, shape in enumerate(shapes):
            x = Block(*shape, norm, name=f"block_{i}")(x)
        x = _pointwise(_HEAD, "head")(x)
        x = nn.relu6(norm(name="head_norm")(x))
        x = jnp.mean(x, axis=(1, 2))
        logits: jax.Array = nn.Dense(self.num_classes, name="classifier")(x)
        return logits


class Block(nn.Module):
    """A 1×1 convolution that expands, a depthwise one, a 1×1 one that projects.

    A skip connection goes around them where the shape stays. No activation follows the
    projection. `expansion` is the number of channels inside over that of the input.
    """

    channels: int
    size: int
    stride: int
    expansion: int
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Shape (batch, height/stride, width/stride, channels)."""
        wide, y = self.expansion * x.shape[-1], x
        if self.expansion > 1:
            y = _pointwise(wide, "expand")(y)
            y = nn.relu6(self.norm(name="expand_norm")(y))
        y = Depthwise(self.size, self.stride, name="depthwise")(y)
        y = nn.relu6(self.norm(name="depthwise_norm")(y))
        y = _pointwise(self.channels, "project")(y)
        y = self.norm(name="project_norm")(y)
        connected: jax.Array = x + y if x.shape == y.shape else y
        return connected


def _pointwise(channels: int, name: str) -> nn.Dense:
    """A 1×1 convolution, as a product: XLA's CPU backend differentiates that faster."""
    he = nn.initializers.he_normal()
    return nn.Dense(channels, use_bias=False, kernel_init=he, name=name)


def from_state_dict(arrays: dict[str, np.ndarray], path: Path) -> dict[str, PyTree]:
    """The published network's variables, from arrays with PyTorch's names.

    Kernels (output, input, height, width) become (height, width, input, output); those
    of 1×1 convolutions and of the linear layer become (input, output). PyTorch's counts
    of batches are dropped. Errors name `path`.

    Returns:
      NumPy's `params` and `batch_stats` of `EfficientNetLite0` with a thousand classes.

    Raises:
      UserError: if an array is missing, unknown, or of another shape or dtype.
    """
    model, images = EfficientNetLite0(_IMAGENET_CLASSES), jnp.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    left = dict(arrays)

    def take(place: tuple[Any, ...], expected: jax.ShapeDtypeStruct) -> np.ndarray:
        name = _name(*(key.key for key in place))
        array = left.pop(name, None)
        if array is None:
            raise UserError(
                f"{path} has no {name}; it should be a state dict of EfficientNet-Lite0"
            )
        turned = _turned(array)
        if (turned.shape, turned.dtype) != (expected.shape, expected.dtype):
            raise UserError(
                f"{path}: {name} of shape {array.shape} and {array.dtype} becomes "
                f"{turned.shape}, which should be {expected.shape} and "
                f"{expected.dtype}; it should be of EfficientNet-Lite0 in float32"
            )
        left.pop(f"{name.rpartition('.')[0]}.{_COUNTED}", None)
        return turned

    variables: dict[str, PyTree] = jax.tree_util.tree_map_with_path(take, shapes)
    if left:
        raise UserError(
            f"{path} has {next(iter(left))}, which EfficientNet-Lite0 has not; it "
            "should be a state dict of that network and nothing else"
        )
    return variables


def fine_tuned(variables: PyTree, pretrained: PyTree) -> PyTree:
    """The pretrained variables, in arrays that can be donated.

    If the number of classes differs, the linear layer is that of the new `variables`.
    """
    return jax.tree.map(
        lambda new, old: jnp.array(old) if old.shape == new.shape else new,
        variables,
        pretrained,
    )


def _name(_: str, *place: str) -> str:
    """PyTorch's name of, say, params, block_3, expand, kernel."""
    return ".".join(_NAMES.get(x, x.replace("block_", "_blocks.")) for x in place)


def _turned(array: np.ndarray) -> np.ndarray:
    """An array in Flax's order of axes; a 1×1 convolution becomes a matrix."""
    if array.ndim < 4:
        return array.transpose()
    turned = array.transpose(2, 3, 1, 0)
    return turned[0, 0] if turned.shape[:2] == (1, 1) else turned
