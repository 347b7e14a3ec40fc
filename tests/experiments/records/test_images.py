"""Plots are small, and the same each time."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from eigensam_jax.experiments.records import images

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.usefixtures("drawn")


def figure():
    result = Figure(figsize=(14, 2))
    result.subplots().plot(np.sin(np.arange(100)), color="red")
    return result


def test_a_plot_is_as_wide_as_a_page_and_the_same_again(tmp_path):
    one, other = tmp_path / "one.png", tmp_path / "other.png"
    images.save(figure(), one)
    images.save(figure(), other)
    assert one.read_bytes() == other.read_bytes()
    with Image.open(one) as image:
        assert image.size == (images.WIDTH, round(images.WIDTH / 7))
        assert image.mode == "P"
        colours = np.asarray(image.convert("RGB")).reshape(-1, 3)
    near = abs(colours - np.array([255.0, 0, 0])).sum(1)
    assert near.min() < 10  # a thin line is still red
    assert abs(colours - 255.0).sum(1).min() == 0


def test_a_mark_keeps_its_colour_beside_many_others(tmp_path):
    result, grid = images.panels(1, 1, 4, "title")
    for i, line in enumerate(np.random.default_rng(0).random((9, 20))):
        images.band(grid[0, 0], range(20), line, 0.3, color=f"C{i}")
    grid[0, 0].plot(10, 2, "o", color="#393b79")
    images.save(result, tmp_path / "it.png")
    with Image.open(tmp_path / "it.png") as image:
        assert (0x39, 0x3B, 0x79) in {x for _, x in image.convert("RGB").getcolors()}


def test_only_what_spans_a_decade_is_on_a_logarithmic_axis():
    _, grid = images.panels(1, 3, 2, "title")
    scales = []
    for axes, values in zip(grid.flat, ([1, 10], [1, 9], [-1, 10]), strict=True):
        axes.plot(values)
        images.by_decades(axes, "y")
        scales.append(axes.get_yscale())
    assert scales == ["log", "linear", "linear"]


def test_the_committed_ones_are_small():
    plots = list(ROOT.glob("notebooks/results/*/*.png"))
    assert plots
    assert sum(path.stat().st_size for path in plots) < 2_000_000
    for path in plots:
        with Image.open(path) as image:
            assert image.width <= images.WIDTH
            assert image.mode == "P"
