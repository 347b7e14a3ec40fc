"""`eigensam accuracy` and `eigensam ablate`: what they measure, and how they go on."""

import itertools
import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from command_line import error_of
from problems import dense_hessian

from eigensam_jax.experiments import cli, entries, registry
from eigensam_jax.experiments.data import load as data
from eigensam_jax.experiments.records import checkpoints
from eigensam_jax.experiments.study import ablations
from eigensam_jax.experiments.study import run as study
from eigensam_jax.experiments.training import loop as training
from eigensam_jax.experiments.training import losses, measures, methods

ACCURACY = ["accuracy", "--smoke", "--looks", "2", "--rhos", "0.1", "--asam-rhos", "1"]
ABLATE = ["ablate", "--smoke", "--looks", "2", "--tables", "when"]


pytestmark = pytest.mark.usefixtures("quick")


def figures(out):
    (path,) = out.glob("*.json")
    found = json.loads(path.read_text())
    assert found["complete"] is True
    for run in found["runs"]:
        assert run.pop("training_time_s", 1) > 0  # none where it diverged
    return found["runs"]


@pytest.fixture(scope="module")
def unbroken(quick, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    assert cli.main([*ACCURACY, "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"results.json", "accuracy.png"}
    return out


class Killed(BaseException):
    """What nothing catches, as SIGKILL."""


def kills_until_done(command, monkeypatch):
    """How often the command is killed, right after each checkpoint."""
    write = checkpoints.write

    def killing(path, tree):
        write(path, tree)
        raise Killed

    monkeypatch.setattr(checkpoints, "write", killing)
    kills = 0
    while True:
        try:
            assert cli.main(command) == 0
            return kills
        except Killed:
            kills += 1


def test_killed_after_every_checkpoint_it_comes_to_the_same(
    unbroken, tmp_path, monkeypatch
):
    assert kills_until_done([*ACCURACY, "--out", str(tmp_path)], monkeypatch) == 7
    assert figures(tmp_path) == figures(unbroken)


def test_the_figures_are_those_of_the_network(quick, unbroken):
    """The end of SAM's run by a loop of its own, and its Hessian by `eigh`."""
    (run,) = (x for x in figures(unbroken) if (x["table"], x["row"]) == ("main", "sam"))
    digits = registry.dataset("digits")
    model = registry.model("mlp", 10)
    settings = training.Settings(11, 128, run["learning_rate"], (11,))
    keep = lambda method, state, top: (jax.tree.map(np.array, state.params), None)
    sam = methods.Setup("sam", run["rho"])
    *_, end = quick(model, digits, keep, settings)(sam, 0)
    params = end.measurement
    loss = losses.evaluation_loss(model)
    images, labels = digits.train_images, digits.train_labels
    value_fn = lambda p: loss(p, images, labels)
    np.testing.assert_allclose(run["train_loss"], value_fn(params), rtol=1e-5)
    logits = model.apply({"params": params}, digits.test_images)
    accuracy = np.mean(np.argmax(logits, -1) == np.asarray(digits.test_labels))
    np.testing.assert_allclose(run["test_accuracy"], accuracy, rtol=1e-6)
    values = np.linalg.eigvalsh(dense_hessian(value_fn, params))
    np.testing.assert_allclose(run["lambda_max"], values[-1], rtol=1e-3)
    assert run["lambda_max_residual"] < 2 * study.TOLERANCE * run["lambda_max"]


def test_no_test_image_is_seen_in_tuning():
    digits = registry.dataset("digits")
    split = data.for_tuning(digits)
    rows = lambda images: {np.asarray(image).tobytes() for image in images}
    kept, held = rows(split.train_images), rows(split.test_images)
    assert len(split.test_labels) == round(len(digits.train_labels) / 10)
    assert len(split.train_labels) + len(split.test_labels) == len(digits.train_labels)
    assert not kept & held
    assert kept | held == rows(digits.train_images)


def test_trials_on_few_training_images_are_judged_by_the_whole_held_out_tenth(
    tmp_path, monkeypatch
):
    used = []
    make_run = training.make_run

    def noting(model, dataset, *more):
        used.append(dataset)
        return make_run(model, dataset, *more)

    monkeypatch.setattr(training, "make_run", noting)
    command = "frontier --smoke --train-examples 256 --learning-rates 0.05 0.1 --out"
    assert cli.main([*command.split(), str(tmp_path), "--rhos", "0.1", "0.2"]) == 0
    digits = registry.dataset("digits")
    split = data.for_tuning(digits)
    for tuning in used[:2]:  # one a learning rate
        np.testing.assert_array_equal(tuning.train_images, split.train_images[:256])
        np.testing.assert_array_equal(tuning.test_images, split.test_images)
    for final in used[2:]:
        np.testing.assert_array_equal(final.train_images, digits.train_images[:256])
        np.testing.assert_array_equal(final.test_images, digits.test_images)
    assert len(used) > 2


def test_a_trial_spends_three_products_on_the_hessian(tmp_path, monkeypatch):
    find, products = measures.top_eigenpair, []

    def counting(matvec, *args):
        products.append(0)

        def counted(vector):
            products[-1] += 1
            return matvec(vector)

        return find(counted, *args)

    monkeypatch.setattr(measures, "top_eigenpair", counting)
    command = "frontier --smoke --learning-rates 0.05 0.1 --rhos 0.1 0.2 --out"
    assert cli.main([*command.split(), str(tmp_path)]) == 0
    tried = [x for x in figures(tmp_path) if x["table"] == "tuning"]
    assert len(tried) == 4
    assert products[:4] == 4 * [3]
    assert max(products[4:]) > 3
    assert not any({"lambda_max", "alignment", "train_loss"} & x.keys() for x in tried)


def test_label_noise_changes_its_share_of_the_training_labels_alone():
    digits = registry.dataset("digits")
    noisy = data.with_label_noise(digits, 0.4)
    changed = np.mean(np.asarray(noisy.train_labels != digits.train_labels))
    np.testing.assert_allclose(changed, 0.4 * 0.9, atol=0.04)
    np.testing.assert_array_equal(noisy.test_labels, digits.test_labels)
    clean = data.with_label_noise(digits, 0.0)
    np.testing.assert_array_equal(clean.train_labels, digits.train_labels)


class Bigrams(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, characters):
        return nn.Embed(self.num_classes, self.num_classes)(characters)


@pytest.fixture
def of_text(tmp_path, monkeypatch):
    """A command that trains on a text, which has validation data of its own."""
    gpt = entries.Network(Bigrams, kind="text")
    monkeypatch.setitem(registry.MODELS, "gpt", gpt)
    (tmp_path / "book.txt").write_text("ab cd " * 2000, "utf-8")
    command = "frontier --smoke --dataset text --model gpt --looks 3 --batch-size 16"
    return [*command.split(), "--optimizers", "sam", "--data-dir", str(tmp_path)]


def test_the_weights_of_the_best_look_are_measured_once(of_text, tmp_path, monkeypatch):
    measured, losses = [], itertools.cycle([2.0, 1.0, 3.0])

    def make_measure(*_, loss_examples=None, **__):
        def measure(setup, state, start):
            measured.append(int(state.step))
            found = dict.fromkeys(measures.Measurement._fields, 1.0)
            found |= {"test_accuracy": None}
            found["train_loss"] = -1.0 if loss_examples is None else loss_examples
            return measures.Measurement(**found), start

        return measure

    means = lambda *_: (next(losses), 0.0)
    monkeypatch.setattr(measures, "make_measure", make_measure)
    monkeypatch.setattr(measures, "make_means", lambda _: means)
    assert cli.main([*of_text, "--out", str(tmp_path / "out")]) == 0
    runs = figures(tmp_path / "out")
    assert [run["step"] for run in runs] == measured == [6, 12, 6]  # of 9, 18 and 9
    for run in runs:
        assert run["train_loss"] == -1  # of all examples
        assert run["held_loss"] == 1


def test_a_best_look_comes_out_of_a_checkpoint(of_text, tmp_path, monkeypatch):
    make_means = measures.make_means

    def turned(model):  # the first look is the best
        means = make_means(model)
        return lambda *args: (10 - means(*args)[0], 0.0)

    monkeypatch.setattr(measures, "make_means", turned)
    command = [*of_text, "--batch-size", "12", "--out"]  # 12 steps, no kept program
    assert cli.main([*command, str(tmp_path / "whole")]) == 0
    kills = kills_until_done([*command, str(tmp_path / "parts")], monkeypatch)
    assert kills == 6  # two looks on the way of each run
    runs = figures(tmp_path / "parts")
    assert [run["step"] for run in runs] == [4, 8, 4]
    assert runs == figures(tmp_path / "whole")


def test_a_candidate_that_diverges_is_not_chosen(tmp_path):
    rates = ["--learning-rates", "1e30", "0.05", "--out", str(tmp_path)]
    alphas = ["--paper-alphas", "0.2", "--alphas", "1"]
    assert cli.main([*ACCURACY, *rates, *alphas]) == 0
    first, second, *others = figures(tmp_path)
    assert first["learning_rate"] == 1e30
    assert "lower the learning rate (now 1e+30)" in first["diverged"]
    assert first["test_accuracy"] == 0 < second["test_accuracy"]
    assert {run["learning_rate"] for run in others} == {0.05}


def test_a_run_that_two_tables_share_is_done_once(tmp_path, monkeypatch):
    trained = []
    make_runs = study.make_runs

    def counting(*args):
        do = make_runs(*args)
        return lambda job, say: trained.append(job) or do(job, say)

    monkeypatch.setattr(study, "make_runs", counting)
    only_sam = lambda rho, alpha: [("sam", methods.Setup("sam", rho))]
    monkeypatch.setattr(ablations, "_pair", only_sam)  # half of the compilations
    command = [*ABLATE, "parts", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    found = figures(tmp_path)
    assert len(trained) == len(set(trained)) < len(found)
    rows = {(run["table"], run["row"]): run for run in found}
    same, copy = rows["when", "sam, every step"], rows["parts", "sam, 1 parts"]
    place = {"table": "parts", "row": "sam, 1 parts"}
    assert {key: x for key, x in same.items() if key != "curves"} | place == copy
    assert rows["when", "sgd"]["radius"] == 0
    of_sam = [run for (table, row), run in rows.items() if row.startswith("sam, ")]
    late = rows["when", "sam, the last 10% of steps"]
    some = rows["when", "sam, every 2 steps"]
    assert late in of_sam
    assert some in of_sam
    for run in of_sam:  # of the steps that perturb alone
        np.testing.assert_allclose(run["radius"], run["rho"], rtol=1e-5)


def test_more_seeds_are_added_to_those_that_are_there(unbroken, tmp_path):
    for seeds in ("1", "2"):
        command = [*ACCURACY, "--seeds", seeds, "--out", str(tmp_path)]
        assert cli.main(command) == 0
    found = figures(tmp_path)
    assert found[: len(figures(unbroken))] == figures(unbroken)
    assert sum(run["seed"] == 1 for run in found) == 7


@pytest.mark.parametrize(
    ("arguments", "wrong", "right"),
    [
        (["--label-noise", "1.5"], "--label-noise", "1.5"),
        (["--rho", "0"], "'0'", "number above 0"),
        (["--tables", "norms"], "--tables norms", "batch normalisation"),
        (["--tables", "parts", "--batch-size", "100"], "--batch-size 100", "16"),
        (["--tables", "parts", "--model", "norm_cnn"], "--tables parts", "norm_cnn"),
    ],
)
def test_what_cannot_be_run_is_refused_before_any_training(
    arguments, wrong, right, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(training, "make_run", None)  # training would fail
    error = error_of([*ABLATE[:4], *arguments, "--out", str(tmp_path)], capsys)
    assert wrong in error
    assert right in error


def test_rates_of_sgd_are_not_tried_for_another_base(tmp_path, capsys):
    command = ["frontier", "--base-optimizer", "adamw", "--out", str(tmp_path)]
    error = error_of(command, capsys)
    assert "--base-optimizer adamw: give its --learning-rates" in error
    assert "around 0.001" in error


@pytest.mark.parametrize(
    ("option", "others"),
    [("--rhos", ()), ("--asam-rhos", ("--rhos", "1", "2", "--optimizers", "asam"))],
)
def test_each_method_has_as_many_trials(option, others, tmp_path, capsys):
    command = ["frontier", "--learning-rates", "0.1", "0.2", option, "0.3", *others]
    error = error_of([*command, "--out", str(tmp_path)], capsys)
    assert f"{option}: 1 trials and 2 of --learning-rates" in error


@pytest.mark.parametrize(
    ("option", "able"),
    [("--asam-rhos", "asam"), ("--alphas", "eigen_sam_paper or eigen_sam or eigen_")],
)
def test_a_grid_of_a_method_that_is_not_trained_is_refused(
    option, able, tmp_path, capsys
):
    command = ["frontier", "--optimizers", "sam", option, "1", "--out", str(tmp_path)]
    assert f"{option}: name {able}" in error_of(command, capsys)


def test_where_no_perturbation_differs_each_row_has_its_curves(tmp_path):
    command = ["compare", "--smoke", "--looks", "5", "--rho", "0", "--out"]
    names = ["--optimizers", "sam", "eigen_sam", "sam_matched"]
    assert cli.main([*command, str(tmp_path), *names]) == 0
    assert (tmp_path / "compare.png").exists()
    curves = {run["row"]: run["curves"] for run in figures(tmp_path)}
    assert curves["sam"] == curves["sam_matched"]


def test_a_batch_larger_than_what_is_tuned_on_is_refused(tmp_path, capsys):
    command = [*ACCURACY, "--batch-size", "1400", "--out", str(tmp_path)]
    assert "--batch-size 1400 is more than the 1293" in error_of(command, capsys)
