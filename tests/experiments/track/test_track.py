import io
import json
import subprocess
import sys

import numpy as np
import pytest
from command_line import assert_refused
from rich.console import Console

from eigensam_jax.experiments import cli
from eigensam_jax.experiments.records import images
from eigensam_jax.experiments.registry import TRACKERS
from eigensam_jax.experiments.track import plots, tables
from eigensam_jax.experiments.track import run as track
from eigensam_jax.experiments.training import loop

SMALL = ["track", "--smoke", "--steps", "6"]
pytestmark = pytest.mark.usefixtures("quick")
TIMES = ("wall_time_s", "commands")
JOB = ("optimizer", "tracker", "alpha", "seed")


def without_times(results):
    return {key: value for key, value in results.items() if key not in TIMES}


@pytest.fixture(scope="module")
def uninterrupted(quick, tmp_path_factory):
    """Two trackers, one of them a ceiling, at two α, from two seeds."""
    out = tmp_path_factory.mktemp("track")
    names = ["power_iteration", "every_product"]
    asked = ["--seeds", "2", "--alpha", "0.5", "2", "--trackers", *names]
    assert cli.main([*SMALL, *asked, "--out", str(out)]) == 0
    return out, asked, json.loads((out / "results.json").read_text())


def test_every_run_has_its_sam_at_its_radius(uninterrupted):
    _, _, results = uninterrupted
    assert results["complete"] is True
    runs = {tuple(run[key] for key in JOB): run for run in results["runs"]}
    expected = {("sam", None, None, seed) for seed in (0, 1)} | {
        job
        for seed in (0, 1)
        for alpha in (0.5, 2.0)
        for job in (
            ("eigen_sam", "power_iteration", alpha, seed),
            ("sam_matched", "power_iteration", alpha, seed),
            ("eigen_sam", "every_product", alpha, seed),  # a ceiling has none
        )
    }
    assert set(runs) == expected
    assert len(results["runs"]) == len(expected)
    for (optimizer, name, alpha, seed), run in runs.items():
        np.testing.assert_allclose(run["lambda_max_residual"], 0, atol=0.02)
        if optimizer == "eigen_sam":
            assert 0.1 < run["radius"] <= 0.1 * np.sqrt(1 + alpha**2)
            assert run["curves"]["step"] == [1, 5]
            assert run["worst_ratio"] <= run["ratio"] <= 1
            assert 0 <= run["cosine"] <= 1
        if optimizer == "sam_matched":
            of_tracker = runs["eigen_sam", name, alpha, seed]
            assert run["rho"] == of_tracker["radius"]
            np.testing.assert_allclose(run["radius"], run["rho"], rtol=1e-5)
            assert run["lambda_max"] != of_tracker["lambda_max"]


def test_the_command_says_what_came_out(uninterrupted, capsys):
    out, asked, results = uninterrupted
    assert cli.main([*SMALL, *asked, "--out", str(out)]) == 0  # nothing is left to do
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    runs = results["runs"]
    rows = [*tables.summary(runs, 0.5), *tables.summary(runs, 2.0)]
    rows += tables.differences(runs)
    assert [row[0] for row in rows] == [
        *(2 * ["sam", "power_iteration", "every_product"]),
        *(2 * ["power_iteration"]),
    ]
    printed = [" ".join(line.split()) for line in lines]
    for row in rows:
        assert " ".join(row) in printed  # none is broken
    assert sorted(p.name for p in out.iterdir()) == ["results.json", "track.png"]


def test_what_is_there_is_kept_and_the_rest_is_run(
    uninterrupted, tmp_path, capsys, monkeypatch
):
    """An interrupted smaller command, carried on by a larger one: the same file."""
    _, asked, expected = uninterrupted
    make_run, started = loop.make_run, []

    def interrupted(*args):
        run = make_run(*args)

        def until_third(*job, **options):
            started.append(job)
            for point in run(*job, **options):
                yield point
                if len(started) == 3:
                    raise KeyboardInterrupt

        return until_third

    monkeypatch.setattr(loop, "make_run", interrupted)
    smaller = ["--seeds", "1", "--alpha", "2", "--trackers", "power_iteration"]
    assert cli.main([*SMALL, *smaller, "--out", str(tmp_path)]) == 130
    assert "2 finished runs" in capsys.readouterr().out
    path = tmp_path / "results.json"
    assert json.loads(path.read_text())["complete"] is False

    assert cli.main([*SMALL, *asked, "--out", str(tmp_path)]) == 0
    results = json.loads(path.read_text())
    assert without_times(results) == without_times(expected)
    assert len(started) == 3 + len(expected["runs"]) - 2
    first, second = results["commands"]
    assert first.startswith("eigensam track --smoke --steps 6 --seeds 1 --alpha 2")
    assert second.startswith("eigensam track --smoke --steps 6 --seeds 2")
    assert results["trackers"]["power_iteration"] == (
        "power_iteration(num_matvecs=5, update_interval=100)"
    )


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        ({"steps": 7}, "another configuration (steps 7, now 6)"),
        ({"versions": {"jax": "0.0"}}, "another configuration (jax 0.0, now"),
        ({"device": {"cores": 99}}, "another configuration (cores 99, now"),
        ({"trackers": {"every_product": "x"}}, "(every_product x, now every_product("),
        ("{", "cannot be read"),
        ('{"runs": []}', "cannot be read"),
        ("[]", "cannot be read"),
    ],
)
def test_results_of_something_else_are_refused(
    uninterrupted, tmp_path, capsys, monkeypatch, found, wrong
):
    path, (_, asked, results) = tmp_path / "results.json", uninterrupted
    results = json.loads(json.dumps(results))
    if isinstance(found, str):
        path.write_text(found)
    else:
        results["config"]["steps"] = found.get("steps", 6)
        for key in ("versions", "device", "trackers"):
            results[key] |= found.get(key, {})
        path.write_text(json.dumps(results))
    before = path.read_bytes()
    monkeypatch.setattr(loop, "make_run", None)
    assert cli.main([*SMALL, *asked, "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert f"--out {tmp_path}" in captured.err
    assert wrong in captured.err
    assert "name another folder" in captured.err
    assert path.read_bytes() == before


def test_values_that_are_recorded_alike_are_one(monkeypatch):
    asked = []
    monkeypatch.setattr(track, "run", lambda chosen, command: asked.append(chosen))
    assert cli.main([*SMALL, "--alpha", "1.0000001", "1.0000002", "2"]) == 0
    assert asked[0].alpha == (1, 2)


@pytest.mark.parametrize(
    ("options", "wrong", "right"),
    [
        ("--alpha 0", "'0'", "number above 0"),
        ("--alpha 0.2 x", "'x'", "number above 0"),
        ("--steps 0", "'0'", "whole number above 0"),
        ("--trackers secant nothing", "'nothing'", "'power_iteration'"),
        ("--model vgg", "'vgg'", "'strided_cnn'"),
        ("--dataset mnist", "needs --data-dir", "four idx files"),
        ("--out pyproject.toml", "pyproject.toml", "name another folder"),
    ],
)
def test_a_bad_option_ends_with_one_line(
    options, wrong, right, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(loop, "make_run", None)  # training would fail
    assert_refused("track", options, wrong, right, capsys, monkeypatch, tmp_path)


def test_a_run_that_diverges_ends_with_what_to_do(tmp_path, capsys):
    rate = ["--learning-rate", "1e30", "--trackers", "secant"]
    assert cli.main([*SMALL, *rate, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "sam, seed 0: the training loss is nan" in error
    assert "lower the learning rate (now 1e+30)" in error


def test_help_fits_a_screen():
    code = (
        "import sys; from eigensam_jax.experiments import cli\n"
        "try: cli.main(['track', '--help'])\n"
        "except SystemExit: print({'flax', 'rich', 'scipy'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    *lines, imported = result.stdout.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert imported == "set()"


def made_up(optimizer, name, alpha, seed, value):
    keys = ("radius", "lambda_max", "train_loss", "test_accuracy", "ratio", "cosine")
    return {
        **dict(zip(JOB, (optimizer, name, alpha, seed), strict=True)),
        **dict.fromkeys(keys, value),
        "worst_ratio": value - seed,
    }


def test_the_summary_is_over_the_seeds_of_one_alpha():
    runs = [
        made_up("eigen_sam", "lanczos", 1.0, 0, 1.0),
        made_up("eigen_sam", "lanczos", 1.0, 1, 3.0),
        made_up("eigen_sam", "lanczos", 0.2, 0, 9.0),
        made_up("eigen_sam", "secant", 1.0, 0, 0.5),
        made_up("sam_matched", "secant", 1.0, 0, 9.0),
        made_up("sam", None, None, 0, 2.0),
    ]
    sam, lanczos, secant = tables.summary(runs, 1.0)
    assert sam == ["sam", "–", "–", "–", "–", "2.00", "2.0000", "200.0"]
    # 1 and 3: mean 2, standard deviation √2; the worst look is the least, 3 − 1 or 1.
    assert lanczos == [
        *("lanczos", "5", "2.00 ± 1.41", "1.00", "2.00"),
        *("2.00 ± 1.41", "2.0000", "200.0 ± 141.4"),
    ]
    assert secant[:4] == ["secant", "0", "0.50", "0.50"]


def test_a_row_of_the_plot_is_one_tracker_whatever_alphas_it_has(tmp_path, monkeypatch):
    curves = {"curves": {"step": [1, 2], "ratio": [0.5, 0.5]}}
    runs = [
        made_up(optimizer, name, alpha, 0, value) | curves
        for name, alpha, value in (
            ("secant", 0.2, 1.0),
            ("lanczos", 0.2, 2.0),
            ("lanczos", 1.0, 3.0),
        )
        for optimizer, value in (("eigen_sam", value), ("sam_matched", 0.0))
    ]
    drawn = []
    monkeypatch.setattr(images, "save", lambda figure, path: drawn.append(figure))
    plots.track(runs, "it", tmp_path / "track.png")
    (_, _, few, all_of_one, *_), names = drawn[0].axes, ("Lanczos", "secant")
    labels = [text.get_text() for text in few.get_yticklabels()]
    assert tuple(labels) == names
    where = [
        {
            y: x
            for line in axes.lines[:-1]
            for x, y in zip(*line.get_data(), strict=True)
        }
        for axes in (few, all_of_one)
    ]
    assert where[0][0] == 2
    assert where[0][1] == 1
    assert where[1][0] == 3
    assert np.isnan(where[1][1])


def test_the_differences_are_paired_by_seed():
    values = {"eigen_sam": (1.0, 2.0, 6.0), "sam_matched": (0.0, 1.0, 2.0)}
    runs = [
        made_up(optimizer, "secant", 1.0, seed, value)
        for optimizer, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    ]
    runs.append(made_up("eigen_sam", "secant", 1.0, 3, 100.0))  # not matched yet
    runs.append(made_up("eigen_sam", "lanczos", 1.0, 0, 100.0))
    # Differences 1, 1, 4: mean 2, standard deviation √3, t(0.975, 2) = 4.303.
    assert tables.differences(runs) == [
        [
            *("secant", "1", "3.000", "+2.000 ± 4.303"),
            *("+2.00000 ± 4.30265", "+200.00 ± 430.27"),
        ]
    ]


def test_rows_of_usual_figures_fit_a_terminal():
    runs = [
        {
            **made_up("eigen_sam", name, 1.0, seed, 0.8123),
            "test_accuracy": 0.86 + 0.001 * seed,
            "lambda_max": 2.5 + seed,
            "radius": 0.316,
        }
        for name in TRACKERS
        for seed in range(5)
    ]
    console = Console(width=80, file=io.StringIO())
    console.print(tables.table(runs, 1.0, "fashion_mnist, strided_cnn"))
    lines = console.file.getvalue().splitlines()
    printed = [" ".join(line.split()) for line in lines]
    for row in tables.summary(runs, 1.0):
        assert " ".join(row) in printed
