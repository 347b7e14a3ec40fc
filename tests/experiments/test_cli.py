import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
from command_line import assert_refused, error_of

from eigensam_jax.experiments import cli
from eigensam_jax.experiments.training import loop as training


@pytest.mark.usefixtures("quick", "drawn")
def test_compare_shows_the_difference(tmp_path, capsys):
    out = tmp_path / "results"
    command = ["compare", "--smoke", "--looks", "2", "--seeds", "2", "--out", str(out)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    names = ("adamw", "sam", "eigen_sam", "sam_matched")
    lines = printed.splitlines()
    rows = [line.split()[0] for line in lines if line.count("±") == 4]
    assert rows[:4] == list(names)  # none is broken
    assert "eigen_sam −" in printed
    assert max(map(len, lines)) <= 80
    assert sorted(p.name for p in out.iterdir()) == ["compare.png", "results.json"]

    results = json.loads((out / "results.json").read_text())
    assert results["complete"] is True
    assert results["commands"] == [f"eigensam {' '.join(command)}"]
    assert results["config"]["plan"]["alpha"] == 1.0
    assert results["config"]["base_optimizer"] == "adamw"
    assert {"jax", "optax", "eigensam_jax"} < set(results["versions"])
    assert results["device"]["platform"] in ("cpu", "gpu", "tpu")
    runs = {(run["row"], run["seed"]): run for run in results["runs"]}
    assert set(runs) == {(name, seed) for name in names for seed in (0, 1)}
    figures = ("train_loss", "test_accuracy", "lambda_max")
    for (name, seed), run in runs.items():
        curves = run["curves"]
        assert {len(curve) for curve in curves.values()} == {2}
        assert math.isfinite(run["alignment"] + run["lambda_max_residual"])
        mean = sum(curves["alignment"]) / 2
        assert run["alignment"] == pytest.approx(mean, rel=1e-5)  # curves have 6 digits
        for key in figures:
            assert math.isfinite(run[key])
            assert run[key] == pytest.approx(curves[key][-1], rel=1e-5)
        if name == "sam_matched":
            rho = run["rho"]
            assert rho == runs["eigen_sam", seed]["radius"]
            assert 0.2 < rho < 0.2 * math.sqrt(2)
            losses = [runs[n, seed]["train_loss"] for n in names]
            assert len(set(losses)) == len(names)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("options", "base", "rate"),
    [
        ("--base-optimizer adamw --optimizers adamw sam", "adamw", 0.001),
        ("--optimizers sgd sam", "sgd", 0.05),  # the one that is named
    ],
)
def test_what_takes_the_steps_is_recorded(options, base, rate, tmp_path, capsys):
    command = f"compare --smoke --weight-decay 0.1 {options} --out {tmp_path}"
    assert cli.main(command.split()) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [run["row"] for run in results["runs"]] == [base, "sam"]
    assert {run["learning_rate"] for run in results["runs"]} == {rate}
    config = results["config"]
    assert (config["base_optimizer"], config["weight_decay"]) == (base, 0.1)
    assert ("momentum" in config) == (base == "sgd")
    printed = capsys.readouterr().out
    assert f"sam − {base}" in printed
    assert "95%" not in printed  # of one seed


@pytest.mark.parametrize(
    ("options", "wrong", "right"),
    [
        ("--rho -1", "'-1'", "number of at least 0"),
        ("--rho nan", "'nan'", "number of at least 0"),
        ("--alpha x", "'x'", "number of at least 0"),
        ("--learning-rate 0", "'0'", "number above 0"),
        ("--epochs 0", "'0'", "whole number above 0"),
        ("--rho 1e300", "'1e300'", "number below 3e+38"),
        ("--seeds 1.5", "'1.5'", "whole number above 0"),
        ("--batch-size 9999", "9999", "at most 1437"),
        ("--train-examples 9999", "9999", "at most 1437"),
        ("--resolution 64", "--resolution 64: mlp", "leave it out"),
        ("--dataset imagenet", "'imagenet'", "'digits', 'fashion_mnist', 'mnist'"),
        ("--model vgg", "'vgg'", "'mlp', 'cnn'"),
        ("--optimizers sgd adam", "'adam'", "'asam', 'eigen_sam_paper'"),
        ("--optimizers sam_matched", "sam_matched", "name eigen_sam too"),
        ("--dataset mnist", "needs --data-dir", "four idx files"),
        ("--dataset mnist --data-dir nowhere", "nowhere", "four idx files"),
        ("--data-dir .", "digits", "leave --data-dir out"),
        ("--out pyproject.toml", "pyproject.toml", "name another folder"),
        ("--out=", "--out", "'' names no folder"),
        ("--data-dir=", "--data-dir", "'' names no folder"),
        ("--speed 3", "--speed", "--help"),
    ],
)
def test_a_bad_option_ends_with_one_line(
    options, wrong, right, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(training, "make_run", None)  # training would fail
    assert_refused("compare", options, wrong, right, capsys, monkeypatch, tmp_path)


def test_a_file_that_is_cut_off_ends_with_one_line(tmp_path, capsys):
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (tmp_path / name).write_bytes(bytes([0, 0, 8, 3, 0, 0]))
    code = cli.main(["compare", "--dataset", "mnist", "--data-dir", str(tmp_path)])
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert "train-images-idx3-ubyte" in error


@pytest.mark.usefixtures("quick")
def test_an_interruption_leaves_the_results_so_far(tmp_path, capsys, monkeypatch):
    make_run = training.make_run

    def interrupted(*shared):
        run = make_run(*shared)

        def until_sam(method, *args):
            for point in run(method, *args):
                yield point
                if method.optimizer == "sam":
                    raise KeyboardInterrupt

        return until_sam

    monkeypatch.setattr(training, "make_run", interrupted)
    options = ["--smoke", "--optimizers", "sgd", "sgd", "sam", "--out", str(tmp_path)]
    assert cli.main(["compare", *options]) == 130
    printed = capsys.readouterr().out
    assert f"1 finished runs are in {tmp_path}" in printed.replace("\n", "")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["complete"] is False
    assert [run["row"] for run in results["runs"]] == ["sgd"]


@pytest.mark.slow
def test_control_c_in_a_terminal(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "eigensam_jax", "compare", "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    path, deadline = tmp_path / "results.json", time.monotonic() + 120
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if path.exists() and json.loads(path.read_text())["runs"]:
            break
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "finished runs are in" in out
    assert json.loads(path.read_text())["complete"] is False


def test_python_dash_m_is_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "eigensam_jax", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith("eigensam_jax ")


@pytest.mark.parametrize(
    "command",
    [
        *("", "compare", "accuracy", "frontier", "ablate"),
        *("track", "spectrum", "sde", "bench", "after-training"),
    ],
)
def test_help_fits_a_screen(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        cli.main([*command.split(), "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    "given",
    [
        "compare --rho 0.1 --seed 7",
        "accuracy --rho 0.1",
        "track --step 3",
        "spectrum --num-sample 2",
        "sde --learning 0.1",
        "bench --model vit",
        "report --roo .",
        "--versio",
    ],
)
def test_no_option_is_taken_for_a_longer_one(given, capsys):
    assert "--help" in error_of(given.split(), capsys)
