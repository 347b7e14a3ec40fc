"""EfficientNet-Lite0 in Flax, and its ImageNet weights from PyTorch's names."""

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

# Of each stage: blocks, size of the depthwise kernel, stride of the first block,
# expansion, channels.
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
_COUNTED = "num_batches_tracked"  # batches in training, which nothing here depends on

# Names in PyTorch, as in the package efficientnet_lite_pytorch, of what is here.
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
    """EfficientNet-B0 without squeeze-and-excitation and with ReLU6 for swish.

    A 3×3 convolution of stride 2, seven stages of inverted residual blocks, a 1×1
    convolution, the mean over all places, and a linear layer: 4.65 million parameters
    for a thousand classes. Padding is TensorFlow's "SAME", which at stride 2 is more
    below and to the right, as the published weights have it.

    Images of another size are resized to `resolution` (bilinearly), and grey ones stand
    in all three channels. The published weights are of pixels (x − 127)/128, from 0 to
    255; those of data sets standardised by their own figures differ from these by a
    shift and a factor, which batch normalisation takes out as it takes up the data's
    statistics. Training is without the dropout and the dropped blocks of the authors,
    so that the loss of a batch is a function of the weights.

    Attributes:
      num_classes: the number of logits.
      resolution: height and width that the network sees; the authors' is 224.

    References:
      Tan, Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural
      Networks", ICML 2019. Liu, "Higher accuracy on vision models with
      EfficientNet-Lite", TensorFlow blog, 2020.
    """

    num_classes: int
    resolution: int = 96

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits of shape (batch, num_classes).

        Args:
          images: shape (batch, height, width, 3 or 1).
          train: whether to normalise by the batch, else by the running statistics.
        """
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

    There is a connection around them where the shape stays. Nothing follows the
    normalisation of the projection.

    Attributes:
      channels: of the output.
      size: of the depthwise kernel.
      stride: of the depthwise convolution.
      expansion: channels in the block over those of its input; at 1 nothing expands.
      norm: makes a normalisation layer.
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
    """A 1×1 convolution, which XLA's CPU backend differentiates faster as a product."""
    he = nn.initializers.he_normal()
    return nn.Dense(channels, use_bias=False, kernel_init=he, name=name)


def from_state_dict(arrays: dict[str, np.ndarray], path: Path) -> dict[str, PyTree]:
    """The published network's variables from arrays with PyTorch's names.

    Kernels (output, input, height, width) become (height, width, input, output), and
    those of 1×1 and of the linear layer (input, output). The counts of batches that
    PyTorch's normalisation keeps have no use here.

    Args:
      arrays: of a state dict, by name.
      path: where it is from, for what is said of it.

    Returns:
      `params` and `batch_stats` of `EfficientNetLite0` with a thousand classes, in
      NumPy's arrays.

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
    """Variables that begin as the pretrained ones do.

    Args:
      variables: newly initialised, of `EfficientNetLite0` with any number of classes.
      pretrained: what `from_state_dict` returned.

    Returns:
      The pretrained ones, in arrays that can be given away; with another number of
      classes than theirs, the linear layer at the end is that of `variables`.
    """
    return jax.tree.map(
        lambda new, old: jnp.array(old) if old.shape == new.shape else new,
        variables,
        pretrained,
    )


def _name(_: str, *place: str) -> str:
    """PyTorch's name of what is here at, say, params, block_3, expand, kernel."""
    return ".".join(_NAMES.get(x, x.replace("block_", "_blocks.")) for x in place)


def _turned(array: np.ndarray) -> np.ndarray:
    """An array in the order of Flax; a 1×1 convolution becomes a matrix."""
    if array.ndim < 4:
        return array.transpose()
    turned = array.transpose(2, 3, 1, 0)
    return turned[0, 0] if turned.shape[:2] == (1, 1) else turned
