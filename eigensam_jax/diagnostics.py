"""Diagnostics of a training run: sharpness, alignment, a check of the gradient."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from eigensam_jax import eigen, hessian, tree_math
from eigensam_jax._update import arguments, masking, programs
from eigensam_jax._update.masking import Mask
from eigensam_jax.eigen import Eigenpair
from eigensam_jax.hessian import GradFn, HvpMode, ValueFn
from eigensam_jax.tree_math import PyTree

_READING = (
    "A cosine of 1 or -1 means the gradient times a factor (a scaled loss, a sum in "
    "place of a mean, a link before this one), another cosine another vector (another "
    "batch, dropout mask or params, or weight decay, momentum or noise before this "
    "link), and inf or nan that one of both is zero or not finite."
)


def sharpness(
    value_fn: ValueFn,
    params: PyTree,
    *,
    mask: Mask = None,
    tol: ArrayLike = 1e-3,
    max_matvecs: int = 1000,
    v0: PyTree | None = None,
    hvp_mode: HvpMode = "forward_over_reverse",
    host_loop: bool | None = None,
) -> Eigenpair:
    """Sharpness λ_max of the Hessian ∇²f(w), its algebraically largest eigenvalue.

    Found by `eigen.top_eigenpairs`, with about ten Hessian-vector products. Call it
    outside `jit`: on a CPU it then loops in Python around one product, compiled once
    per `value_fn` object and traced at each call, so that the batch in its closure may
    change. Inside `jit`, convolutions are many times slower on a CPU. For a data set or
    the Gauss–Newton matrix, call the solver:

        matvec = hessian.mean_matvec(loss, params, batches)
        eigen.top_eigenpairs(matvec, params, k=1, host_loop=callable(batches))

    Args:
      value_fn: f, a function of the parameters alone that returns a real scalar.
      params: w, a tree of real arrays.
      mask: as in `sam`, for λ_max of a block of the Hessian, such as a layer's.
      tol, max_matvecs: as in `eigen.top_eigenpairs`.
      v0: the start, such as the v of Eigen-SAM or of the last call; by default random.
      hvp_mode: as in `hessian.matvec`. "finite_difference" never reaches a `tol` below
        its errors.
      host_loop: True loops in Python around a compiled product and cannot be jitted;
        False loops inside the program. None is True outside `jit` on a CPU.

    Returns:
      One `eigen.Eigenpair`. Its residual is at most `tol`·|λ_max| unless `max_matvecs`
      ran out or rounding prevents it. NaN if a product is non-finite.

    Raises:
      ValueError: for an invalid argument.

    Example:
      >>> import eigensam_jax, jax.numpy as jnp
      >>> f, w = lambda w: w[0] ** 2 - 5 * w[1] ** 2, jnp.array([3.0, 0.0])
      >>> print(f"{eigensam_jax.sharpness(f, w).eigenvalue:.3f}")  # the other is -10
      2.000

    References:
      Cohen, Kaur, Li, Kolter, Talwalkar, "Gradient Descent on Neural Networks Typically
      Occurs at the Edge of Stability", ICLR 2021.
    """
    what, remedy = "a function of the parameters", ": call sharpness(value_fn, params)"
    arguments.require(callable(value_fn), "value_fn", value_fn, what, remedy)
    arguments.check_params(params)
    arguments.check_choice("hvp_mode", hvp_mode, hessian.HVP_MODES)
    gradient = jax.grad(arguments.scalar_valued("value_fn", value_fn))

    space = masking.subspace(mask, params)

    def product(params: PyTree, vector: list[jax.Array]) -> list[jax.Array]:
        """That of the block: vectors are lists of the leaves that `mask` selects."""
        of_block = lambda w: space.select(gradient(space.merge(w, params)))
        block = space.select(params)
        along: list[jax.Array] = hessian.matvec(of_block, block, hvp_mode=hvp_mode)(
            vector
        )
        return along

    like = space.select(params)
    is_traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(params))
    if host_loop is None:
        host_loop = jax.default_backend() == "cpu" and not is_traced
    run = product
    if host_loop:
        known = programs.compiled(value_fn, product, params, tree_math.widen(like))
        host_loop, run = known is not None, known or product
    if v0 is not None:
        v0 = arguments.like_params("v0", v0, params, "Start from a tree like params.")
        v0 = space.select(v0)
    pairs = eigen.top_eigenpairs(
        lambda vector: run(params, vector),
        like,
        k=1,
        tol=tol,
        max_matvecs=max_matvecs,
        v0=v0,
        host_loop=host_loop,
    )
    top = Eigenpair(*jax.tree.map(lambda x: x[0], pairs))
    return top._replace(eigenvector=space.embed(top.eigenvector, params))


def alignment(a: PyTree, b: PyTree) -> jax.Array:
    """Alignment |⟨a, b⟩|/(‖a‖·‖b‖) of two trees, between 0 and 1; 0 if either is zero.

    Args:
      a, b: trees of real arrays, of the same structure and shapes.

    Example:
      >>> import eigensam_jax, jax.numpy as jnp
      >>> a, b = {"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([-5.0, 0.0])}
      >>> print(f"{eigensam_jax.diagnostics.alignment(a, b):.3f}")
      0.600
    """
    return jnp.abs(_cosine(a, b))


def _cosine(a: PyTree, b: PyTree) -> jax.Array:
    inverses = [tree_math.safe_inverse(tree_math.norm(x)) for x in (a, b)]
    a, b = map(tree_math.scale, inverses, (a, b))
    return jnp.clip(tree_math.vdot(a, b), -1, 1)


def check_gradient(
    updates: PyTree,
    params: PyTree,
    *,
    value_fn: ValueFn | None = None,
    grad_fn: GradFn | None = None,
    rtol: float | None = None,
) -> float:
    """Checks that `updates` are the gradient ∇f(w), as the links assume.

    Another batch, dropout mask or scaling, or a link before them in the chain, makes
    them something else without an error. Call this once, outside `jit`, with the
    arguments of `tx.update`, or with the output of the link before.

    Args:
      updates: a tree like `params`.
      params: w, a tree of real floating-point arrays.
      value_fn, grad_fn: as in `update`, see `sam`.
      rtol: the largest relative difference that passes: compiled programs round
        differently. Default 1e-3, or 0.03 if a leaf of `updates` or `params` is
        narrower than float32. Give 0.03 too if the loss computes in bfloat16.

    Returns:
      The relative difference ‖u − g‖/‖g‖ between the updates u and the gradient g.

    Raises:
      ValueError: if it exceeds `rtol`, with the cosine, the ratio of the norms and the
        leaf that differs most; if an argument does not fit or is traced.

    Example:
      >>> import eigensam_jax, jax, jax.numpy as jnp
      >>> f, w = lambda w: jnp.sum(w**2), jnp.array([3.0, 4.0])
      >>> eigensam_jax.diagnostics.check_gradient(jax.grad(f)(w), w, value_fn=f)
      0.0
    """
    arguments.check_params(params)
    if value_fn is None and grad_fn is None:
        raise ValueError(
            "check_gradient needs value_fn or grad_fn, got neither: give the one that "
            "you give tx.update."
        )
    updates = arguments.like_params(
        "updates", updates, params, "Give what you give tx.update."
    )
    if rtol is None:
        leaves = jax.tree.leaves((updates, params))
        narrow = any(jnp.result_type(x).itemsize < 4 for x in leaves)
        rtol = 0.03 if narrow else 1e-3
    arguments.check_scalar("rtol", rtol, schedule=False)
    _check_values(updates, params)
    _, gradient = arguments.gradient_function(value_fn, grad_fn)(params)
    _check_values(gradient)
    difference = tree_math.add_scaled(updates, -1, gradient)
    distance, size, expected = (
        float(tree_math.norm(x)) for x in (difference, updates, gradient)
    )
    inf = float("inf")
    relative = distance / expected if expected else inf if distance else 0.0
    if relative <= rtol:
        return relative
    path, _ = max(
        jax.tree.leaves_with_path(difference),
        key=lambda x: jnp.nan_to_num(tree_math.norm(x[1]), nan=jnp.inf),
    )
    raise ValueError(
        f"updates are not the gradient of {'grad_fn' if grad_fn else 'value_fn'} at "
        f"params: relative difference {relative:.3g}, cosine "
        f"{float(_cosine(updates, gradient)):.3g}, ratio of norms "
        f"{size / expected if expected else inf:.3g}; the leaf that differs most is "
        f"updates{jax.tree_util.keystr(path)}. {_READING}"
    )


def _check_values(*trees: PyTree) -> None:
    unknown = (jax.core.Tracer, jax.ShapeDtypeStruct)
    if any(isinstance(x, unknown) for x in jax.tree.leaves(trees)):
        raise ValueError(
            "check_gradient needs values, got traced arrays or shapes: call it once, "
            "outside jit and eval_shape."
        )
