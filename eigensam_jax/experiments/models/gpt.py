"""A generative language model, in Flax."""

import flax.linen as nn
import jax

from eigensam_jax.experiments.models.vit import Block


class GPT(nn.Module):
    """A causal transformer: each token is told from those before it in its window.

    References:
      Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
    """

    num_classes: int
    width: int = 64
    depth: int = 2
    heads: int = 4

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits (batch, length, num_classes) of what follows, of int32 tokens."""
        x = nn.Embed(self.num_classes, self.width)(tokens)
        shape = (1, *x.shape[1:])
        x = x + self.param("position", nn.initializers.normal(0.02), shape)
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.depth):
            x = Block(self.heads)(x, mask)
        return nn.Dense(self.num_classes)(nn.LayerNorm()(x))
