"""The measures of sharpness of a trained network that are held against its fate."""

import jax.numpy as jnp

from eigensam_jax import diagnostics, tree_math
from eigensam_jax.tree_math import PyTree, ValueFn

RHO, AVERAGE_RHO = 0.1, 4.0  # radii of the worst case and of Gaussian noise
# In ASAM's norm; there the noise is a share of each weight that falls with √n.
ETA, SCALED_RHO, SCALED_AVERAGE_RHO = 0.01, 1.0, 100.0
NUM_MATVECS = 100

# The fields of a record, and what a table calls them.
MEASURES = {
    "lambda_max": "λ_max",
    "trace": "trace",
    "grad_norm": "gradient norm",
    "sam_sharpness": f"rise at SAM's perturbation, ρ {RHO:g}",
    "worst_case": f"worst case in a ball, ρ {RHO:g}",
    "average_case": f"average in a ball, ρ {AVERAGE_RHO:g}",
    "scaled_worst_case": f"worst case in ASAM's norm, ρ {SCALED_RHO:g}",
    "scaled_average_case": f"average in ASAM's norm, ρ {SCALED_AVERAGE_RHO:g}",
    "relative": "Σ of layers λ_max·‖w‖²",
    "weight_norm": "‖w‖",
    "train_loss": "training loss",
}


def measured(value_fn: ValueFn, params: PyTree) -> dict[str, float]:
    """All `MEASURES` but the training loss, of the loss `value_fn`.

    Called with the same function for many networks, it is compiled once.
    """
    report = diagnostics.report(value_fn, params, rho=RHO, num_matvecs=NUM_MATVECS)
    average = diagnostics.average_sharpness(value_fn, params, AVERAGE_RHO)
    scaled_worst = diagnostics.worst_case_sharpness(
        value_fn, params, SCALED_RHO, eta=ETA
    )
    scaled_average = diagnostics.average_sharpness(
        value_fn, params, SCALED_AVERAGE_RHO, eta=ETA
    )
    layers = report.layers or diagnostics.sharpness_by_layer(value_fn, params)
    relative = jnp.zeros(())
    for name, top in layers.items():
        layer = params
        for part in name.split("/"):
            layer = layer[part]
        relative += top.eigenvalue * tree_math.norm(layer) ** 2
    found = {
        "lambda_max": report.top.eigenvalue,
        "trace": report.trace.value,
        "grad_norm": report.grad_norm,
        "sam_sharpness": report.sam,
        "worst_case": report.worst_case.value,
        "average_case": average.value,
        "scaled_worst_case": scaled_worst.value,
        "scaled_average_case": scaled_average.value,
        "relative": relative,
        "weight_norm": tree_math.norm(params),
    }
    return {name: float(value) for name, value in found.items()}
