"""SAM's dynamics as a stochastic differential equation, up to third derivatives.

Batches γ are drawn independently and uniformly from N. With the batch loss f_γ, its
gradient ∇f_γ, Hessian H_γ and third derivatives ∇³f_γ, one step of SAM is

    x ← x − η ∇f_γ(x + ε_γ),    ε_γ = ρ·u_γ,    u_γ = ∇f_γ(x)/‖∇f_γ(x)‖,

and lasts a time of η. The equation is

    dX = b(X) dt + √η Σ(X)^½ dW

with Σ the covariance over batches of ∇f_γ(X + ε_γ) and, by `order`, the drift

    1 (SGD)    b = −E[∇f_γ]                  and Σ the covariance of ∇f_γ
    2          b = −E[∇f_γ + H_γ ε_γ]
    3          b = −E[∇f_γ + H_γ ε_γ + ½ ∇³f_γ[ε_γ, ε_γ]]

−b differs from SAM's mean gradient by O(ρ), O(ρ²) and O(ρ³): within the error O(η) of
any such equation if ρ is O(η^½) at order 2 and O(η^⅓) at order 3. Eigen-SAM has

    ε_γ = ρ·(u_γ + α·sign⟨∇f_γ, v⟩·v⊥),    v⊥ = v − ⟨u_γ, v⟩u_γ,

with v = v₁(X) the exact top eigenvector of the Hessian of E[f_γ] at X.

Assumptions, not checked: f_γ has three continuous derivatives (tanh, GELU or softplus,
not ReLU); ∇f_γ ≠ 0 (here u_γ = 0 for a zero gradient); and for Eigen-SAM λ₁ is simple
and ⟨∇f_γ, v⟩ ≠ 0. Order 2 is the equation of Compagnoni et al., order 3 that of Luo et
al. Three parts are this project's own and unproved: Eigen-SAM's equation, Σ of the
gradients at x + ε_γ without expansion in ρ, and Itô's term in `sharpness_rates`.

The functions return trees like the parameters, in float32 or the leaf's dtype if wider,
and raise a ValueError for an invalid argument.

References:
  Luo, Truong, Pham, Harandi, Phung, Le, "Explicit Eigenvalue Regularization Improves
  Sharpness-Aware Minimization", NeurIPS 2024; Monzio Compagnoni, Biggio, Orvieto,
  Proske, Kersting, Lucchi, "An SDE for Modeling SAM: Theory and Insights", ICML 2023;
  Li, Tai, E, "Stochastic Modified Equations and Adaptive Stochastic Gradient
  Algorithms", ICML 2017.
"""

from eigensam_jax.sde._equation import diffusion, drift
from eigensam_jax.sde._expansion import Order, expanded_gradient, third_derivative
from eigensam_jax.sde._sharpness import (
    SharpnessRates,
    eigenvalue_curvature,
    eigenvalue_gradient,
    sharpness_rates,
)
from eigensam_jax.sde._simulation import Info, State, make_step, simulate, start

__all__ = [
    "Info",
    "Order",
    "SharpnessRates",
    "State",
    "diffusion",
    "drift",
    "eigenvalue_curvature",
    "eigenvalue_gradient",
    "expanded_gradient",
    "make_step",
    "sharpness_rates",
    "simulate",
    "start",
    "third_derivative",
]
