"""What is drawn is what was handed in."""

import importlib
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

import eigensam_jax
from eigensam_jax import diagnostics, eigen, plotting
from eigensam_jax._info import StepInfo


@pytest.fixture(autouse=True)
def _drawn():
    """Each figure is drawn, without a warning, and closed."""
    plt.close("all")
    yield
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
    plt.close("all")


def texts(legend):
    return [x.get_text() for x in legend.get_texts()]


# --- the spectral density -------------------------------------------------------------

NODES = np.array([[-1.0, 0.0, 0.1, 7.0], [-0.5, 0.0, 0.2, 6.5]], np.float32)
WEIGHTS = np.array([[0.1, 0.2, 0.195, 0.005], [0.1, 0.2, 0.195, 0.005]], np.float32)
DENSITY = eigen.SpectralDensity(jnp.asarray(NODES), jnp.asarray(WEIGHTS))


def test_the_density_is_the_smooth_one_with_every_peak():
    for width in (0.001, 0.1):
        axes = plotting.spectral_density(DENSITY, width=width)
        (line,) = axes.lines
        x, y = line.get_data()
        np.testing.assert_allclose(
            y, eigen.smooth_density(DENSITY, x, width), rtol=1e-6
        )
        assert np.isin(NODES, x.astype(np.float32)).all()
        assert (x[0], x[-1]) == pytest.approx((-1 - 5 * width, 7 + 5 * width))
        low, high = axes.get_ylim()
        assert (axes.get_yscale(), axes.get_legend()) == ("log", None)
        assert 1e-7 * y.max() < low < y.max() < high


def test_a_single_eigenvalue_is_the_floor_and_the_top_ones_are_marked():
    tops = np.array([7.0, 6.5, 3.0])
    pairs = eigen.Eigenpair(None, jnp.asarray(tops), jnp.zeros(3))
    for given in (tops, pairs):
        axes = plotting.spectral_density(
            DENSITY, eigenvalues=given, num_params=1000, width=0.1
        )
        line, floor, marks = axes.lines
        height = 1 / 1000 / (0.1 * np.sqrt(2 * np.pi))
        np.testing.assert_allclose(floor.get_ydata(), height)
        assert height / 10 < axes.get_ylim()[0] < height
        np.testing.assert_array_equal(marks.get_xdata(), tops)
        curve = np.interp(tops, *line.get_data())
        assert (marks.get_ydata() > curve).all()
        assert texts(axes.get_legend()) == [
            *("density", "height of one eigenvalue in 1,000", "top 3 eigenvalues")
        ]


def test_the_default_width_and_the_axes_that_are_given():
    axes = plt.figure().subplots(1, 2)[1]
    assert plotting.spectral_density(DENSITY, axes) is axes
    assert plt.get_fignums() == [axes.figure.number]
    x, y = axes.lines[0].get_data()
    np.testing.assert_allclose(
        y, eigen.smooth_density(DENSITY, x, 8 / 200), rtol=1e-5, atol=1e-9
    )


def test_nodes_without_weight_and_a_single_node():
    nodes, weights = jnp.array([[2.0, 9e9]]), jnp.array([[1.0, 0.0]])
    axes = plotting.spectral_density(eigen.SpectralDensity(nodes, weights))
    x, y = axes.lines[0].get_data()
    assert (x.min() > 1.9, x.max() < 2.1, x[np.argmax(y)]) == (True, True, 2)


def test_the_density_of_a_matrix():
    spectrum = jnp.concatenate([jnp.linspace(-1, 1, 98), jnp.array([4.0, 6.0])])
    density = eigen.spectral_density(lambda v: spectrum * v, spectrum)
    axes = plotting.spectral_density(density, eigenvalues=[6, 4], num_params=100)
    line, floor, _ = axes.lines
    peaks = [np.interp(x, *line.get_data()) for x in (4.0, 6.0)]
    assert np.allclose(peaks, floor.get_ydata()[0], rtol=0.7)  # by eight vectors


def test_a_density_that_can_not_be_drawn():
    broken = DENSITY._replace(nodes=DENSITY.nodes.at[0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="density and eigenvalues must be finite, got"):
        plotting.spectral_density(broken)
    with pytest.raises(ValueError, match="must be finite, got 1 values that are not"):
        plotting.spectral_density(DENSITY, eigenvalues=[jnp.inf])
    for lost in (0, slice(None)):  # one sample, or all
        broken = eigen.SpectralDensity(*(x.at[lost].set(jnp.nan) for x in DENSITY))
        count = 2 * broken.nodes[lost].size
        with pytest.raises(ValueError, match=f"got {count} values that are not"):
            plotting.spectral_density(broken)
    for name, value in (("width", 0.0), ("width", -1.0), ("num_params", 0)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            plotting.spectral_density(DENSITY, **{name: value})
    with pytest.raises(ValueError, match="density must be known to be drawn, got trac"):
        jax.jit(lambda x: plotting.spectral_density(x).get_ylim()[0])(DENSITY)
    assert not plt.get_fignums()


# --- training -------------------------------------------------------------------------


def infos_of(eigenvalues):
    """Infos whose other values are made from the steps' numbers."""
    return [
        StepInfo(
            grad_norm=jnp.float32(1),
            perturbation_norm=jnp.float32(0.1 + i / 1000),
            perturbed_value=jnp.float32(2),
            alignment=jnp.float32(1 / (1 + i)),
            eigenvalue=jnp.float32(x),
            residual=jnp.float32(0),
        )
        for i, x in enumerate(eigenvalues)
    ]


def drawn_in(panels, line=0):
    return [np.asarray(x.lines[line].get_data()) for x in panels]


def test_training_draws_what_the_steps_did():
    infos = infos_of([0, 1, 3, 2])
    panels = plotting.training(infos)
    expected = [[getattr(x, name) for x in infos] for name in StepInfo._fields]
    for data, i in zip(drawn_in(panels), (4, 3, 1), strict=True):
        np.testing.assert_allclose(data, [range(4), expected[i]])
    assert (panels.shape, panels[0].get_yscale()) == ((3,), "linear")
    low, high = panels[1].get_ylim()
    assert low <= 0 < 1 <= high
    assert panels[0].get_legend() is None
    losses, steps = jnp.array([5.0, 4.0, 3.0, 0.01]), [10, 20, 30, 40]
    panels = plotting.training(infos, losses=losses, steps=steps)
    np.testing.assert_allclose(drawn_in(panels)[2], [steps, losses])
    assert (panels[2].get_ylabel(), panels[2].get_yscale()) == ("loss", "log")


def test_a_second_run_goes_beside_the_first():
    panels = plotting.training(infos_of([1, 10, 200]), label="one")
    assert panels[0].get_yscale() == "log"
    again = plotting.training(infos_of([3, 3, 3]), [*panels], label="other")
    assert [*again] == [*panels]
    np.testing.assert_allclose(drawn_in(again, 1)[0], [range(3), [3, 3, 3]])
    assert texts(panels[0].get_legend()) == ["one", "other"]
    styles = {(x.get_color(), x.get_linestyle()) for x in panels[0].lines}
    assert len({y for _, y in styles}) == 2
    panels[0].figure.canvas.draw()
    ticks = [x.get_text() for x in panels[0].get_yticklabels()]
    assert {"1", "10", "100"} <= {*ticks}


def test_eigenvalues_below_zero_are_on_a_linear_axis():
    panels = plotting.training(infos_of([-1, 10, 2000]))
    assert panels[0].get_yscale() == "linear"
    one = plotting.training(infos_of([-1, 2, 3]))
    assert plotting.training(infos_of([1, 10, 3000]), one)[0].get_yscale() == "linear"
    one = plotting.training(infos_of([1, 10, 300]))
    assert plotting.training(infos_of([-5, -3, 2]), one)[0].get_yscale() == "linear"


def test_alignments_are_on_a_linear_axis_however_small():
    infos = [
        x._replace(alignment=jnp.float32(alignment))
        for x, alignment in zip(infos_of([1, 2, 3]), (0, 0.001, 0.6), strict=True)
    ]
    axes = plotting.training(infos)[1]
    assert axes.get_yscale() == "linear"
    assert axes.get_ylim()[0] < 0


def test_training_of_a_link():
    tx, w = eigensam_jax.eigen_sam(0.1), jnp.array([1.0, 2.0])
    state, infos, loss = tx.init(w), [], lambda w: jnp.sum(w**4)
    for _ in range(3):
        _, state = tx.update(jax.grad(loss)(w), state, w, value_fn=loss)
        infos.append(eigensam_jax.info(state))
    panels = plotting.training(infos)
    expected = [x.eigenvalue for x in infos]
    np.testing.assert_allclose(panels[0].lines[0].get_ydata(), expected)


def test_training_that_can_not_be_drawn():
    infos = infos_of([1, 2])
    tx, w = eigensam_jax.sam(0.1), jnp.ones(2)
    of_sam = eigensam_jax.info(tx.init(w))
    for given, options, match in (
        ([], {}, "infos must be a list of .*, got a list of nothing: after a step"),
        (infos[0], {}, r"got a StepInfo of \['ArrayImpl'\]"),
        ([1.0], {}, r"got a list of \['float'\]"),
        ([of_sam], {}, "infos must be those of eigen_sam, got one without eigenvalue"),
        (infos, {"losses": [1.0]}, r"the shape of losses must be \(2,\), got \(1,\)"),
        (infos, {"steps": 3}, r"the shape of steps must be \(2,\), got \(\)"),
        (infos, {"axes": [None]}, r"len\(axes\) must be 3, got 1: give"),
    ):
        with pytest.raises(ValueError, match=match):
            plotting.training(given, **options)
    with pytest.raises(ValueError, match="eigenvalue of infos must be known to be dra"):
        jax.jit(lambda x: plotting.training(x)[0].get_ylim()[0])(infos)
    assert not plt.get_fignums()


# --- slices ---------------------------------------------------------------------------

X, Y = jnp.linspace(-1, 1, 9), jnp.linspace(0, 3, 7)


def slice_of(function, path=None):
    values = function(*jnp.meshgrid(X, Y, indexing="ij"))
    return diagnostics.LossSlice((X, Y), values, path)


def test_a_line_is_drawn_through_the_values():
    found = diagnostics.LossSlice((X,), X**2 + 1, None)
    axes = plotting.loss_slice(found)
    np.testing.assert_allclose(axes.lines[0].get_data(), [X, X**2 + 1])


def test_the_first_direction_is_the_x_axis():
    axes = plotting.loss_slice(slice_of(lambda x, y: x))
    (filled,) = axes.collections
    np.testing.assert_allclose(filled.levels[[0, -1]], [-1, 1])
    for path, low, high in zip(
        filled.get_paths(), filled.levels[:-1], filled.levels[1:], strict=True
    ):
        x, y = path.vertices.T
        np.testing.assert_allclose([x.min(), x.max()], [low, high], atol=1e-6)
        np.testing.assert_allclose([y.min(), y.max()], [0, 3])


def test_the_path_is_drawn_where_it_is():
    path = jnp.array([[0.5, 2.0], [0.2, 1.0], [0.0, 0.0]])
    axes = plotting.loss_slice(slice_of(lambda x, y: x + y, path))
    halo, line, end = axes.lines
    for drawn in (halo, line):
        np.testing.assert_allclose(drawn.get_xydata(), path)
    np.testing.assert_allclose(end.get_xydata(), path[-1:])
    assert texts(axes.get_legend()) == ["path of training", "its end"]
    bar = axes.figure.axes[1]
    assert bar.get_ylabel() == "loss"


def test_a_loss_over_decades_has_levels_over_decades():
    axes = plotting.loss_slice(slice_of(lambda x, y: 10.0 ** (x + y)))
    levels = axes.collections[0].levels
    np.testing.assert_allclose(levels[1:] / levels[:-1], levels[1] / levels[0])
    np.testing.assert_allclose(levels[[0, -1]], [0.1, 1e4], rtol=1e-5)


def test_what_is_not_finite_is_left_out():
    axes = plotting.loss_slice(slice_of(lambda x, y: jnp.where(x > 0.6, jnp.nan, y)))
    x = np.concatenate([path.vertices for path in axes.collections[0].get_paths()])[
        :, 0
    ]
    assert x.max() < 0.6
    constant = plotting.loss_slice(slice_of(lambda x, y: 0 * x + 2))
    assert constant.collections


def test_a_slice_that_can_not_be_drawn():
    with pytest.raises(ValueError, match=r"slice.values must be finite somewhere"):
        plotting.loss_slice(slice_of(lambda x, y: jnp.nan * x))
    with pytest.raises(ValueError, match=r"shape of slice.values must be 2 or more"):
        plotting.loss_slice(diagnostics.LossSlice((X[:1],), X[:1], None))
    with pytest.raises(ValueError, match=r"slice.distances must be known to be drawn"):
        jax.jit(lambda x: plotting.loss_slice(x).get_ylim()[0])(slice_of(jnp.add))
    assert not plt.get_fignums()


# --- layers ---------------------------------------------------------------------------


def test_bars_are_as_long_as_the_eigenvalues():
    top = eigen.Eigenpair({"w": jnp.ones(2)}, jnp.float32(4), jnp.float32(0.5))
    layers = {"first": 2.5, "second": top, "last": jnp.float32(-1)}
    axes = plotting.sharpness_by_layer(layers)
    assert [x.get_width() for x in axes.patches] == [2.5, 4, -1]
    assert [x.get_text() for x in axes.get_yticklabels()] == [*layers]
    assert [x.get_text() for x in axes.texts] == ["2.5", "4", "-1"]
    low, high = axes.get_ylim()
    assert low > high  # the first is on top
    segments = axes.collections[0].get_segments()
    known = [x for x in segments if len(x)]
    np.testing.assert_allclose(known, [[[3.5, 1], [4.5, 1]]])


def test_layers_that_can_not_be_drawn():
    pair = eigen.Eigenpair(None, jnp.ones(2), jnp.ones(2))
    for given, match in (
        ({}, "layers must be a dict of one λ_max or more"),
        ([1.0], "layers must be a dict of one λ_max or more"),
        ({"a": pair}, r"the shape of layers\['a'\] must be \(\), got \(2,\): give"),
    ):
        with pytest.raises(ValueError, match=match):
            plotting.sharpness_by_layer(given)
    with pytest.raises(ValueError, match=r"layers\['a'\] must be known to be drawn"):
        jax.jit(lambda x: plotting.sharpness_by_layer({"a": x}).get_ylim()[0])(1.0)
    assert not plt.get_fignums()


# --- without matplotlib ---------------------------------------------------------------


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    for name in [x for x in sys.modules if x.startswith("eigensam_jax.plotting")]:
        monkeypatch.delitem(sys.modules, name)
    message = "needs matplotlib: pip install matplotlib"
    with pytest.raises(ImportError, match=message):
        importlib.import_module("eigensam_jax.plotting")
