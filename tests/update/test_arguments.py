"""What users hand in: what a gradient function may return, and dtypes for v."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eigensam_jax import eigen_sam, hessian
from eigensam_jax._update import arguments, functions


class Pair(NamedTuple):
    bias: jax.Array
    rest: dict


PARAMS = {
    "dict": {"b": jnp.ones(()), "w": jnp.arange(3.0)},
    "array": jnp.arange(3.0),
    "scalar": jnp.ones(()),
    "pair like (value, gradient)": (jnp.ones(()), jnp.arange(3.0)),
    "pair of a scalar and a pair": (jnp.ones(()), (jnp.ones(()), jnp.arange(3.0))),
    "two scalars": (jnp.ones(()), jnp.ones(())),
    "list": [jnp.ones(()), {"w": jnp.arange(3.0)}],
    "namedtuple": Pair(jnp.ones(()), {"w": jnp.arange(3.0)}),
    "empty": (),
}


def value_fn(params):
    return sum(
        (jnp.sum((x + 1) ** 3) for x in jax.tree.leaves(params)), start=jnp.ones(())
    )


@pytest.mark.parametrize("name", PARAMS)
def test_a_gradient_and_a_pair_are_told_apart(name):
    params = PARAMS[name]
    gradient = jax.grad(value_fn)
    expected = jax.tree.map(lambda x: 3 * (x + 1) ** 2, params)
    alone = functions.gradient_function(None, gradient)(params)
    chex.assert_trees_all_close(alone, (jnp.zeros(()), expected))
    # With the value, as a pair of any kind, and as a Python number too.
    for value, grad_fn in (
        (value_fn(params), jax.value_and_grad(value_fn)),
        (value_fn(params), lambda p: [value_fn(p), gradient(p)]),
        (2.5, lambda p: (2.5, gradient(p))),
    ):
        pair = functions.gradient_function(None, grad_fn)(params)
        chex.assert_trees_all_close(pair, (jnp.asarray(value), expected))
        assert isinstance(pair[0], jax.Array)
        chex.assert_trees_all_equal_structs(pair[1], params)


@pytest.mark.parametrize("name", PARAMS)
def test_what_is_neither_is_refused(name):
    params, gradient = PARAMS[name], jax.grad(value_fn)
    for grad_fn in (
        lambda p: ((value_fn(p), 1.0), gradient(p)),  # has_aux=True
        lambda p: (jnp.ones(2), gradient(p)),
        lambda p: (gradient(p), value_fn(p), None, "aux"),
        lambda p: (value_fn(p), (gradient(p), jnp.ones(7))),
    ):
        with pytest.raises(ValueError, match=r"Return the gradient, or \(value, grad"):
            functions.gradient_function(None, grad_fn)(params)


def test_the_hessian_of_a_function_that_returns_both():
    params = PARAMS["dict"]
    made = functions.gradient_function(None, jax.value_and_grad(value_fn))
    product = hessian.matvec(lambda p: made(p)[1], params)(params)
    expected = jax.tree.map(lambda x: 6 * (x + 1) * x, params)
    chex.assert_trees_all_close(product, expected)


@pytest.mark.parametrize(
    "dtype",
    [
        *(jnp.float8_e4m3fn, "float8_e5m2", jnp.float4_e2m1fn),
        *(jnp.int16, jnp.int32, jnp.complex64, "narrow"),
    ],
)
def test_a_dtype_too_narrow_for_the_eigenvector_is_refused(dtype):
    with pytest.raises(ValueError, match=r"eigenvector_dtype .* 16 bits or more, got"):
        eigen_sam(eigenvector_dtype=dtype)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, "float16", np.float32])
def test_a_dtype_wide_enough_passes(dtype):
    eigen_sam(eigenvector_dtype=dtype)


def test_a_dtype_that_jax_would_narrow_is_refused():
    with pytest.raises(ValueError, match=r"eigenvector_dtype .*float64.*enable_x64"):
        eigen_sam(eigenvector_dtype=jnp.float64)
    with jax.enable_x64(True):
        eigen_sam(eigenvector_dtype=jnp.float64)


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "3", None, jnp.ones(())])
def test_a_count_is_a_positive_integer(value):
    with pytest.raises(ValueError, match=r"n must be an integer of at least 1, got"):
        arguments.check_positive_int("n", value, "products")
    arguments.check_positive_int("n", np.int32(3), "products")


@pytest.mark.parametrize("value", [1, 1.5, -0.1, True, False, "0.5", None, np.nan])
def test_a_fraction_is_below_1(value):
    with pytest.raises(ValueError, match=r"x must be a number of at least 0 and less"):
        arguments.check_fraction("x", value)
    for right in (0, 0.5, np.float32(0.9)):
        arguments.check_fraction("x", right)


def test_a_choice_is_one_of_those_named():
    with pytest.raises(ValueError, match=r"mode must be one of \('a', 'b'\), got 'c'"):
        arguments.check_choice("mode", "c", ("a", "b"))
    arguments.check_choice("mode", "a", ("a", "b"))
