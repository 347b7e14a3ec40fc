"""SAM, ASAM and Eigen-SAM as optax gradient transformations.

Each replaces ∇L(w) by ∇L(w + ε) and must be the first link of an `optax.chain`:

    tx.update(grads, opt_state, params, value_fn=lambda p: loss(p, batch))

`grads` must be the gradient of `value_fn` at `params`, with the same batch, dropout
mask and loss scale. What links before it do to the update, such as clipping, is lost:
the output is a new gradient at w + ε. But they change ε, and the v of the secant and of
`ritz`. `optax.MultiSteps` around the chain takes that gradient on the last micro-batch
alone. Pass the gradient of the whole batch instead, and a `grad_fn` that loops over
micro-batches.

Under `jax.jit` with sharded arrays nothing is needed, nor under `jax.shard_map` if the
loss is the mean over the devices, `jax.lax.pmean(loss, axis)`. Under `jax.pmap`, under
`shard_map` with `check_vma=False`, and for m-sharpness, give `axis_name`. `value_fn` is
then the loss of each device's own batch, and `updates` the mean of its gradients:

    own = jax.lax.pcast(params, "data", to="varying")  # only where check_vma=True
    grads = jax.lax.pmean(jax.grad(value_fn)(own), "data")

Without `pcast` the gradient is already the sum over n devices and its mean n times too
large. The secant tracker would then follow the gradient instead of v.
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

    First in the chain: clipping before it is lost, and `optax.MultiSteps` around it
    takes the new gradient on the last micro-batch alone. One more gradient per step.
    The norm runs over all perturbed parameters. Those in bfloat16 and float16 are
    rounded stochastically, since most of ε is below a weight's last bit. `update` has
    forward and reverse derivatives. At a zero gradient ε and its derivatives are 0.

    Args:
      rho: radius ρ ≥ 0, or a schedule of the number of updates so far; its negative and
        non-finite values count as 0. ‖ε‖ = ρ whatever the scale of the loss.
      mask: the parameters to perturb, by default all: a tree of bools like the
        parameters, a prefix of one, or a function from the parameters to either. ε is
        zero elsewhere, and norms leave the rest out.
      axis_name: the axis or axes of `pmap`, `shard_map` or `vmap` over which batches
        differ, a name or a tuple of names. Everything computed inside is averaged over
        them. `value_fn`, `grad_fn` and `curvature_fn` receive varying parameters and
        return the results of one device's batch.
      per_device: whether each device perturbs by its own gradient (m-sharpness), which
        saves a collective. `updates` are then each device's own gradient, and the
        output is the mean of the gradients at w + εᵢ. Put wrappers that branch on their
        `updates`, such as `optax.apply_if_finite`, after this link: around it, devices
        can deadlock.

    Returns:
      An `optax.GradientTransformationExtraArgs` with a `SharpnessAwareState`, read by
      `info`. `update` needs `params` and, by keyword, `value_fn`: params -> scalar, the
      loss on the current batch; or `grad_fn`: params -> gradient tree or (value,
      gradient tree), for micro-batches or loss scaling. `grad_fn` is used if both are
      given. With `perturb=False`, a Python bool, this step takes no second gradient:
      `updates` pass, and schedules do not count it. Other arguments are ignored. The
      output has the structure of `params` and the dtypes of the gradients passed in.

    Raises:
      ValueError: for invalid options, for parameters that are not real floating-point
        arrays, and for arguments of `update` that are missing, do not fit the
        parameters, or are wrongly averaged, or not averaged, over devices.

    Example:
      >>> import eigensam_jax, jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(eigensam_jax.sam(rho=0.1), optax.sgd(0.5))
      >>> w, loss = jnp.array([1.0, 0.0]), lambda w: jnp.sum(w**2)
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

    Results and errors are those of `sam`. ρ is relative to the weights, so it is about
    ten times that of `sam`. T is 1 on biases, the leaves of one axis or none, as in the
    authors' code (their published ρ is 0.5).

    Args:
      rho: ρ, as in `sam`.
      eta: η ≥ 0. With 0, weights that are zero are never perturbed.
      scale_biases: whether T is |w| + η on biases too, as in the paper's formula.
        Then search ρ anew.
      mask, axis_name, per_device: as in `sam`.

    Example:
      >>> import eigensam_jax, jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(eigensam_jax.asam(rho=0.1, eta=0.0), optax.sgd(0.5))
      >>> w, loss = jnp.array([[2.0, 0.0]]), lambda w: jnp.sum(w**2)
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
    """Eigen-SAM: SAM's perturbation, turned towards the top Hessian eigenvector v.

        ∇L(w) becomes ∇L(w + ε),   ε = ρ·(u + α·sign⟨g,v⟩·v⊥),   u = g/‖g‖

    Here v⊥ = v − ⟨u,v⟩u is not renormalised, so ‖ε‖ = ρ·√(1 + α²(1 − ⟨u,v⟩²)) is a
    little more than ρ. Compare with `sam` at that radius. The step is that of `sam`
    until there is a v, and while the tracker holds the curvature along v to be
    negative. `alpha=0` is `sam` bit for bit, with v tracked.

    The paper's method is `eigen_sam(0.1, 0.2, trackers.power_iteration())`. The default
    α is larger because at 0.2, under SGD with momentum, neither that tracker nor the
    secant lowered λ_max significantly below SAM's at equal radius on Fashion-MNIST.
    The paper's code differs: it perturbs by ρ·g, unnormalised, until it has a v; counts
    the steps between refreshes within an epoch; takes the Hessian in evaluation mode
    (here by `curvature_fn`); does not detect negative eigenvalues; and does not save v.

    The Hessian is that of `curvature_fn`, if given; else the Jacobian of `grad_fn`, if
    given; else that of `value_fn`. Later links, such as weight decay, are not in it.
    Cost: one more gradient per step, one vector like the parameters in float32 or
    wider, and the tracker's cost. Trackers that make Hessian-vector products need
    several times the memory of a gradient, reserved on every step; a `curvature_fn` of
    a quarter of the batch needs less.

    Args:
      rho: radius ρ of SAM's part, as in `sam`.
      alpha: weight α ≥ 0 of the eigenvector's part, or a schedule; the paper tunes it
        over 0.05, 0.1 and 0.2.
      tracker: what keeps v up to date, see `eigensam_jax.trackers`.
      mask: as in `sam`. v and the Hessian are those of the perturbed parameters.
      axis_name: as in `sam`. Hessian-vector products are averaged as well.
      per_device: as in `sam`. The Hessian is still that of the whole batch. What the
        tracker observes is averaged, by a collective as large as a gradient.
      hvp_mode: how a tracker's Hessian-vector products are made, see
        `hessian.matvec`. The default is the fastest; the others are for kernels that
        lack its derivatives. The secant makes none.
      eigenvector_dtype: the dtype in which the tracker's vectors are stored,
        stochastically rounded; None is float32, or the parameters' if wider.
        `jnp.bfloat16` halves their memory; sums with them stay in float32.

    Returns:
      As `sam`. `update` takes two more keyword arguments. `curvature_fn`:
      params -> scalar, the loss whose Hessian is tracked, if another one, by trackers
      that make products; the secant follows the gradients. `refresh`: a Python bool
      that fixes at trace time whether the tracker does what it does every
      `update_interval` steps, so that the program has no branch. Give it
      `step % update_interval == 0`, where `step` counts the perturbed steps; False on
      every step never refreshes. `info(opt_state)` reports the last step, and
      `optax.tree.get(opt_state, "eigenvector")` is v.

    Example:
      >>> import eigensam_jax, jax, jax.numpy as jnp, optax
      >>> paper = eigensam_jax.trackers.power_iteration()
      >>> tx = optax.chain(eigensam_jax.eigen_sam(0.1, 0.2, paper), optax.sgd(0.1))
      >>> w, loss = jnp.array([1.0, 0.1]), lambda w: w[0] ** 2 + 3 * w[1] ** 2
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
    """The value at this step; 0 if it is negative or non-finite."""
    now = jnp.asarray(value(count) if callable(value) else value)
    if now.shape != ():
        raise ValueError(
            f"{name} must be a scalar at each step, got the shape {now.shape}: return "
            "one number from the schedule."
        )
    return jnp.where((now > 0) & jnp.isfinite(now), now, 0)
