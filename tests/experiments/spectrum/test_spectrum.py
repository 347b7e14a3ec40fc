import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import assert_refused, error_of
from jax.flatten_util import ravel_pytree

from eigensam_jax import eigen, hessian
from eigensam_jax.experiments import cli, registry
from eigensam_jax.experiments.models import small as models
from eigensam_jax.experiments.records import checkpoints
from eigensam_jax.experiments.records import results as records
from eigensam_jax.experiments.spectrum import run as spectrum
from eigensam_jax.experiments.spectrum import tables as spectrum_tables
from eigensam_jax.experiments.training import loop as training
from eigensam_jax.experiments.training import losses, measures, methods

SMOKE = argparse.Namespace(
    dataset="digits",
    data_dir=None,
    model="mlp",
    optimizer="sam",
    seed=3,
    epochs=2,
    batch_size=128,
    learning_rate=0.05,
    rho=0.1,
    alpha=0.0,  # SAM has none
    augment=False,
    k=3,
    num_matvecs=8,
    num_samples=2,
    examples=300,
    base_optimizer="sgd",
    weight_decay=0.0,
    out=Path("unused"),
)
OPTIONS = "spectrum --smoke --optimizer sam --seed 3 --examples 300 --out"


@pytest.fixture(autouse=True, scope="module")
def _steps_are_compiled_once():
    """What `network.train` measures depends on the settings alone."""
    make_run, made = training.make_run, {}

    def from_cache(model, dataset, measure, settings):
        if (model, settings) not in made:
            made[model, settings] = make_run(model, dataset, measure, settings)
        return made[model, settings]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_run", from_cache)
        yield


@pytest.mark.usefixtures("drawn")
def test_the_spectrum_is_that_of_the_trained_network(tmp_path, capsys, monkeypatch):
    out, found, search = tmp_path / "results", [], eigen.top_eigenpairs

    def kept(matvec, *args, **options):
        found.append((matvec, search(matvec, *args, **options)))
        return found[-1][1]

    monkeypatch.setattr(eigen, "top_eigenpairs", kept)
    assert cli.main([*OPTIONS.split(), str(out)]) == 0
    printed = capsys.readouterr().out.lstrip()
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].strip() == "digits, MLP, SAM"
    assert sorted(p.name for p in out.iterdir()) == ["results.json", "spectrum.png"]
    results = json.loads((out / "results.json").read_text())
    assert results["commands"] == [f"eigensam {OPTIONS} {out}"]
    assert {"jax", "optax", "eigensam_jax"} < set(results["versions"])
    assert results["device"]["platform"] in ("cpu", "gpu", "tpu")
    config = {**results["config"], "data_dir": None, "out": SMOKE.out}
    assert config == {**config, **vars(SMOKE)}
    for row in spectrum_tables.summary(results):
        assert row in [line.split() for line in lines]
    (run,) = results["runs"]
    assert (run["seed"], run["optimizer"]) == (SMOKE.seed, SMOKE.optimizer)
    assert results["wall_time_s"] > run["top_wall_time_s"] > 0

    dataset = registry.dataset("digits")
    monkeypatch.undo()
    trained = spectrum.train(SMOKE, dataset)
    for key in ("train_loss", "test_accuracy"):
        assert run[key] == records.rounded(trained[key])
    model = models.MLP(10)
    loss = losses.evaluation_loss(model)
    batch = dataset.train_images[:300], dataset.train_labels[:300]
    matvec = measures.make_matvec(loss)(trained["params"], *batch)
    top = measures.top_eigenpair(matvec, trained["params"], None, 1e-3)
    values = run["eigenvalues"]
    np.testing.assert_allclose(values[0], top.eigenvalue, rtol=1e-4)
    assert values == sorted(values, reverse=True)
    assert len(values) == len(run["residuals"]) == 3
    assert max(run["residuals"]) <= spectrum.TOLERANCE * values[0]
    ((product, pairs),) = found
    for i, residual in enumerate(run["residuals"]):
        v = jax.tree.map(lambda x, i=i: x[i], pairs.eigenvector)
        error = ravel_pytree(product(v))[0] - pairs.eigenvalue[i] * ravel_pytree(v)[0]
        np.testing.assert_allclose(residual, jnp.linalg.norm(error), rtol=0.1)
    assert np.shape(run["nodes"]) == np.shape(run["weights"]) == (2, 8)
    np.testing.assert_allclose(np.sum(run["weights"]), 1, rtol=1e-5)
    np.testing.assert_allclose(np.max(run["nodes"]), values[0], rtol=0.05)
    logits = model.apply({"params": trained["params"]}, dataset.test_images)
    accuracy = np.mean(np.argmax(logits, -1) == np.asarray(dataset.test_labels))
    np.testing.assert_allclose(trained["test_accuracy"], accuracy, rtol=1e-6)


def test_training_is_that_of_compare():
    dataset = registry.dataset("digits")
    changed = {"optimizer": "eigen_sam", "alpha": 0.2}
    chosen = argparse.Namespace(**{**vars(SMOKE), **changed})
    trained = spectrum.train(chosen, dataset)
    model = models.MLP(10)
    run = training.make_run(
        model,
        dataset,
        measures.make_measure(model, dataset, 128, 2_000),
        training.Settings(22, 128, 0.05, (22,)),
    )
    *_, end = run(methods.named("eigen_sam", 0.1, 0.2), 3)
    assert end.measurement.train_loss == trained["train_loss"]
    assert end.measurement.test_accuracy == trained["test_accuracy"]


def test_the_product_is_that_of_all_images_at_once():
    dataset = registry.dataset("digits")
    model = models.MLP(10)
    params = model.init(jax.random.key(0), dataset.train_images[:1])["params"]
    loss = losses.evaluation_loss(model)
    batch = dataset.train_images[:260], dataset.train_labels[:260]
    product = measures.make_matvec(loss)(params, *batch)  # a chunk, and a rest
    vector = jax.tree.map(jnp.ones_like, params)
    expected = hessian.hvp(lambda p: loss(p, *batch), params, vector)
    ours, theirs = (ravel_pytree(tree)[0] for tree in (product(vector), expected))
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * abs(theirs).max())


def test_figures_of_the_whole_spectrum():
    nodes = jnp.array([[-3.0, -0.005, 0.5], [-1.0, 0.005, 1.0]])
    weights = jnp.array([[0.1, 0.3, 0.1], [0.2, 0.2, 0.1]])
    figures = spectrum_tables.summarise(eigen.SpectralDensity(nodes, weights), 100, 1.0)
    traces = [200 * (-0.3 - 0.0015 + 0.05), 200 * (-0.2 + 0.001 + 0.1)]
    np.testing.assert_allclose(figures["trace"], np.mean(traces), rtol=1e-5)
    error = abs(traces[0] - traces[1]) / 2  # two values: their deviation over √2
    np.testing.assert_allclose(figures["trace_error"], error, rtol=1e-5)
    np.testing.assert_allclose(figures["num_above"], 20, rtol=1e-5)
    np.testing.assert_allclose(figures["num_below"], 30, rtol=1e-5)
    assert figures["smallest_node"] == -3
    one = eigen.SpectralDensity(nodes[:1], 2 * weights[:1])
    assert spectrum_tables.summarise(one, 100, 1.0)["trace_error"] == 0


@pytest.mark.parametrize(
    ("options", "wrong", "right"),
    [
        ("--optimizer adam", "'adam'", "'asam', 'eigen_sam_paper', 'eigen_sam'"),
        (
            "--optimizer sam_matched",
            "'sam_matched'",
            "'asam', 'eigen_sam_paper', 'eigen_sam'",
        ),
        ("--k 0", "'0'", "whole number above 0"),
        ("--k 26123", "26122 parameters", "a few dozen"),
        ("--num-matvecs 1.5", "'1.5'", "whole number above 0"),
        ("--num-samples x", "'x'", "whole number above 0"),
        ("--seed -1", "'-1'", "whole number of at least 0"),
        ("--seed 4294967296", "4294967296", "more than 32 bits"),
        ("--examples 1438", "1438", "at most 1437"),
        ("--batch-size 9999", "9999", "at most 1437"),
        ("--dataset mnist", "needs --data-dir", "four idx files"),
        ("--optimizer sgd --base-optimizer adamw", "adamw: --optimizer sgd", "leave"),
        ("--out pyproject.toml", "pyproject.toml", "name another folder"),
    ],
)
def test_a_bad_option_ends_with_one_line(
    options, wrong, right, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(spectrum, "train", None)  # training would fail
    assert_refused("spectrum", options, wrong, right, capsys, monkeypatch, tmp_path)


@pytest.mark.usefixtures("tiny")
def test_killed_in_training_it_comes_to_the_same(tmp_path, monkeypatch, capsys):
    command = ["spectrum", "--smoke", "--optimizer", "eigen_sam"]
    command += ["--num-samples", "1", "--out"]
    write, kept = checkpoints.write, []

    def killing(path, tree):
        kept.append(tree["step"])
        write(path, tree)
        if len(kept) == 4:
            raise KeyboardInterrupt

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert cli.main([*command, str(whole)]) == 0
    command.append(str(killed))
    monkeypatch.setattr(checkpoints, "write", killing)
    assert cli.main(command) == 130
    assert [p.name for p in killed.iterdir()] == [spectrum.CHECKPOINT]
    said = "".join(capsys.readouterr().out.split())  # broken anywhere in the path
    assert f"{spectrum.CHECKPOINT};thesamecommandgoesonfromthere." in said
    other = error_of([*command, "--epochs", "3"], capsys)
    assert "(epochs 2, now 3); name another folder" in other

    with monkeypatch.context() as patch:
        patch.setattr(eigen, "top_eigenpairs", interrupted)
        assert cli.main([*command, "--k", "1"]) == 130
    assert kept == sorted(set(kept))
    assert len(kept) == spectrum.CHECKPOINTS + 1

    with monkeypatch.context() as patch:
        patch.setattr(training, "make_run", None)  # there is nothing to train
        assert cli.main(command) == 0
    found = [json.loads((out / "results.json").read_text()) for out in (whole, killed)]
    for results in found:
        del results["commands"], results["config"]["out"]
        (run,) = results["runs"]
        assert results.pop("wall_time_s") > run.pop("top_wall_time_s") > 0
    assert found[0] == found[1]
    names = ["results.json", "spectrum.png"]
    assert sorted(p.name for p in killed.iterdir()) == names


@pytest.mark.parametrize(
    ("options", "base"),
    [
        ("--optimizer adamw", "adamw"),
        ("--optimizer adamw --base-optimizer adamw", "adamw"),
        ("--optimizer sam", "sgd"),
        ("--optimizer sam --base-optimizer adamw", "adamw"),
    ],
)
def test_the_base_optimizer_is_the_one_that_trains(options, base, monkeypatch):
    asked = []
    monkeypatch.setattr(spectrum, "run", lambda chosen, command: asked.append(chosen))
    assert cli.main(["spectrum", *options.split()]) == 0
    assert asked[0].base_optimizer == base
    assert asked[0].learning_rate == registry.learning_rate(base, base)


def test_training_that_diverges_ends_with_what_to_do(tmp_path, capsys):
    options = ["--optimizer", "sgd", "--learning-rate", "1e30", "--out", str(tmp_path)]
    assert cli.main(["spectrum", "--smoke", *options]) == 2
    assert "lower the learning rate" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_results_of_another_command_are_kept(tmp_path, capsys):
    path = tmp_path / "results.json"
    records.write(path, {"commands": ["eigensam compare --smoke"]})
    before = path.read_bytes()
    assert cli.main(["spectrum", "--smoke", "--out", str(tmp_path)]) == 2
    assert "the results of eigensam compare --smoke;" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_an_interruption_keeps_the_earlier_results(tmp_path, capsys, monkeypatch):
    earlier = {"results.json": b"{}", "spectrum.png": b"png"}
    for name, content in earlier.items():
        (tmp_path / name).write_bytes(content)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(spectrum, "train", interrupted)
    assert cli.main(["spectrum", "--out", str(tmp_path)]) == 130
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == earlier
