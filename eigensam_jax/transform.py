"""SAM, ASAM and Eigen-SAM as optax gradient transformations.

Each turns ∇L(w) into ∇L(w + ε) and belongs first in an `optax.chain`:

    tx.update(grads, opt_state, params, value_fn=lambda p: loss(p, batch))

`grads` must be the gradient of `value_fn` at `params`: the same batch, dropout mask and
scaling, with nothing before it in the chain. Clip and decay after it: what comes out is
the gradient at w + ε, whatever was handed in.

`optax.MultiSteps` around the chain would call it on every mini-batch and keep the last
perturbation only. For one perturbation from the whole batch, hand in its gradient and a
`grad_fn` that goes through the mini-batches.

Under `jax.jit` with sharded arrays nothing need be said: the state of these links is
sharded as the parameters are. The same holds under `jax.shard_map` if the loss is the
mean over the devices, `jax.lax.pmean(loss, axis)`. In `jax.pmap`, under `shard_map`
without its check, and for m-sharpness, give `axis_name`; `value_fn` is then the loss of
each device's own batch, and `updates` the mean of its gradients:

    own = jax.lax.pcast(params, "data", to="varying")  # for shard_map's check alone
    grads = jax.lax.pmean(jax.grad(value_fn)(own), "data")

The gradient with respect to the replicated `params` would be the sum over the devices.
Its mean is n times too large: `sam` does not mind, but the secant would follow the
gradient instead of v.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from eigensam_jax import hessian, perturbation, trackers
from eigensam_jax._update import arguments
from eigensam_jax._update.devices import AxisName
from eigensam_jax._update.masking import Mask
from eigensam_jax._update.update import sharpness_aware
from eigensam_jax.hessian import HvpMode
from eigensam_jax.perturbation import Perturbation
from eigensam_jax.trackers import Tracker, TrackerState
from eigensam_jax.tree_math import PyTree


def sam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    mask: Mask = None,
    axis_name: AxisName = None,
    per_device: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Sharpness-aware minimization: ∇L(w) becomes ∇L(w + ρ·g/‖g‖).

    One gradient more per step. The norm runs over all perturbed parameters together.
    Put it first in the chain: `updates` must be the gradient of `value_fn` at `params`.
    Last in the chain it would hand on the gradient itself, not a step downhill.

    The perturbed parameters have the dtypes of `params`. In bfloat16 or float16 they
    are rounded stochastically, as most of ε is below the last bit of a weight. Forward
    and reverse derivatives go through `update`; at a zero gradient those of ε are 0.

    Args:
      rho: ρ, the radius of the perturbation, at least 0; or a schedule of the number of
        updates so far (below 0 or not finite, it counts as 0). ‖ε‖ is ρ for gradients
        of any size that their dtype holds, so that a loss may be scaled. Where the
        squares of a gradient leave that range, its norm takes a second pass.
      mask: which parameters are perturbed: a tree of bools like the parameters or a
        prefix of them, or a function that makes one from the parameters. ε is zero
        elsewhere and norms leave the rest out. All, by default.
      axis_name: the axis or axes of `pmap`, `shard_map` or `vmap` over which batches
        differ, a name or a tuple of names: what is computed inside is averaged over
        them. `value_fn`, `grad_fn` and `curvature_fn` are those of each device's own
        batch, without a mean, and get parameters that vary already.
      per_device: whether each device perturbs by its own gradient (m-sharpness), which
        saves a collective: `updates` is then each device's own gradient, without a
        mean, and what comes out is the mean of the gradients at w + εᵢ. A wrapper that
        decides by its `updates`, such as `optax.apply_if_finite`, belongs after this
        link: around it, devices that decide differently wait for each other for ever.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Its state is a `SharpnessAwareState`,
      which `info` reads. Its `update` needs `params` and, by keyword, `value_fn`,
      params -> scalar, the loss on the current batch; or `grad_fn`, where the loss
      alone is not enough (micro-batches, loss scaling): params -> gradient tree, or
      params -> (value, gradient tree). With both, `grad_fn` makes the gradients. Other
      arguments are ignored. What comes out has the structure of `params` and the dtypes
      of the gradients handed in.

    Raises:
      ValueError: for a negative `rho`, an invalid `mask` or `axis_name`, `per_device`
        without the latter; from `init` and `update`, for parameters that are not real
        floating-point arrays; from `update`, where an argument is missing or does not
        fit the parameters, outside the axes of `axis_name`, and where `updates` are
        known to be a mean and `per_device` is True, or the other way round.

    Example:
      >>> import eigensam_jax, jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(eigensam_jax.sam(rho=0.1), optax.sgd(0.5))
      >>> loss = lambda w: jnp.sum(w**2)
      >>> w = jnp.array([1.0, 0.0])
      >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
      >>> updates  # -0.5 · 2(w + ε)
      Array([-1.1, -0. ], dtype=float32)

    References:
      Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently
      Improving Generalization", ICLR 2021.
    """
    arguments.check_scalar("rho", rho, schedule=True)

    def perturb(number: jax.Array, grads: PyTree, *_: Any) -> Perturbation:
        return perturbation.sam(grads, _at("rho", rho, number))

    return sharpness_aware(perturb, None, mask, axis_name, per_device)


def asam(
    rho: optax.ScalarOrSchedule = 0.5,
    eta: float = 0.01,
    *,
    scale_biases: bool = False,
    mask: Mask = None,
    axis_name: AxisName = None,
    per_device: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adaptive SAM: ∇L(w) becomes ∇L(w + ρ·T²g/‖Tg‖) with T = |w| + η, element-wise.

    One gradient more per step; first in the chain, as `sam`. ρ is measured relative to
    the weights, so it is about ten times that of `sam`. On biases, the leaves of one
    axis or none, T is 1, as in the authors' code, whose published choice is ρ = 0.5.

    Args:
      rho: ρ, at least 0; or a schedule of the number of updates so far.
      eta: η, at least 0; with 0, weights that are zero are never perturbed.
      scale_biases: whether T is |w| + η on biases too, as in the paper's formula. A
        larger ρ is then best, such as 2.
      mask, axis_name, per_device: as in `sam`.

    Returns:
      As `sam`.

    Raises:
      ValueError: for a negative `rho` or `eta`, a `scale_biases` that is not a bool,
        and as `sam`.

    Example:
      >>> import eigensam_jax, jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(eigensam_jax.asam(rho=0.1, eta=0.0), optax.sgd(0.5))
      >>> loss = lambda w: jnp.sum(w**2)
      >>> w = jnp.array([[2.0, 0.0]])
      >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
      >>> updates  # ε = 0.1 · (4·4)/(2·4) in the first weight
      Array([[-2.2, -0. ]], dtype=float32)

    References:
      Kwon, Kim, Park, Choi, "ASAM: Adaptive Sharpness-Aware Minimization for
      Scale-Invariant Learning of Deep Neural Networks", ICML 2021.
    """
    arguments.check_scalar("rho", rho, schedule=True)
    arguments.check_scalar("eta", eta, schedule=False)
    valid = isinstance(scale_biases, bool)
    arguments.require(valid, "scale_biases", scale_biases, "True or False")

    def perturb(
        number: jax.Array, grads: PyTree, params: PyTree, _: Any
    ) -> Perturbation:
        now = _at("rho", rho, number)
        return perturbation.asam(grads, params, now, eta, scale_biases=scale_biases)

    return sharpness_aware(perturb, None, mask, axis_name, per_device)


def eigen_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    alpha: optax.ScalarOrSchedule = 0.5,
    tracker: Tracker = trackers.secant(),
    *,
    mask: Mask = None,
    axis_name: AxisName = None,
    per_device: bool = False,
    hvp_mode: HvpMode = "forward_over_reverse",
    eigenvector_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Eigen-SAM: SAM, turned towards the top eigenvector v of the Hessian.

    ∇L(w) becomes ∇L(w + ε) with ε = ρ·(u + α·sign⟨g,v⟩·v⊥), where u = g/‖g‖ and
    v⊥ = v − ⟨u,v⟩u, which is not renormalised: ‖ε‖ = ρ·√(1 + α²(1 − ⟨u,v⟩²)), a little
    more than ρ. Compare with `sam` at that radius, not at the same ρ.

    Put it first in the chain, as `sam`.

    The paper's method is `eigen_sam(0.1, 0.2, trackers.power_iteration())`. The
    defaults are others: in our measurements α = 0.2 nowhere lowered λ_max significantly
    below SAM's of the same radius, and α = 0.5 did on a dense network on Fashion-MNIST.

    Where λ is certainly negative, so that v is no top eigenvector, and until there is a
    v, the added term is dropped: the steps are those of `sam`. `alpha=0` is `sam`, bit
    for bit, with the eigenvector tracked beside it.

    Cost: one gradient more per step, as `sam`; one vector like the parameters, in
    float32 or wider; and what the tracker costs, by default no Hessian-vector product.
    The products of other trackers need several times the memory of a gradient on a step
    that refreshes, and the program reserves it for every step. Where that is too much,
    give them half or a quarter of the batch by `curvature_fn`.

    The Hessian of trackers that make products is that of `curvature_fn`, if given, else
    the Jacobian of `grad_fn`, if given, else that of `value_fn`, at w. What optax adds
    later, such as weight decay, is not in it.

    `eigensam_jax.info(opt_state)` is what the last step did, and
    `optax.tree.get(opt_state, "eigenvector")` is v.

    Differences from the paper's code: before the first v exists that code perturbs by
    ρ·g, unnormalised. A refresh counts steps over all of training, so that short epochs
    refresh too. The Hessian is that of the loss as it is trained; the paper's code
    takes it in evaluation mode, for which there is `curvature_fn`. Negative eigenvalues
    are seen. v is part of the state and its checkpoints.

    Args:
      rho: ρ, the radius of SAM's part, at least 0; or a schedule of the number of
        updates so far.
      alpha: α, the weight of the eigenvector's part, at least 0; or a schedule. The
        paper tunes it over 0.05, 0.1 and 0.2.
      tracker: what keeps v up to date, see `eigensam_jax.trackers`.
      mask: as in `sam`; v and the Hessian are those of the perturbed parameters, with
        v zero elsewhere.
      axis_name: as in `sam`; Hessian-vector products are averaged as well.
      per_device: as in `sam`. v stays the same on all devices: the Hessian is that of
        the whole batch, and what trackers observe is averaged, for a collective as
        large as a gradient on each step that is observed: see `trackers.Tracker`.
      hvp_mode: how a Hessian-vector product is made, see `hessian.matvec`. The default
        is the fastest; the others are for kernels that lack its derivatives.
      eigenvector_dtype: the dtype in which v, and the second vector of
        `trackers.ritz`, are kept between steps; None is float32, or that of the
        parameters where it is wider. `jnp.bfloat16` halves their memory: they are
        rounded to it stochastically, and sums with them are in float32 all the same.

    Returns:
      As `sam`. `update` takes two more keyword arguments: `curvature_fn`, params ->
      scalar, the loss whose Hessian is tracked where it is another one (evaluation
      mode, part of the batch); and `refresh`, a Python bool that fixes at trace time
      whether the tracker does on this step what it does every `update_interval` steps,
      so that there is no branch in the program. Give `step % update_interval == 0`:
      always False is never.

    Raises:
      ValueError: for a negative `rho` or `alpha`, an invalid `tracker`, an unknown
        `hvp_mode`, an `eigenvector_dtype` that is not floating-point or has fewer than
        16 bits, and as `sam`.

    Example:
      >>> import eigensam_jax, jax, jax.numpy as jnp, optax
      >>> paper = eigensam_jax.trackers.power_iteration()
      >>> tx = optax.chain(eigensam_jax.eigen_sam(0.1, 0.2, paper), optax.sgd(0.1))
      >>> loss = lambda w: w["x"] ** 2 + 3 * w["y"] ** 2
      >>> w = {"x": jnp.array(1.0), "y": jnp.array(0.1)}
      >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
      >>> print(f"{eigensam_jax.info(state).eigenvalue:.2f}")  # the Hessian's: 2 and 6
      6.00

    References:
      Luo, Truong, Pham, Harandi, Phung, Le, "Explicit Eigenvalue Regularization
      Improves Sharpness-Aware Minimization", NeurIPS 2024, arXiv 2501.12666.
    """
    arguments.check_scalar("rho", rho, schedule=True)
    arguments.check_scalar("alpha", alpha, schedule=True)
    what = "a trackers.Tracker, such as what trackers.secant() returns"
    arguments.require(isinstance(tracker, Tracker), "tracker", tracker, what)
    for name in ("refresh_interval", "observe_interval"):
        if (interval := getattr(tracker, name)) is not None:
            arguments.check_positive_int(f"tracker.{name}", interval, "steps")
    arguments.check_choice("hvp_mode", hvp_mode, hessian.HVP_MODES)
    arguments.check_floating("eigenvector_dtype", eigenvector_dtype)

    def perturb(
        number: jax.Array, grads: PyTree, _: Any, tracked: TrackerState
    ) -> Perturbation:
        weight = jnp.where(tracked.usable, _at("alpha", alpha, number), 0)
        return perturbation.eigen_sam(
            grads, tracked.eigenvector, _at("rho", rho, number), weight
        )

    return sharpness_aware(
        perturb, tracker, mask, axis_name, per_device, hvp_mode, eigenvector_dtype
    )


def _at(name: str, value: optax.ScalarOrSchedule, count: jax.Array) -> ArrayLike:
    """The value at this step; what is negative or not finite counts as 0."""
    now = jnp.asarray(value(count) if callable(value) else value)
    if now.shape != ():
        raise ValueError(
            f"{name} must be a scalar at each step, got the shape {now.shape}: let the "
            "schedule return one number."
        )
    return jnp.where((now > 0) & jnp.isfinite(now), now, 0)
