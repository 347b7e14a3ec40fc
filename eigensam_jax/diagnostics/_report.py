"""Every measure of sharpness of one network, for a number of products."""

from typing import Any, NamedTuple

import jax

from eigensam_jax import eigen, tree_math
from eigensam_jax._update import arguments, masking, programs
from eigensam_jax.diagnostics._balls import (
    WorstCase,
    average_sharpness,
    sam_sharpness,
    worst_case_sharpness,
)
from eigensam_jax.diagnostics._sharpness import block
from eigensam_jax.eigen import Eigenpair, Estimate
from eigensam_jax.hessian import HvpMode
from eigensam_jax.tree_math import PyTree, ValueFn

_TOLERANCE = 1e-3
_FEWEST = 5  # products for the λ_max of a layer


class Report(NamedTuple):
    """What `report` measured; `print` shows it as a table.

    Attributes:
      value: the loss f(w).
      grad_norm: ‖∇f(w)‖.
      top: the top eigenpair of the Hessian.
      trace: of the Hessian.
      rho: ρ, the radius of the ball of the next three.
      sam: `sam_sharpness`.
      worst_case: `worst_case_sharpness`.
      average: `average_sharpness`.
      layers: as of `sharpness_by_layer`.
      num_matvecs: Hessian-vector products that were made.
      layers_left_out: the layers for which the products did not suffice.
    """

    value: float
    grad_norm: float
    top: Eigenpair
    trace: Estimate
    rho: float
    sam: float
    worst_case: WorstCase
    average: Estimate
    layers: dict[str, Eigenpair]
    num_matvecs: int
    layers_left_out: int

    def __str__(self) -> str:
        rows = [
            ("loss", self.value, None),
            ("gradient norm", self.grad_norm, None),
            ("λ_max of the Hessian", self.top.eigenvalue, self.top.residual),
            ("trace of the Hessian", *self.trace),
            (f"rise at SAM's perturbation, ρ {self.rho:g}", self.sam, None),
            ("largest rise in that ball", self.worst_case.value, None),
            ("average rise in that ball", *self.average),
            *(
                (f"λ_max of {name}", top.eigenvalue, top.residual)
                for name, top in self.layers.items()
            ),
        ]
        width = max(len(name) for name, *_ in rows)
        lines = [
            f"{name:{width}}  {value:.4g}"
            + ("" if error is None else f" ± {error:.1g}")
            for name, value, error in rows
        ]
        if self.layers_left_out:
            left_out = f"λ_max of {self.layers_left_out} layers left out"
            lines.append(f"{left_out}: give more num_matvecs")
        return "\n".join([*lines, f"{self.num_matvecs} Hessian-vector products"])


def report(
    value_fn: ValueFn,
    params: PyTree,
    *,
    rho: float = 0.05,
    num_matvecs: int = 200,
    hvp_mode: HvpMode = "forward_over_reverse",
    seed: int = 0,
) -> Report:
    """Measures a network in every sense of sharpness, within a budget of products.

    Of the `num_matvecs` Hessian-vector products, half at most go to λ_max, a quarter to
    the trace, and what is left, shared evenly, to λ_max of the layers, which are left
    out where there are fewer than five products for each. The measures in a ball take
    25 gradients and 67 values beside. Call it outside `jit`.

    Args:
      value_fn, params: as in `sharpness`. In `value_fn`, use the network as
        in evaluation, by the running statistics of batch normalisation and without
        dropout, unless it is the loss of training whose sharpness you want.
      rho: ρ, the radius of the ball.
      num_matvecs: the most products, at least 8.
      hvp_mode: as in `hessian.matvec`.
      seed: of the random vectors of the trace and of the balls.

    Returns:
      A `Report`. Its eigenvalues stand with their residuals, within which there is a
      true one, and its estimates with their standard errors.

    Raises:
      ValueError: for fewer than 8 products, traced parameters, and as `sharpness`.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import diagnostics
      >>> f = lambda p: jnp.sum(p["a"] ** 2) + 2 * jnp.sum(p["b"] ** 2)
      >>> params = {"a": jnp.ones(3), "b": jnp.ones(1)}
      >>> print(diagnostics.report(f, params, rho=0.1))  # doctest: +ELLIPSIS
      loss                               5
      gradient norm                      5.292
      λ_max of the Hessian               4 ± ...
      trace of the Hessian               10 ± ...
      rise at SAM's perturbation, ρ 0.1  0.5449
      largest rise in that ball          0.545
      average rise in that ball          0.0... ± ...
      λ_max of a                         2 ± ...
      λ_max of b                         4 ± ...
      ... Hessian-vector products
    """
    arguments.check_scalar("rho", rho, schedule=False)
    arguments.check_positive_int("num_matvecs", num_matvecs, "products")
    remedy = ": they are shared by several measures"
    enough = num_matvecs >= 8
    arguments.require(enough, "num_matvecs", num_matvecs, "at least 8", remedy)
    if programs.is_traced(params):
        raise ValueError("report needs values, got traced params: call it outside jit.")
    spent = 0

    found = block(value_fn, params, None, hvp_mode, True)
    if not found.host_loop:
        raise ValueError(
            "report needs values, got a traced value_fn: call it outside jit."
        )

    def counted(vector: PyTree) -> PyTree:
        nonlocal spent
        spent += 1
        return found.matvec(vector)

    whole = found._replace(matvec=counted)
    top = whole.top_eigenpair(_TOLERANCE, num_matvecs // 2)
    options: Any = {"num_matvecs": num_matvecs // 4, "seed": seed, "host_loop": True}
    trace = eigen.trace(whole.matvec, whole.like, **options)
    masks, layers = masking.layers(params), {}
    share = (num_matvecs - spent) // max(len(masks), 1)
    if share >= _FEWEST:
        layers = {
            name: whole.of_mask(mask, params).top_eigenpair(_TOLERANCE, share)
            for name, mask in masks.items()
        }
    _, value_and_grad = programs.host_loop_of(
        True, value_fn, jax.value_and_grad(value_fn), params
    )
    value, grads = value_and_grad(params)
    return Report(
        float(value),
        float(tree_math.norm(grads)),
        top._replace(eigenvector=whole.space.embed(top.eigenvector, params)),
        trace,
        rho,
        float(sam_sharpness(value_fn, params, rho)),
        worst_case_sharpness(value_fn, params, rho, seed=seed),
        average_sharpness(value_fn, params, rho, seed=seed),
        layers,
        spent,
        len(masks) - len(layers),
    )
