"""A transformer of one layer for time series, with attention over channels."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Forecaster(nn.Module):
    """Attention over the channels of a window, then one linear layer over time.

    With X the window, one standardised row per channel, each row of X +
    softmax(QKᵀ/√d)·V is mapped to the forecast, which is scaled back. d is `width`.

    References:
      Ilbert, Odonnat, Feofanov, Virmaux, Paolo, Palpanas, Redko, "SAMformer: Unlocking
      the Potential of Transformers in Time Series Forecasting with Sharpness-Aware
      Minimization and Channel-Wise Attention", ICML 2024.
      Kim et al., "Reversible Instance Normalization for Accurate Time-Series
      Forecasting against Distribution Shift", ICLR 2022.
    """

    horizon: int
    width: int = 16

    @nn.compact
    def __call__(self, windows: jax.Array) -> jax.Array:
        """Forecasts of shape (batch, horizon, channels)."""
        x = jnp.swapaxes(windows, 1, 2)
        mean = x.mean(-1, keepdims=True)
        deviation = jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        scale = self.param("scale", nn.initializers.ones, (x.shape[1], 1))
        shift = self.param("shift", nn.initializers.zeros, (x.shape[1], 1))
        x = (x - mean) / deviation * scale + shift
        query, key = (nn.Dense(self.width, name=name)(x) for name in ("query", "key"))
        value = nn.Dense(x.shape[-1], name="value")(x)
        scores = jnp.einsum("bcd,bed->bce", query, key) / jnp.sqrt(self.width)
        x = x + nn.softmax(scores) @ value
        forecast = nn.Dense(self.horizon, name="linear")(x)
        forecast = (forecast - shift) / (scale + 1e-10) * deviation + mean
        return jnp.swapaxes(forecast, 1, 2)
