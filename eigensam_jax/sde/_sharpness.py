"""The effect of the equation on λ_max: its derivatives, and the parts of dλ_max/dt."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg
from jax.typing import ArrayLike

from eigensam_jax import diagnostics, hessian, tree_math
from eigensam_jax._update import arguments
from eigensam_jax.eigen import Eigenpair
from eigensam_jax.sde import _equation, _expansion
from eigensam_jax.sde._expansion import BatchValueFn
from eigensam_jax.tree_math import PyTree

_MAX_ITERATIONS = 500  # of conjugate gradients; each is a product of all batches


class SharpnessRates(NamedTuple):
    """The parts of dE[λ_max]/dt at a point, and what to compare them with. Scalars.

    Attributes:
      eigenvalue: λ_max of the Hessian H of E[f_γ].
      residual: ‖Hv − λ_max v‖ of the v that was used.
      alignment: E|⟨u_γ, v⟩|, of the batches' gradients.
      perturbation_alignment: E[|⟨ε_γ, v⟩|/‖ε_γ‖].
      gradient_norm: ‖∇λ_max‖.
      first: −⟨∇λ_max, E[∇f_γ]⟩, SGD's part.
      second: −⟨∇λ_max, E[H_γ ε_γ]⟩.
      third: −½⟨∇λ_max, E[∇³f_γ[ε_γ, ε_γ]]⟩.
      ito: (η/2)·tr(Σ∇²λ_max), the noise's part.
      aligned: −½E[‖ε_γ‖²]·‖∇λ_max‖², what `third` would be if every ε_γ were along v
        and the batches had the same third derivatives along it.
    """

    eigenvalue: jax.Array
    residual: jax.Array
    alignment: jax.Array
    perturbation_alignment: jax.Array
    gradient_norm: jax.Array
    first: jax.Array
    second: jax.Array
    third: jax.Array
    ito: jax.Array
    aligned: jax.Array


def eigenvalue_gradient(
    value_fn: BatchValueFn, params: PyTree, batches: PyTree, eigenvector: PyTree
) -> PyTree:
    """Gradient ∇λ = ∇³f[v, v] of a simple eigenvalue of the Hessian of f = E[f_γ].

    Args:
      value_fn, params, batches: as in `drift`.
      eigenvector: v, a tree like `params` of norm 1 and either sign, converged: the
        error of ∇λ is linear in that of v.

    Example:
      >>> import eigensam_jax, jax.numpy as jnp
      >>> quartic = lambda w, x: x * jnp.sum(w**4)  # λ = 12·w₁² for the largest w₁
      >>> w, x, v = jnp.array([1.0, 0.5]), jnp.ones(1), jnp.array([1.0, 0.0])
      >>> eigensam_jax.sde.eigenvalue_gradient(quartic, w, x, v)
      Array([24.,  0.], dtype=float32)

    References:
      Magnus, "On differentiating eigenvalues and eigenvectors", Econometric Theory
      1985.
    """

    def at(batch: PyTree) -> PyTree:
        f = lambda p: value_fn(p, batch)
        return _expansion.third_derivative(f, params, eigenvector, eigenvector)

    return _expansion.batch_mean(at, batches)


def eigenvalue_curvature(
    value_fn: BatchValueFn,
    params: PyTree,
    batches: PyTree,
    direction: PyTree,
    eigenvector: PyTree,
    eigenvalue: ArrayLike,
    *,
    tol: ArrayLike = 1e-3,
) -> jax.Array:
    """Second derivative ∇²λ[a, a], a scalar, of a simple largest eigenvalue.

        ∇²λ[a, a] = ∇⁴f[v, v, a, a] + 2 ⟨z, (λ − H)⁺ z⟩,    z = ∇³f[v, a], f = E[f_γ]

    (λ − H)⁺z, orthogonal to v, is found by conjugate gradients, in a few times
    √((λ − λ_min)/(λ − λ₂)) products. The result is NaN if 500 are not enough for twice
    `tol`. Reference: that of `eigenvalue_gradient`.

    Args:
      value_fn, params, batches: as in `drift`.
      direction: a, a tree like `params` of any length.
      eigenvector, eigenvalue: v and λ, the converged top eigenpair, v of norm 1.
      tol: residual at which to stop, relative to z.

    Example:
      >>> import eigensam_jax, jax.numpy as jnp
      >>> quartic = lambda w, x: x * jnp.sum(w**4)
      >>> w, x, v = jnp.array([1.0, 0.5]), jnp.ones(1), jnp.array([1.0, 0.0])
      >>> print(eigensam_jax.sde.eigenvalue_curvature(quartic, w, x, v, v, 12.0))
      24.0
    """
    v, a = eigenvector, direction

    def derivatives(batch: PyTree) -> tuple[jax.Array, PyTree]:
        along = _expansion.directional(lambda p: value_fn(p, batch), v)
        fourth = along
        for towards in (v, a, a):
            fourth = _expansion.directional(fourth, towards)
        third = jax.grad(_expansion.directional(along, a))(params)
        return fourth(params), tree_math.widen(third)

    fourth, third = _expansion.batch_mean(derivatives, batches)
    matvec = hessian.mean_matvec(value_fn, params, batches)

    def orthogonal(x: PyTree) -> PyTree:
        return tree_math.add_scaled(x, -tree_math.vdot(x, v), v)

    def shifted(x: PyTree) -> PyTree:
        scaled = tree_math.scale(eigenvalue, x)
        return orthogonal(tree_math.add_scaled(scaled, -1, matvec(orthogonal(x))))

    third = orthogonal(third)
    solve: Callable[..., tuple[PyTree, None]] = cg
    solution, _ = solve(shifted, third, tol=tol, maxiter=_MAX_ITERATIONS)
    left = tree_math.norm(tree_math.add_scaled(third, -1, shifted(solution)))
    is_solved = left <= 2 * tol * tree_math.norm(third)
    return jnp.where(is_solved, fourth + 2 * tree_math.vdot(third, solution), jnp.nan)


def sharpness_rates(
    value_fn: BatchValueFn,
    params: PyTree,
    batches: PyTree,
    *,
    rho: ArrayLike,
    eta: ArrayLike,
    alpha: ArrayLike = 0.0,
    eigenpair: Eigenpair | None = None,
    tol: ArrayLike = _equation.TOLERANCE,
    curvature_tol: ArrayLike = 1e-2,
) -> SharpnessRates:
    """The parts of dE[λ_max]/dt under the equation of order 3, by Itô's formula:

        dE[λ]/dt = ⟨∇λ, b⟩ + (η/2)·tr(Σ∇²λ)

    With one batch, `third` is −(ρ²/2)⟨∇λ, ∇³f[u, u]⟩. It is −(ρ²/2)‖∇λ‖², SAM's pull on
    λ_max, only if u = ±v: therefore alignment matters. The trace is the exact mean over
    γ of ∇²λ[c_γ, c_γ] with the centred gradients c_γ, a linear system each. It grows
    without bound as λ₂ approaches λ_max, which then has no second derivative. In a step
    of SAM the mean change of λ has one more term, (η²/2)·∇²λ[b, b].

    Args:
      value_fn, params, batches, rho: as in `drift`.
      eta: η, the step size, which scales the noise.
      alpha: α of Eigen-SAM; 0 for SAM.
      eigenpair: the top one of the Hessian of E[f_γ] at w, converged; by default found
        here.
      tol: tolerance of its residual, relative to λ_max.
      curvature_tol: as `tol` of `eigenvalue_curvature`.

    Example:
      >>> import eigensam_jax, jax.numpy as jnp
      >>> quartic = lambda w, x: x * jnp.sum(w**4)
      >>> w, x = jnp.array([1.0, 0.0]), jnp.array([0.5, 1.5])
      >>> rates = eigensam_jax.sde.sharpness_rates(quartic, w, x, rho=0.1, eta=0.01)
      >>> print(f"{rates.first:.1f} {rates.third:.2f}")  # u = v, ∇λ = 24, E[∇f_γ] = 4
      -96.0 -2.88
    """
    _equation.check(params, batches, rho, 3, alpha)
    arguments.check_scalar("eta", eta, schedule=False)
    if eigenpair is None:
        eigenpair = _equation.top_eigenpair(value_fn, params, batches, tol)
    v = arguments.like_params(
        "eigenpair.eigenvector",
        eigenpair.eigenvector,
        params,
        "Take the first of several: jax.tree.map(lambda x: x[0], pairs).",
    )
    slope = eigenvalue_gradient(value_fn, params, batches, v)
    used = None if _equation.is_sam(alpha) else v

    def parts(batch: PyTree) -> tuple[PyTree, tuple[jax.Array, ...]]:
        f, _, grads, step = _equation.at_batch(
            value_fn, params, batch, rho, alpha, used
        )
        epsilon = step.epsilon
        along = _expansion.directional(f, slope)
        second = _expansion.directional(along, epsilon)
        third = _expansion.directional(second, epsilon)
        return _equation.perturbed_gradient(f, params, step), (
            tree_math.vdot(slope, grads),
            second(params),
            third(params) / 2,
            step.norm**2 / 2,
            diagnostics.alignment(grads, v),
            diagnostics.alignment(epsilon, v),
        )

    mean_gradient, means = _expansion.batch_mean(parts, batches)
    first, second, third, half_square, alignment, perturbed_alignment = means

    def curvature(batch: PyTree) -> jax.Array:
        f, _, _, step = _equation.at_batch(value_fn, params, batch, rho, alpha, used)
        gradient = _equation.perturbed_gradient(f, params, step)
        centred, value = tree_math.add_scaled(gradient, -1, mean_gradient), eigenpair[1]
        return eigenvalue_curvature(
            value_fn, params, batches, centred, v, value, tol=curvature_tol
        )

    trace = _expansion.batch_mean(curvature, batches)
    return SharpnessRates(
        eigenvalue=eigenpair.eigenvalue,
        residual=eigenpair.residual,
        alignment=alignment,
        perturbation_alignment=perturbed_alignment,
        gradient_norm=tree_math.norm(slope),
        first=-first,
        second=-second,
        third=-third,
        ito=jnp.asarray(eta, trace.dtype) / 2 * trace,
        aligned=-half_square * tree_math.vdot(slope, slope),
    )
