"""An entry is all that it takes to add a method, a data set, a model or a tracker."""

import json
import re
from pathlib import Path

import flax.linen as nn
import numpy as np
import optax
import pytest

from eigensam_jax import trackers
from eigensam_jax.experiments import cli, registry
from eigensam_jax.experiments.entries import (
    BaseOptimizer,
    DataSource,
    Method,
    Network,
    Tracking,
)
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.track import run as track
from eigensam_jax.experiments.training import methods

CONTRIBUTING = Path(__file__).parents[2] / "notebooks" / "contributing.md"


class Linear(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images):
        return nn.Dense(self.num_classes)(images.reshape(len(images), -1))


def float_images(folder):
    """Two classes that one number tells apart."""
    assert folder is None
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 80)
    images = rng.normal(3, 0.1, (80, 2, 2, 1)) + labels[:, None, None, None]
    return images[:60], labels[:60], images[60:], labels[60:]


@pytest.fixture
def added(monkeypatch):
    """One of each."""
    add = monkeypatch.setitem
    add(registry.DATASETS, "numbers", DataSource(float_images))
    add(registry.MODELS, "linear", Network(Linear, track_rate=0.1))
    adam = BaseOptimizer(lambda rate, decay: optax.adam(rate), (0.1,), {})
    add(registry.BASE_OPTIMIZERS, "adam", adam)
    add(registry.METHODS, "adam", Method("Adam", "black", base="adam"))
    often = Tracking(trackers.lanczos, {"num_matvecs": 2, "update_interval": 3}, 2)
    add(registry.TRACKERS, "often", often)
    return ["--dataset", "numbers", "--model", "linear", "--out"]


@pytest.mark.usefixtures("drawn")
def test_what_is_added_is_trained_measured_shown_and_drawn(added, tmp_path, capsys):
    small = ["--batch-size", "20", "--epochs", "3", "--smoke", *added, str(tmp_path)]
    assert cli.main(["compare", "--optimizers", "sgd", "adam", "sam", *small]) == 0
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    rates = {run["row"]: run["learning_rate"] for run in runs}
    assert rates == {"sgd": 0.05, "adam": 0.1, "sam": 0.05}
    assert [run["gradients"] for run in runs] == [1, 1, 2]
    losses = {run["row"]: run["train_loss"] for run in runs}
    assert losses["adam"] < losses["sgd"]  # at twice the rate, by its own steps
    assert (tmp_path / "compare.png").stat().st_size > 1000
    assert "sam − sgd" in capsys.readouterr().out


def test_a_tracker_that_is_added_is_followed(added, tmp_path, monkeypatch):
    monkeypatch.setattr(track, "BATCH_SIZE", 20)
    names = ["track", "--trackers", "often", "--steps", "6", "--smoke"]
    assert cli.main([*names, *added, str(tmp_path)]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["trackers"] == {"often": "lanczos(num_matvecs=2, update_interval=3)"}
    (run,) = (x for x in found["runs"] if x["optimizer"] == "eigen_sam")
    assert 0 < run["ratio"] <= 1


def test_float_images_are_standardised(added):
    numbers, (images, *_) = registry.dataset("numbers"), float_images(None)
    expected = (images - images.mean()) / images.std()
    np.testing.assert_allclose(numbers.train_images, expected, rtol=1e-4, atol=1e-5)
    assert numbers.train_images.dtype == np.float32


@pytest.mark.parametrize("name", registry.DATASETS)
def test_every_data_set_is_found(name):
    with pytest.raises(UserError, match="nowhere"):
        registry.dataset(name, Path("nowhere"))


@pytest.mark.parametrize("name", registry.METHODS)
def test_what_methods_say_of_each_other_exists(name):
    method = registry.METHODS[name]
    assert method.baseline in ("", "plain", *registry.METHODS)
    assert method.radius_of in ("", *registry.METHODS)
    assert method.base in ("", *registry.BASE_OPTIMIZERS)
    assert method.tracker in ("", *registry.TRACKERS)
    assert bool(method.base) == (method.link is None)


def test_no_name_that_is_unknown_falls_through():
    for ask in (
        lambda: registry.dataset("imagenet"),
        lambda: registry.model("vgg", 10),
        lambda: methods.named("adam", 0.1, 0.2),
        lambda: methods.make_optimizer(methods.Setup("adam"), optax.sgd(0.1)),
        lambda: methods.make_tracker(methods.Setup("eigen_sam", tracker="none")),
    ):
        with pytest.raises(KeyError):
            ask()


RECIPES = re.findall(r"```diff\n (\w+) = \{\n\+(.*)\n```", CONTRIBUTING.read_text())


def test_the_recipes_of_the_contributing_page_are_diffs_of_the_registry():
    """Each applied to the file, which is then run."""
    assert [table for table, _ in RECIPES] == [
        *("BASE_OPTIMIZERS", "METHODS", "DATASETS", "MODELS", "TRACKERS")
    ]
    text = Path(registry.__file__).read_text()
    for table, line in RECIPES:
        assert text.count(f"\n{table} = {{\n") == 1
        text = text.replace(f"\n{table} = {{\n", f"\n{table} = {{\n{line}\n")
    images, labels, *_ = float_images(None)
    new = {"__package__": registry.__package__, "images": images, "labels": labels}
    exec(compile(text, "registry", "exec"), new)
    assert new["METHODS"]["adam"].base in new["BASE_OPTIMIZERS"]
    gradient = np.ones(3, np.float32)
    tx = new["BASE_OPTIMIZERS"]["adam"].make(0.1, 0.0)
    step, _ = tx.update(gradient, tx.init(gradient))
    np.testing.assert_allclose(step, -0.1 * gradient, rtol=1e-5)  # Adam's first
    assert new["dataset"]("halves").train_images.shape == (30, 2, 2, 1)
    assert new["model"]("wide", 7).width == 512
    assert new["TRACKERS"]["slow"].products == 1.8
    assert new["TRACKERS"]["slow"].make(9, 500).init(gradient) is not None
