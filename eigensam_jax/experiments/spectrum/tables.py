"""The table of `eigensam spectrum`, and the sentence below it."""

from typing import Any

import numpy as np
from rich.table import Table

from eigensam_jax import eigen
from eigensam_jax.experiments.records import tables

NEAR_ZERO = 0.01  # times λ_max: an eigenvalue within it counts as close to zero


def summarise(
    density: eigen.SpectralDensity, dimension: int, lambda_max: float
) -> dict[str, float]:
    """Figures of the whole spectrum, with standard errors over the random vectors."""
    nodes, weights = (np.asarray(x, np.float64) for x in density)
    samples = len(nodes)
    traces = samples * dimension * (nodes * weights).sum(1)
    counts = dimension * weights
    bound = NEAR_ZERO * abs(lambda_max)
    return {
        "trace": float(traces.mean()),
        "trace_error": float(traces.std(ddof=min(1, samples - 1)) / np.sqrt(samples)),
        "num_above": float(counts[nodes > bound].sum()),
        "num_below": float(counts[nodes < -bound].sum()),
        "smallest_node": float(nodes.min()),
    }


def table(document: dict[str, Any], title: str) -> Table:
    """The rows of `summary` for a terminal."""
    headers = ("i", "λ_i", "λ_i / λ_1", "% of trace", "‖Hv − λv‖")
    return tables.table(title, headers, summary(document))


def summary(document: dict[str, Any]) -> list[list[str]]:
    """A row per eigenvalue: number, value, ratio to the largest, share, residual."""
    (run,) = document["runs"]
    values, trace = run["eigenvalues"], run["trace"]
    return [
        [
            str(i),
            f"{value:.4f}",
            f"{value / values[0]:.3f}",
            f"{100 * value / trace:.1f}",
            f"{residual:.0e}",
        ]
        for i, (value, residual) in enumerate(
            zip(values, run["residuals"], strict=True), 1
        )
    ]


def sentence(document: dict[str, Any]) -> str:
    """The other figures of the spectrum, in words."""
    config, (run,) = document["config"], document["runs"]
    k, top = config["k"], sum(run["eigenvalues"])
    return (
        f"Hessian of {run['parameters']} parameters on {config['examples']} "
        f"training images. Trace {run['trace']:.3f} ± "
        f"{run['trace_error']:.3f}; the {k} above add up to {top:.3f}. About "
        f"{run['num_above']:.0f} eigenvalues are above {NEAR_ZERO:.0%} of λ_1, "
        f"{run['num_below']:.0f} as far below zero, down to "
        f"{run['smallest_node']:.4f}. Products: {run['top_matvecs']} for the "
        f"eigenvalues ({run['top_wall_time_s']:.0f} s), {config['num_samples']} × "
        f"{config['num_matvecs']} for the density. Training loss "
        f"{run['train_loss']:.4f}, test accuracy {run['test_accuracy']:.1%}."
    )
