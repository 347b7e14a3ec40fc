"""λ_max of the Hessian of a loss."""

from functools import partial
from typing import NamedTuple

import jax
from jax.typing import ArrayLike

from eigensam_jax import eigen, hessian, tree_math
from eigensam_jax._update import arguments, functions, masking, programs
from eigensam_jax._update.masking import Mask, Subspace
from eigensam_jax.eigen import Eigenpair, _krylov
from eigensam_jax.hessian import HvpMode, Matvec
from eigensam_jax.tree_math import PyTree, ValueFn


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

        matvec = hessian.mean_matvec(loss, params, [batch, ...])  # or a loader
        eigen.top_eigenpairs(matvec, params, k=1, host_loop=True)

    Args:
      value_fn: f, a function of the parameters alone that returns a real scalar.
      params: w, a tree of real arrays: of an nnx model `nnx.state(model, nnx.Param)`,
        of linen's variables those of "params". Running statistics would count too.
      mask: as in `sam`, for λ_max of a block of the Hessian, such as a layer's.
      tol, max_matvecs: as in `eigen.top_eigenpairs`.
      v0: the start, such as the v of Eigen-SAM; by default random. It saves nothing: at
        least 20 products are made, as it may be near an unwanted eigenvector.
      hvp_mode: as in `hessian.matvec`. "finite_difference" never reaches a `tol` below
        its errors.
      host_loop: True loops in Python around a compiled product and cannot be jitted;
        False loops inside the program, which each call outside `jit` compiles anew.
        None is True outside `jit` on a CPU.

    Returns:
      One `eigen.Eigenpair`. Its residual is at most `tol`·|λ_max| unless `max_matvecs`
      ran out or rounding prevents it. It does not see the rounding of products: compute
      the loss in float32 at least. NaN if a product is non-finite.

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
    of_mask = block(value_fn, params, mask, hvp_mode, host_loop)
    if v0 is not None:
        v0 = arguments.like_params("v0", v0, params, "Start from a tree like params.")
        v0 = of_mask.space.select(v0)
    top = of_mask.top_eigenpair(tol, max_matvecs, v0)
    return top._replace(eigenvector=of_mask.space.embed(top.eigenvector, params))


class Block(NamedTuple):
    """The block of the Hessian that a mask selects.

    Attributes:
      space: its leaves among the parameters.
      host_loop: whether to loop in Python.
      matvec: the product with it.
      like: zeros like the vectors, a list of leaves.
    """

    space: Subspace
    host_loop: bool
    matvec: Matvec
    like: list[jax.Array]

    def top_eigenpair(
        self, tol: ArrayLike, max_matvecs: int, v0: PyTree | None = None
    ) -> Eigenpair:
        """By `eigen.top_eigenpairs`; the eigenvector is a list of leaves."""
        pairs = eigen.top_eigenpairs(
            self.matvec,
            self.like,
            k=1,
            tol=tol,
            max_matvecs=max_matvecs,
            v0=v0,
            host_loop=self.host_loop,
        )
        first: Eigenpair = programs.jitted(self.host_loop, _krylov.get)(pairs, 0)
        return first

    def of_mask(self, mask: Mask, params: PyTree) -> "Block":
        """A block within this one, that of all parameters, by the same program."""
        space = masking.subspace(mask, params)
        whole = self.space.treedef.unflatten(self.like)

        def matvec(vector: list[jax.Array]) -> list[jax.Array]:
            leaves = jax.tree.leaves(space.merge(vector, whole))
            return space.select(self.space.treedef.unflatten(self.matvec(leaves)))

        return Block(space, self.host_loop, matvec, space.select(whole))


def block(
    value_fn: ValueFn,
    params: PyTree,
    mask: Mask,
    hvp_mode: HvpMode,
    host_loop: bool | None,
) -> Block:
    """The block of the Hessian that `mask` selects; for `host_loop` see `sharpness`."""
    what, remedy = "a function of the parameters", ": hand in value_fn, params"
    arguments.require(callable(value_fn), "value_fn", value_fn, what, remedy)
    space = masking.subspace(mask, params)
    arguments.check_params(params, space.selected)
    like = tree_math.zeros_like(space.select(params))
    if not any(x.size for x in like):
        raise ValueError(
            "params must have an entry that mask selects, got none: the Hessian has no "
            "rows."
        )
    arguments.check_choice("hvp_mode", hvp_mode, hessian.HVP_MODES)
    gradient = jax.grad(functions.differentiable("value_fn", value_fn))

    def product(params: PyTree, vector: list[jax.Array]) -> list[jax.Array]:
        of_block = lambda w: space.select(gradient(space.merge(w, params)))
        matvec = hessian.matvec(of_block, space.select(params), hvp_mode=hvp_mode)
        along: list[jax.Array] = matvec(vector)
        return along

    by_host, run = programs.host_loop_of(host_loop, value_fn, product, params, like)
    weights = programs.on_device(params) if by_host else params
    return Block(space, by_host, partial(run, weights), like)


def sharpness_by_layer(
    value_fn: ValueFn,
    params: PyTree,
    *,
    tol: ArrayLike = 1e-3,
    max_matvecs: int = 1000,
    hvp_mode: HvpMode = "forward_over_reverse",
    host_loop: bool | None = None,
) -> dict[str, Eigenpair]:
    """Sharpness λ_max of each layer: that of its diagonal block of the Hessian.

    A layer is what `params` holds together: leaves whose names differ in the last part
    alone, such as "encoder/attention/kernel" and "encoder/attention/bias". A leaf at
    the top level is a layer of its own, and one without entries is left out.

    Args:
      value_fn, params, tol, max_matvecs, hvp_mode, host_loop: as in `sharpness`, for
        each layer.

    Returns:
      From the name of each layer, in the order of `params`, to its `Eigenpair`, whose
      eigenvector is a list of the leaves of that layer. No λ_max of a block is larger
      than that of the whole Hessian.

    Raises:
      ValueError: as `sharpness`.

    Example:
      >>> import jax.numpy as jnp
      >>> from eigensam_jax import diagnostics
      >>> f = lambda p: jnp.sum(p["a"]["w"] ** 2) + 3 * jnp.sum(p["b"]["w"] ** 2)
      >>> params = {"a": {"w": jnp.ones(2)}, "b": {"w": jnp.ones(3)}}
      >>> for name, top in diagnostics.sharpness_by_layer(f, params).items():
      ...     print(name, f"{top.eigenvalue:.2f}")
      a 2.00
      b 6.00

    References:
      Zhang, Bengio, Singer, "Are All Layers Created Equal?", JMLR 2022.
    """
    whole = block(value_fn, params, None, hvp_mode, host_loop)
    return {
        name: whole.of_mask(mask, params).top_eigenpair(tol, max_matvecs)
        for name, mask in masking.layers(params).items()
    }
