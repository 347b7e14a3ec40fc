"""A convolution of each channel by itself, quick on CPUs too."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp


class Depthwise(nn.Module):
    """A convolution of each channel by itself.

    On a CPU it is a sum over the places of the kernel, for XLA's convolution in groups
    takes many times as long there, above all its derivatives. Gradients can be pushed
    forward, for products with the Hessian, but the values can't, for `jax.custom_vjp`
    has no forward mode. The kernel is of the shape that `nn.Conv` would give it.

    Attributes:
      size: of the kernel.
      stride: between the places of the output.
    """

    size: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Shape (batch, height/stride, width/stride, channels), rounded up."""
        shape = (self.size, self.size, 1, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        result: jax.Array = jax.lax.platform_dependent(
            *(x, kernel),
            cpu=lambda x, kernel: _depthwise(x, kernel[:, :, 0], self.stride),
            default=lambda x, kernel: jax.lax.conv_general_dilated(
                *(x, kernel, (self.stride, self.stride), "SAME"),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=x.shape[-1],
            ),
        )
        return result


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return _forward(x, kernel, stride)[0]


def _forward(
    x: jax.Array, kernel: jax.Array, stride: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    pads = _pads(x.shape, len(kernel), stride)
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    return _over_places(padded, kernel, stride), (x, kernel)


def _backward(
    stride: int, saved: tuple[jax.Array, jax.Array], back: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Two more sums over the places of the kernel.

    The transpose that JAX would make adds a padded array for each place, and XLA's sums
    over all but the last axis take many times longer than one image after the other.
    """
    x, kernel = saved
    size = len(kernel)
    back = jax.lax.optimization_barrier(back)  # type: ignore[no-untyped-call]
    pads = _pads(x.shape, size, stride)
    edges = [
        (size - 1 - low, side + low - (places - 1) * stride - 1, stride - 1)
        for (low, _), side, places in zip(
            pads, x.shape[1:3], back.shape[1:3], strict=True
        )
    ]
    none = (0, 0, 0)
    spread = jax.lax.pad(back, jnp.zeros((), back.dtype), (none, *edges, none))
    to_x = _over_places(spread, kernel[::-1, ::-1], 1)

    def add(
        totals: list[jax.Array], image: tuple[jax.Array, jax.Array]
    ) -> tuple[list[jax.Array], None]:
        seen = _seen(image[0], size, stride)
        return [t + s * image[1] for t, s in zip(totals, seen, strict=True)], None

    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    totals = [jnp.zeros(back.shape[1:], back.dtype)] * size**2
    totals, _ = jax.lax.scan(add, totals, (padded, back))
    to_kernel = jnp.stack([total.sum((0, 1)) for total in totals])
    return to_x, to_kernel.reshape(kernel.shape)


_depthwise.defvjp(_forward, _backward)


def _pads(shape: tuple[int, ...], size: int, stride: int) -> list[tuple[int, int]]:
    """What "SAME" adds above and below, left and right."""
    pads = jax.lax.padtype_to_pads(shape[1:3], (size, size), (stride, stride), "SAME")
    return list(pads)


def _over_places(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """The sum over the places of the kernel of what each sees, times its element."""
    # Else XLA makes x anew for each place.
    x = jax.lax.optimization_barrier(x)  # type: ignore[no-untyped-call]
    rows = kernel.reshape(-1, kernel.shape[-1])
    products = map(jnp.multiply, _seen(x, len(kernel), stride), rows)
    total: jax.Array = sum(products, jnp.zeros((), x.dtype))
    return total


def _seen(x: jax.Array, size: int, stride: int) -> list[jax.Array]:
    """What each place of the kernel sees of x, of shape (..., height, width, channels).

    From the first place that an element of the kernel sees to its last.
    """
    height, width = ((n - size) // stride * stride + 1 for n in x.shape[-3:-1])
    return [
        x[..., i : i + height : stride, j : j + width : stride, :]
        for i in range(size)
        for j in range(size)
    ]
