"""The forecasting transformer against the same formula in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from eigensam_jax.experiments.models.forecaster import Forecaster
from eigensam_jax.experiments.training import losses


def test_it_is_its_formula():
    rng = np.random.default_rng(0)
    windows = rng.normal(2, 3, size=(4, 12, 3)).astype(np.float32)
    model = Forecaster(horizon=5, width=2)
    params = model.init(jax.random.key(0), windows)["params"]
    params["scale"] += jnp.array([[0.1], [-0.2], [0.3]])
    params["shift"] += jnp.array([[1.0], [2.0], [3.0]])
    w = jax.tree.map(np.asarray, params)
    for window, forecast in zip(
        windows, model.apply({"params": params}, windows), strict=True
    ):
        x = window.T
        mean, deviation = x.mean(1, keepdims=True), np.sqrt(x.var(1) + 1e-5)[:, None]
        x = (x - mean) / deviation * w["scale"] + w["shift"]
        dense = lambda name, x: x @ w[name]["kernel"] + w[name]["bias"]
        scores = np.exp(dense("query", x) @ dense("key", x).T / np.sqrt(2))
        x = x + scores / scores.sum(1, keepdims=True) @ dense("value", x)
        out = (dense("linear", x) - w["shift"]) / w["scale"] * deviation + mean
        np.testing.assert_allclose(forecast, out.T, rtol=2e-4, atol=2e-4)


def test_the_loss_of_a_forecast_is_its_mean_squared_error():
    rng = np.random.default_rng(1)
    outputs, labels = (rng.normal(size=(4, 5, 3)).astype(np.float32) for _ in range(2))
    each = losses.each(jnp.asarray(outputs), jnp.asarray(labels))
    np.testing.assert_allclose(each, ((outputs - labels) ** 2).mean((1, 2)), rtol=1e-6)
