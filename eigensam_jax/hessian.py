"""Matrix-free products with the Hessian and the Gauss–Newton matrix.

A product is a tree like the parameters, in float32 or the leaf's dtype if wider. An
unknown `hvp_mode`, unusable batches, and a loss that is no scalar or ignores its
argument raise a ValueError.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from eigensam_jax import tree_math
from eigensam_jax._update import arguments, functions, programs
from eigensam_jax.tree_math import GradFn, PyTree, ValueFn

Matvec = Callable[[PyTree], PyTree]
HvpMode = Literal["forward_over_reverse", "reverse_over_reverse", "finite_difference"]
HVP_MODES: tuple[HvpMode, ...] = get_args(HvpMode)


def hvp(
    value_fn: ValueFn,
    params: PyTree,
    vector: PyTree,
    *,
    hvp_mode: HvpMode = "forward_over_reverse",
) -> PyTree:
    """Hessian-vector product ∇²f(w)·v = ∂/∂t ∇f(w + t·v) at t = 0.

    Args:
      value_fn: f, a function of the parameters alone that returns a real scalar.
      params, vector: w and v, trees of real arrays; v is cast to the dtypes of w.
      hvp_mode: how the gradient is differentiated, see `matvec`.

    Example:
      >>> import eigensam_jax, jax.numpy as jnp
      >>> f = lambda w: w[0] ** 2 * w[1]
      >>> eigensam_jax.hessian.hvp(f, jnp.array([1.0, 3.0]), jnp.array([1.0, 0.0]))
      Array([6., 2.], dtype=float32)

    References:
      Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 1994.
    """
    gradient = jax.grad(functions.differentiable("value_fn", value_fn))
    return matvec(gradient, params, hvp_mode=hvp_mode)(vector)


def matvec(
    grad_fn: GradFn, params: PyTree, *, hvp_mode: HvpMode = "forward_over_reverse"
) -> Matvec:
    """Builds v ↦ ∇²f(w)·v from the gradient function of f, for the solvers of `eigen`.

    Each call differentiates anew: a linearisation would hold all activations between
    products. "forward_over_reverse" is the `jax.jvp` of the gradient, for about the
    operations and memory of two gradients. "reverse_over_reverse" is its `jax.vjp`,
    equal since H is symmetric, for kernels whose custom backward pass is itself a
    `jax.custom_vjp` and so has no forward derivative. It is as fast on dense networks
    and several times slower on convolutional ones. "finite_difference", two gradients,
    is for kernels without a second derivative:

        Hv ≈ ‖v‖·(∇f(w + h·v/‖v‖) − ∇f(w − h·v/‖v‖))/(2h),   h = eps^⅓,

    with eps that of the coarsest dtype in `params` and errors of about
    eps·(‖∇f‖ + ‖H‖·‖w‖)/h + h². It is unreliable in bfloat16, and with ReLU, where the
    gradient jumps.

    Args:
      grad_fn: ∇f, a function of the parameters alone, such as `jax.grad(value_fn)`.
      params: w, a tree of real arrays.
      hvp_mode: "forward_over_reverse", "reverse_over_reverse" or "finite_difference".

    Example:
      >>> import eigensam_jax, jax, jax.numpy as jnp
      >>> cube, w = (lambda w: w**3), jnp.array(2.0)
      >>> float(eigensam_jax.hessian.matvec(jax.grad(cube), w)(jnp.array(1.0)))
      12.0
    """
    arguments.check_choice("hvp_mode", hvp_mode, HVP_MODES)

    def product(vector: PyTree) -> PyTree:
        if hvp_mode == "finite_difference":
            return _central_difference(grad_fn, params, vector)
        tangent = tree_math.cast_like(vector, params)
        with _noted():
            if hvp_mode == "forward_over_reverse":
                return tree_math.widen(jax.jvp(grad_fn, (params,), (tangent,))[1])
            grads, pullback = jax.vjp(grad_fn, params)
            return tree_math.widen(pullback(tree_math.cast_like(tangent, grads))[0])

    return product


@contextlib.contextmanager
def _noted() -> Iterator[None]:
    """Adds a remedy to JAX's error where an operation lacks a derivative."""
    try:
        yield
    except Exception as error:
        if re.search(r"differentia|autodiff|(?<!\.)\b(jvp|vjp)\b", str(error), re.I):
            error.add_note(
                "An operation of the loss can't be differentiated twice in this "
                "hvp_mode. 'reverse_over_reverse' needs no forward derivative, and "
                "'finite_difference' needs the gradient only. trackers.secant() makes "
                "no Hessian-vector products."
            )
        raise


def mean_matvec(
    value_fn: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batches: PyTree | Callable[[], Iterable[PyTree]],
    *,
    hvp_mode: HvpMode = "forward_over_reverse",
) -> Matvec:
    """Builds v ↦ Σ nᵢ ∇²fᵢ(w)·v / Σ nᵢ, the Hessian of a data set, batch by batch.

    fᵢ is the mean loss of batch i and nᵢ its number of examples. Only one batch at a
    time has its activations in memory.

    Args:
      value_fn: (params, batch) -> scalar, the mean loss over the batch.
      params: w, a tree of real arrays.
      batches: a tree of arrays with a leading axis over batches of one size, which is
        scanned. XLA's CPU backend runs convolutions many times slower there. Or batches
        of any sizes, gone through once per product: a list of them (each a tuple, dict
        or list), a loader that can be iterated over again, or a function that returns
        an iterable, such as `lambda: [a, b]`. They may stay on the host, nᵢ is the
        length of a batch's first leaf (1 for a scalar), and the product cannot be
        jitted: use `host_loop=True`.
      hvp_mode: how the gradient is differentiated, see `matvec`.

    Example:
      >>> import eigensam_jax, jax.numpy as jnp
      >>> f, x = (lambda w, x: jnp.mean(x) * w**2), jnp.array([1.0, 2.0, 3.0, 6.0])
      >>> w, batches = jnp.array(1.0), lambda: [x[:3], x[3:]]
      >>> float(eigensam_jax.hessian.mean_matvec(f, w, batches)(jnp.array(1.0)))
      6.0
    """
    arguments.check_choice("hvp_mode", hvp_mode, HVP_MODES)
    batches = _repeatable(batches)

    def add(
        total: PyTree, params: PyTree, vector: PyTree, batch: PyTree, weight: int
    ) -> PyTree:
        of_batch = functions.differentiable("value_fn", value_fn, (), batch)
        gradient = jax.grad(of_batch)
        product = matvec(gradient, params, hvp_mode=hvp_mode)(vector)
        return tree_math.add_scaled(total, weight, product)

    if not callable(batches):
        count = num_batches(batches)

        def scanned(vector: PyTree) -> PyTree:
            step = lambda total, batch: (add(total, params, vector, batch, 1), None)
            total, _ = jax.lax.scan(step, tree_math.zeros_like(params), batches)
            return tree_math.scale(1 / count, total)

        return scanned

    # The caller cannot jit this loop: one program for batches of one kind.
    params = programs.on_device(params)
    known: dict[Any, Callable[..., PyTree]] = {}

    def on_the_host(vector: PyTree) -> PyTree:
        if programs.is_traced(vector):
            raise ValueError(
                "a product with batches that stay on the host can't be traced: call it "
                "outside jit, by a solver with host_loop=True, or give arrays."
            )
        total, count = tree_math.zeros_like(params), 0
        for batch in batches():
            # Else dispatch runs ahead, with many batches on the device at once.
            jax.block_until_ready(total)  # type: ignore[no-untyped-call]
            first, *_ = (*jax.tree.leaves(batch), 0)
            weight = (*np.shape(first), 1)[0]
            given = (total, params, vector, batch, weight)
            kind = jax.tree.structure(given), *map(jax.typeof, jax.tree.leaves(given))
            if kind not in known:
                known[kind] = programs.compiled(value_fn, add, *given) or add
            total, count = known[kind](*given), count + weight
        if count == 0:
            raise ValueError(
                "batches() must return at least one batch each time it is called, got "
                "none: return a new iterator from each call, not an exhausted one."
            )
        return tree_math.scale(1 / count, total)

    return on_the_host


def _is_list(batches: Any) -> bool:
    """Whether it is a list of batches, not a tree of arrays that are stacked."""
    return isinstance(batches, list) and not jax.tree_util.all_leaves(batches)


def _repeatable(batches: Any) -> Any:
    """A list of batches, or a loader, as a function; all else as it is."""
    is_loader = jax.tree_util.all_leaves([batches]) and not hasattr(batches, "shape")
    is_loader &= isinstance(batches, Iterable) and not isinstance(batches, Iterator)
    is_loader &= not callable(batches)
    return (lambda: batches) if is_loader or _is_list(batches) else batches


def num_batches(batches: PyTree) -> int:
    """The common length of the leading axes of a tree of arrays, or a ValueError.

    Args:
      batches: the tree.
    """
    leaves = jax.tree.leaves(batches, is_leaf=lambda x: isinstance(x, Iterator))
    axes = {np.shape(x)[:1] for x in leaves}
    if _is_list(batches) or len(axes) != 1 or not axes.isdisjoint({(), (0,)}):
        raise ValueError(
            "batches must be a tree of arrays with one leading axis, over the batches, "
            f"got {type(batches).__name__} of leaves with the leading axes "
            f"{sorted(axes)}: stack batches of one size, as in "
            "jax.tree.map(lambda *x: jnp.stack(x), *batches). hessian.mean_matvec also "
            "takes a list of batches that are tuples or dicts, a loader, or a function "
            "that returns an iterable of batches: lambda: batches, where an iterator "
            "would be used up."
        )
    return int(axes.pop()[0])


def gauss_newton_matvec(
    predict_fn: Callable[[PyTree], PyTree],
    loss_fn: Callable[[PyTree], jax.Array],
    params: PyTree,
    *,
    hvp_mode: HvpMode = "forward_over_reverse",
) -> Matvec:
    """Builds v ↦ Jᵀ ∇²ℓ J v, the generalised Gauss–Newton matrix of ℓ(f(w)).

    With J the Jacobian of f at w, it is the Hessian less the model's curvature Σ ∂ℓ/∂fᵢ
    ∇²fᵢ: positive semidefinite if ℓ is convex in the outputs, and the Fisher
    information matrix for the cross entropy of logits.

    Args:
      predict_fn: f, from the parameters to the outputs, a tree of real arrays.
      loss_fn: ℓ, from the outputs to a scalar.
      params, hvp_mode: as in `matvec`; J v is made in that mode too.

    Example:
      >>> import eigensam_jax, jax.numpy as jnp
      >>> f, loss, w = (lambda w: w**2), (lambda y: jnp.sum(y**2)), jnp.ones(2)
      >>> eigensam_jax.hessian.gauss_newton_matvec(f, loss, w)(jnp.array([1.0, 2.0]))
      Array([ 8., 16.], dtype=float32)

    References:
      Schraudolph, "Fast curvature matrix-vector products for second-order gradient
      descent", Neural Computation 2002.
    """
    arguments.check_choice("hvp_mode", hvp_mode, HVP_MODES)

    def product(vector: PyTree) -> PyTree:
        direction = tree_math.cast_like(vector, params)
        with _noted():
            outputs, pullback = jax.vjp(predict_fn, params)
            if hvp_mode == "forward_over_reverse":
                tangent = jax.jvp(predict_fn, (params,), (direction,))[1]
            elif hvp_mode == "reverse_over_reverse":
                zeros = jax.tree.map(jnp.zeros_like, outputs)
                transposed = jax.vjp(lambda u: pullback(u)[0], zeros)[1]
                tangent = transposed(direction)[0]
            else:
                tangent = _central_difference(predict_fn, params, vector)
        gradient = jax.grad(functions.differentiable("loss_fn", loss_fn))
        inner = matvec(gradient, outputs, hvp_mode=hvp_mode)(tangent)
        return tree_math.widen(pullback(tree_math.cast_like(inner, outputs))[0])

    return product


def _central_difference(
    function: Callable[[PyTree], PyTree], params: PyTree, vector: PyTree
) -> PyTree:
    """‖v‖·(F(w + h·v/‖v‖) − F(w − h·v/‖v‖))/(2h), with h = eps^⅓; 0 for v = 0."""
    leaves = jax.tree.leaves(params)
    eps = [jnp.finfo(jnp.result_type(x)).eps for x in leaves]  # type: ignore[no-untyped-call]
    step = float(max(eps, default=1)) ** (1 / 3)
    direction, length = tree_math.unit(vector)

    def at(distance: float) -> PyTree:
        moved = tree_math.add_scaled(params, distance, direction)
        return function(tree_math.cast_like(moved, params))

    difference = tree_math.add_scaled(at(step), -1, at(-step))
    return tree_math.scale(length / (2 * step), difference)
