"""What tests of the commands share."""

import flax.linen as nn
import pytest

from eigensam_jax.experiments import entries, registry
from eigensam_jax.experiments.records import images, progress
from eigensam_jax.experiments.training import loop as training


@pytest.fixture(autouse=True)
def _no_lines_of_progress(monkeypatch):
    """What they read is the same on a slow machine."""
    monkeypatch.setattr(progress, "SECONDS", 3_600.0)


@pytest.fixture
def drawn():
    """For tests of what is drawn."""


@pytest.fixture(autouse=True)
def _plots_are_empty(request, monkeypatch):
    """To draw one takes a second: a file without content stands for it elsewhere."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(images, "save", lambda figure, path: path.touch())


class Tiny(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images):
        x = images.reshape(len(images), -1)[:, ::8]
        return nn.Dense(self.num_classes)(nn.relu(nn.Dense(4)(x)))


@pytest.fixture
def tiny(monkeypatch):
    """A small network in place of the MLP."""
    monkeypatch.setitem(registry.MODELS, "mlp", entries.Network(Tiny))


@pytest.fixture(scope="module")
def quick():
    """A small network in place of the MLP, whose programs are compiled once a module.

    It is the `make_run` that compiles them anew.
    """
    make_run, made = training.make_run, {}

    def from_cache(model, dataset, measure, settings):
        key = settings, len(dataset.train_labels), len(dataset.test_labels)
        if key not in made:
            made[key] = make_run(model, dataset, measure, settings)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_run", from_cache)
        patch.setitem(registry.MODELS, "mlp", entries.Network(Tiny))
        yield make_run
