"""Vision transformers for small images, in Flax."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class ViT(nn.Module):
    """A vision transformer: patches as tokens, pre-norm blocks, the mean over tokens.

    It has LayerNorm and no dropout, so its parameters are its only state. `patch` is in
    pixels, or None for a quarter of the height; the images' sides must be multiples of
    it, and `width` of `heads`.

    References:
      Dosovitskiy et al., "An Image is Worth 16×16 Words: Transformers for Image
      Recognition at Scale", ICLR 2021. Beyer, Zhai, Kolesnikov, "Better plain ViT
      baselines for ImageNet-1k", 2022, for the mean in place of a class token.
    """

    num_classes: int
    patch: int | None = 4
    width: int = 192
    depth: int = 6
    heads: int = 3

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits (batch, num_classes) of images (batch, height, width, channels)."""
        side = (images.shape[1] // 4 if self.patch is None else self.patch,) * 2
        x = nn.Conv(self.width, side, strides=side, padding="VALID")(images)
        x = x.reshape(len(x), -1, self.width)
        position = self.param(
            "position", nn.initializers.normal(0.02), (1, *x.shape[1:])
        )
        x = x + position
        for _ in range(self.depth):
            x = Block(self.heads)(x)
        x = jnp.mean(nn.LayerNorm()(x), axis=1)
        return nn.Dense(self.num_classes)(x)


class Block(nn.Module):
    """Self-attention, then two dense layers with GELU, four times as wide inside."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Tokens of the shape of `x`, (batch, tokens, width)."""
        width = x.shape[-1]
        attention = nn.MultiHeadDotProductAttention(self.heads)
        x = x + attention(nn.LayerNorm()(x), mask=mask)
        y = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
        return x + nn.Dense(width)(y)
