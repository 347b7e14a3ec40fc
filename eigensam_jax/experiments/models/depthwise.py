"""Depthwise convolution that is fast on CPUs too."""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class Depthwise(nn.Module):
    """A depthwise convolution, `size`×`size`, with a kernel of `nn.Conv`'s shape.

    On a CPU it is a sum over the kernel's elements: XLA's grouped convolutions, above
    all their derivatives, are many times slower there. `jax.jvp` applies to its
    gradient, as Hessian-vector products need, but not to its value: `jax.custom_vjp`
    has no forward mode.
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
            cpu=lambda x, kernel: _on_cpu(x, kernel[:, :, 0], self.stride),
            default=lambda x, kernel: jax.lax.conv_general_dilated(
                *(x, kernel, (self.stride, self.stride), "SAME"),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=x.shape[-1],
            ),
        )
        return result


class _Axis(NamedTuple):
    """How a kernel moves over one axis of the images.

    Attributes:
      side, size, stride: of the images, of the kernel and of its steps.
      places: the length of the output.
      low, high: zeros before and after the images.
    """

    side: int
    size: int
    stride: int
    places: int
    low: int
    high: int

    def seen(self, i: int) -> slice:
        """The part of the padded images that element i of the kernel multiplies."""
        return slice(i, i + (self.places - 1) * self.stride + 1, self.stride)

    def met(self, i: int) -> tuple[slice, slice]:
        """The parts of the images without zeros, and of the output, for element i."""
        first = max(0, -((i - self.low) // self.stride))
        last = min(self.places - 1, (self.side - 1 + self.low - i) // self.stride)
        start = first * self.stride + i - self.low
        end = start + (last - first) * self.stride + 1
        return slice(start, end, self.stride), slice(first, last + 1)


_Axes = tuple[_Axis, _Axis]


def _on_cpu(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """The "SAME" convolution, without kernel elements that meet only zeros."""
    sides, sizes, axes = x.shape[1:3], kernel.shape[:2], []
    pads = jax.lax.padtype_to_pads(sides, sizes, (stride, stride), "SAME")
    for k, (side, size, (low, _)) in enumerate(zip(sides, sizes, pads, strict=True)):
        places = -(-side // stride)
        last = (places - 1) * stride
        start, end = max(0, low - last), min(size, side + low)
        kernel = jax.lax.slice_in_dim(kernel, start, end, axis=k)
        high = max(0, last + end - side - low)
        axes.append(_Axis(side, end - start, stride, places, low - start, high))
    return _depthwise(x, kernel, (axes[0], axes[1]))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise(x: jax.Array, kernel: jax.Array, axes: _Axes) -> jax.Array:
    return _forward(x, kernel, axes)[0]


def _forward(
    x: jax.Array, kernel: jax.Array, axes: _Axes
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    padded = jnp.pad(x, ((0, 0), *((axis.low, axis.high) for axis in axes), (0, 0)))
    return _over_elements(padded, kernel, axes), (x, kernel)


def _backward(
    axes: _Axes, saved: tuple[jax.Array, jax.Array], back: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Two more sums, over the elements of the kernel and over the images.

    JAX's own transpose adds a padded array per element, and XLA's sums over all but the
    last axis are many times slower than a scan over images.
    """
    x, kernel = saved
    back = jax.lax.optimization_barrier(back)  # type: ignore[no-untyped-call]
    edges, dense = [], []
    for axis in axes:
        low = axis.size - 1 - axis.low
        high = axis.side + axis.low - (axis.places - 1) * axis.stride - 1
        edges.append((low, high, axis.stride - 1))
        dense.append(axis._replace(stride=1, places=axis.side))
    none = (0, 0, 0)
    spread = jax.lax.pad(back, jnp.zeros((), back.dtype), (none, *edges, none))
    to_x = _over_elements(spread, kernel[::-1, ::-1], (dense[0], dense[1]))

    met = [[axis.met(i) for i in range(axis.size)] for axis in axes]

    def products(image: jax.Array, back: jax.Array) -> list[jax.Array]:
        return [
            image[rows, columns] * back[to_rows, to_columns]
            for rows, to_rows in met[0]
            for columns, to_columns in met[1]
        ]

    def add(
        totals: list[jax.Array], pair: tuple[jax.Array, jax.Array]
    ) -> tuple[list[jax.Array], None]:
        return jax.tree.map(jnp.add, totals, products(*pair)), None

    shapes = jax.eval_shape(jax.vmap(products), x, back)
    totals = [jnp.zeros(shape.shape[1:], shape.dtype) for shape in shapes]
    totals, _ = jax.lax.scan(add, totals, (x, back))
    to_kernel = jnp.stack([total.sum((0, 1)) for total in totals])
    return to_x, to_kernel.reshape(kernel.shape)


_depthwise.defvjp(_forward, _backward)


def _over_elements(x: jax.Array, kernel: jax.Array, axes: _Axes) -> jax.Array:
    """Sums, over the kernel's elements, the element times the input that it meets."""
    # Else XLA recomputes x for each of them.
    x = jax.lax.optimization_barrier(x)  # type: ignore[no-untyped-call]
    rows, columns = axes
    total: jax.Array = sum(
        (
            x[:, rows.seen(i), columns.seen(j)] * kernel[i, j]
            for i in range(rows.size)
            for j in range(columns.size)
        ),
        jnp.zeros((), x.dtype),
    )
    return total
