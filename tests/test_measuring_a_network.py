"""The report on a network, against the dense Hessian and the single measures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from problems import dense_hessian, flatten, network

from eigensam_jax import diagnostics, hessian


def test_a_report_is_that_of_the_dense_hessian():
    params, loss = network()
    dense = np.asarray(dense_hessian(loss, params))
    found = diagnostics.report(loss, params, rho=0.1, num_matvecs=400)
    values, vectors = np.linalg.eigh(dense)
    np.testing.assert_allclose(found.value, loss(params), rtol=1e-6)
    slope = flatten(jax.grad(loss)(params))
    np.testing.assert_allclose(found.grad_norm, np.linalg.norm(slope), rtol=1e-5)
    np.testing.assert_allclose(found.top.eigenvalue, values[-1], rtol=1e-4)
    cosine = flatten(found.top.eigenvector) @ vectors[:, -1]
    np.testing.assert_allclose(abs(cosine), 1, atol=1e-4)
    assert abs(found.trace.value - values.sum()) <= 3 * found.trace.standard_error
    for top, layer in zip(
        found.layers.values(), (slice(0, 30), slice(30, 48)), strict=True
    ):
        expected = np.linalg.eigvalsh(dense[layer, layer])[-1]
        np.testing.assert_allclose(top.eigenvalue, expected, rtol=1e-3)
    alone = diagnostics.sam_sharpness(loss, params, 0.1)
    np.testing.assert_allclose(found.sam, alone, rtol=1e-6)
    assert found.average.value < found.sam <= found.worst_case.value
    assert found.worst_case.value <= 0.1 * found.grad_norm + 0.006 * values[-1]


def test_the_balls_of_a_report_are_those_of_its_radius_and_seed():
    params, loss = network()
    first, second = (
        diagnostics.report(loss, params, rho=0.1, num_matvecs=8, seed=seed)
        for seed in (0, 1)
    )
    for seed, found in enumerate((first, second)):
        own = diagnostics.average_sharpness(loss, params, 0.1, seed=seed)
        np.testing.assert_allclose(found.average, own, rtol=1e-5)
    assert first.average.value != second.average.value
    assert first.trace.value != second.trace.value


@pytest.mark.parametrize(("budget", "names"), [(8, []), (60, ["hidden", "out"])])
def test_a_report_keeps_to_its_budget(budget, names, monkeypatch):
    """Products are counted where they are made: outside of any program."""
    params, loss = network()
    made = []
    real = hessian.matvec

    def counting(*args, **kwargs):
        product = real(*args, **kwargs)

        def counted(vector):
            jax.debug.callback(lambda: made.append(1))
            return product(vector)

        return counted

    monkeypatch.setattr(hessian, "matvec", counting)
    found = diagnostics.report(loss, params, num_matvecs=budget)
    jax.effects_barrier()
    assert len(made) == found.num_matvecs <= budget
    assert [*found.layers] == names
    assert found.layers_left_out == 2 - len(names)
    said = "λ_max of 2 layers left out: give more num_matvecs"
    assert (said in str(found)) == (not names)


def test_a_report_reads_as_a_table():
    params, loss = network()
    lines = str(diagnostics.report(loss, params, rho=0.1)).splitlines()
    assert lines[0].split() == ["loss", f"{loss(params):.4g}"]
    assert [line for line in lines if line.startswith("λ_max of hidden ")]
    widths = {line.index(line.split()[-1]) for line in lines[:2]}
    assert len(widths) == 1
    assert "nan" not in str(lines)


def test_what_can_not_be_reported():
    params, loss = network()
    with pytest.raises(ValueError, match="must be") as error:
        diagnostics.report(params, loss)
    assert len(str(error.value)) < 200  # the weights are not in it
    for mask in (nnx.Param, ...):
        with pytest.raises(ValueError, match="mask must not be"):
            diagnostics.sharpness(loss, params, mask=mask)
    with pytest.raises(ValueError, match=r"num_matvecs must be at least 8, got 7"):
        diagnostics.report(loss, params, num_matvecs=7)
    untouched = lambda params: pytest.fail("it was called")
    with pytest.raises(ValueError, match=r"rho must be .* got -1"):
        diagnostics.report(untouched, params, rho=-1)
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda p: diagnostics.report(loss, p).value)(params)
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda x: diagnostics.report(lambda w: jnp.sum(x * w**2), x).value)(
            jnp.ones(3)
        )
    with pytest.raises(ValueError, match=r"hvp_mode must be one of .* 'reverse'"):
        diagnostics.report(loss, params, hvp_mode="reverse")
