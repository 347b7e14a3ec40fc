"""Whether two trees point the same way, and whether updates are the gradient."""

import jax
import jax.numpy as jnp

from eigensam_jax import tree_math
from eigensam_jax._update import arguments, functions
from eigensam_jax.tree_math import GradFn, PyTree, ValueFn

_READING = (
    "A cosine of 1 or -1 means the gradient times a factor (a scaled loss, a sum in "
    "place of a mean, a link before this one), another cosine another vector (another "
    "batch, dropout mask or params, or weight decay, momentum or noise before this "
    "link), and inf or nan that one of both is zero or not finite."
)


def alignment(a: PyTree, b: PyTree) -> jax.Array:
    """Alignment |⟨a, b⟩|/(‖a‖·‖b‖) of two trees, between 0 and 1; 0 if either is zero.

    Args:
      a, b: trees of real arrays with the same names and shapes. Their containers may
        differ, such as those of a Flax nnx model and of its optimizer's state.

    Raises:
      ValueError: if names or shapes differ.

    Example:
      >>> import eigensam_jax, jax.numpy as jnp
      >>> a, b = {"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([-5.0, 0.0])}
      >>> print(f"{eigensam_jax.diagnostics.alignment(a, b):.3f}")
      0.600
    """
    remedy = "Take the alignment of trees of the same parameters."
    return jnp.abs(_cosine(a, arguments.like_params("b", b, a, remedy)))


def _cosine(a: PyTree, b: PyTree) -> jax.Array:
    (a, _), (b, _) = map(tree_math.unit, (a, b))
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
    _, gradient = functions.gradient_function(value_fn, grad_fn)(params)
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
