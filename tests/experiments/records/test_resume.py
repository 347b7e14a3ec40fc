"""`eigensam compare` that is killed and goes on, and what it refuses to go on with."""

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import error_of

from eigensam_jax import trackers
from eigensam_jax.experiments import cli, entries, registry
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.records import checkpoints, results, resumption
from eigensam_jax.experiments.study import plots as study_plots
from eigensam_jax.experiments.study.jobs import CHECKPOINT
from eigensam_jax.experiments.training import loop as training
from eigensam_jax.experiments.training import measures

LOOKS = 3  # at a run, of which the last leaves no checkpoint
SMALL = ["compare", "--smoke", "--epochs", "2", "--looks", str(LOOKS)]
SMALL += ["--optimizers", "eigen_sam", "sam_matched"]
FILES = ["compare.png", "results.json"]


class Killed(BaseException):
    """What nothing catches, as SIGKILL."""


def figures(out):
    """The results file without times and command lines."""
    found = json.loads((out / "results.json").read_text())
    assert found["complete"] is True
    for run in found["runs"]:
        assert run.pop("training_time_s") > 0
    assert found.pop("wall_time_s") > 0
    del found["commands"], found["config"]["out"]
    return found


def make_measure(*_, **__):
    """A look that sees every bit of the training, and how often it looked before."""

    def measure(setup, state, looks):
        del setup
        leaves = jax.tree.leaves(state)
        content = b"".join(np.asarray(x).tobytes() for x in leaves)
        number = int.from_bytes(hashlib.sha256(content).digest()[:6])
        looks = jnp.zeros(1) if looks is None else looks
        seen = dict.fromkeys(measures.Measurement._fields, number)
        seen |= {"held_loss": None, "alignment": float(looks[0])}
        return measures.Measurement(**seen), looks + 1

    return measure


class Tiny(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, images):
        return nn.Dense(self.classes)(images.reshape(len(images), -1))


@pytest.fixture(scope="module")
def quick():
    """Few compilations: what one call of the command compiles is there for the next."""
    make_run = training.make_run
    run = cache(lambda settings: make_run(*shared, settings))
    shared = []

    def from_cache(model, dataset, measure, settings):
        shared[:] = shared or [model, dataset, measure]
        return run(settings)

    refreshing = entries.Tracking(
        trackers.power_iteration, {"num_matvecs": 1, "update_interval": 4}, 1
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_run", from_cache)
        patch.setitem(registry.MODELS, "mlp", entries.Network(Tiny))
        patch.setitem(registry.TRACKERS, "secant", refreshing)
        patch.setattr(measures, "make_measure", make_measure)
        touch = lambda runs, title, path: path.touch()
        patch.setitem(study_plots.DRAW, "compare", touch)
        yield


@pytest.fixture(scope="module")
def unbroken(quick, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    assert cli.main([*SMALL, "--out", str(out)]) == 0
    for run in figures(out)["runs"]:
        assert run["curves"]["alignment"] == [0, 1, 2]
        assert len(set(run["curves"]["train_loss"])) == LOOKS
    return out


def killed(arguments, *, at, by=Killed, module=checkpoints, before=False):
    """Ends the command in, or right after, the `at`-th call of the module's `write`."""
    write, calls = module.write, []

    def killing(path, content):
        calls.append(path)
        if before and len(calls) == at:
            path.with_name(path.name + ".part").write_bytes(b"half of it")
            raise by
        write(path, content)
        if len(calls) == at:
            raise by

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write", killing)
        if by is Killed:
            with pytest.raises(Killed):
                cli.main(arguments)
        else:
            assert cli.main(arguments) == 130


def test_killed_after_every_checkpoint_it_comes_to_the_same(unbroken, tmp_path):
    command = [*SMALL, "--out", str(tmp_path)]
    for _ in range(2 * (LOOKS - 1)):
        killed(command, at=1)
    assert cli.main(command) == 0
    assert figures(tmp_path) == figures(unbroken)
    assert sorted(p.name for p in tmp_path.iterdir()) == FILES


@pytest.mark.parametrize(
    "where",
    [
        {"at": 2, "before": True},
        {"at": LOOKS, "before": True},
        {"at": 1, "module": results, "before": True},
        {"at": 1, "module": results},
    ],
    ids=["in a checkpoint", "in the next run's", "before results", "after results"],
)
def test_killed_in_between_it_comes_to_the_same(where, unbroken, tmp_path):
    command = [*SMALL, "--out", str(tmp_path)]
    killed(command, **where)
    assert cli.main(command) == 0
    assert figures(tmp_path) == figures(unbroken)
    assert sorted(p.name for p in tmp_path.iterdir()) == FILES


@pytest.fixture(scope="module", params=[1, LOOKS], ids=["first run", "second run"])
def unfinished(request, quick, tmp_path_factory):
    """In the middle of the first run, when there are no results, or of the second."""
    out = tmp_path_factory.mktemp("unfinished")
    killed([*SMALL, "--out", str(out)], at=request.param)
    assert (out / "results.json").exists() == (request.param == LOOKS)
    return out


def untouched(out, arguments, capsys, monkeypatch):
    """The error of a command that is refused, and leaves all as it was."""
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    monkeypatch.setattr(training, "make_run", None)
    error = error_of([*arguments, "--out", str(out)], capsys)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert str(out) in error
    return error


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ("--alpha 0.5", "(alpha 1.0, now 0.5)"),
        ("--batch-size 64", "(batch_size 128, now 64)"),
        ("--model cnn", "(model mlp, now cnn)"),
        ("--train-examples 1000", "(train_examples 1437, now 1000)"),
        ("--curvature-examples 9", "(curvature_examples 1437, now 9)"),
        (
            "--optimizers sgd",
            "(optimizers ['eigen_sam', 'sam_matched'], now ['sgd'])",
        ),
    ],
)
def test_another_configuration_is_refused_by_name(
    options, difference, unfinished, capsys, monkeypatch
):
    command = [*SMALL, *options.split()]
    error = untouched(unfinished, command, capsys, monkeypatch)
    assert difference in error
    assert "name another folder" in error


@pytest.mark.parametrize(
    "part", ["train_images", "train_labels", "test_images", "test_labels"]
)
def test_other_data_of_the_same_size_are_refused(part, unfinished, capsys, monkeypatch):
    digits = registry.dataset("digits")
    others = digits._replace(**{part: getattr(digits, part)[::-1]})
    monkeypatch.setattr(registry, "dataset", lambda *_: others)
    error = untouched(unfinished, SMALL, capsys, monkeypatch)
    assert "(data_crc32 " in error


def test_fewer_seeds_than_were_begun_are_refused(unbroken, tmp_path, capsys):
    document = results.read(unbroken / "results.json")
    del document["schema"]
    runs = document["runs"]
    begun = [*runs, {**runs[0], "seed": 1}]  # ends after the first of two seeds
    path = tmp_path / "results.json"
    results.write(path, {**document, "runs": begun, "complete": False})
    before = path.read_bytes()
    error = error_of([*SMALL, "--out", str(tmp_path)], capsys)
    assert "a part of the runs of 2 seeds; finish them by --seeds 2" in error
    assert path.read_bytes() == before
    results.write(path, {**document, "runs": begun, "complete": True})
    assert cli.main([*SMALL, "--out", str(tmp_path)]) == 0


def test_a_file_from_before_data_had_a_checksum_goes_on(tmp_path):
    now, other = ({"config": {"epochs": 1, "data_crc32": x}} for x in (5, 6))
    resumption.check_same(tmp_path, {"config": {"epochs": 1}}, now)
    with pytest.raises(UserError, match="data_crc32 6, now 5"):
        resumption.check_same(tmp_path, other, now)


@pytest.mark.parametrize("damage", ["cut off", "changed", "empty"])
def test_a_damaged_checkpoint_is_refused(
    damage, unfinished, tmp_path, capsys, monkeypatch
):
    content = bytearray((unfinished / CHECKPOINT).read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"cut off": content[:-1], "changed": content, "empty": b""}[damage]
    (tmp_path / CHECKPOINT).write_bytes(damaged)
    error = untouched(tmp_path, SMALL, capsys, monkeypatch)
    assert "is damaged; delete it" in error


def test_a_results_file_of_something_else_is_refused(
    unbroken, tmp_path, capsys, monkeypatch
):
    for content in ("{}", "no json"):
        (tmp_path / "results.json").write_text(content)
        assert "name another folder" in untouched(tmp_path, SMALL, capsys, monkeypatch)


def test_it_has_nothing_to_do_at_the_end(unbroken, tmp_path, capsys, monkeypatch):
    command = [*SMALL, "--out", str(tmp_path)]
    assert cli.main(command) == 0
    before = json.loads((tmp_path / "results.json").read_text())
    printed = capsys.readouterr().out
    monkeypatch.setattr(training, "make_run", None)
    assert cli.main(command) == 0
    assert capsys.readouterr().out == printed
    assert json.loads((tmp_path / "results.json").read_text()) == before


def test_a_folder_that_was_moved_is_gone_on_with(unbroken, tmp_path):
    killed([*SMALL, "--out", str(tmp_path / "before")], at=LOOKS)
    now = (tmp_path / "before").rename(tmp_path / "now")
    assert cli.main([*SMALL, "--out", str(now)]) == 0
    assert figures(now) == figures(unbroken)


def test_data_that_were_moved_are_the_same(tmp_path):
    path, config = tmp_path / "results.json", {"data_dir": "here", "epochs": 1}
    results.write(path, resumption.of_runs(path, "first", config))
    moved = resumption.of_runs(path, "second", config | {"data_dir": "there"})
    assert moved["commands"] == ["first", "second"]
    assert moved["config"]["data_dir"] == "there"


def test_what_an_older_version_did_not_say_was_the_default(tmp_path):
    path, config = tmp_path / "results.json", {"epochs": 1, "momentum": 0.9}
    results.write(path, resumption.of_runs(path, "first", config))
    now = config | {"base_optimizer": "sgd", "weight_decay": 0.0}
    assert resumption.of_runs(path, "second", now)["config"] == now
    for key, value in {"base_optimizer": "adamw", "weight_decay": 0.1}.items():
        with pytest.raises(UserError, match=f"{key} (sgd|0.0), now {value}"):
            resumption.of_runs(path, "second", now | {key: value})


def test_a_job_is_found_by_its_rounded_numbers():
    jobs = [{"rho": 10 * x, "seed": 0} for x in (0.07, 0.14, 0.1)]
    runs = [results.rounded(job) for job in jobs[:2]]
    assert jobs[0] != runs[0]
    assert resumption.missing(jobs, runs) == [jobs[2]]


def test_finished_runs_are_kept_where_the_checkpoint_is_lost(unbroken, tmp_path):
    killed([*SMALL, "--out", str(tmp_path)], at=LOOKS)
    (tmp_path / CHECKPOINT).unlink()
    assert cli.main([*SMALL, "--out", str(tmp_path)]) == 0
    assert figures(tmp_path) == figures(unbroken)


def test_a_run_that_diverges_ends_the_command(quick, tmp_path, capsys, monkeypatch):
    make_run = training.make_run

    def diverging(*args):
        def run(*job):
            yield from (x for x in make_run(*args)(*job) if x.step < 0)
            raise training.DivergedError("lower --learning-rate")

        return run

    monkeypatch.setattr(training, "make_run", diverging)
    assert cli.main([*SMALL, "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "No run was finished.\n" in captured.out
    assert "lower --learning-rate" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_says_how_to_go_on(unbroken, tmp_path, capsys):
    command = [*SMALL, "--out", str(tmp_path)]
    killed(command, at=2, by=KeyboardInterrupt)
    assert "No run was finished." in capsys.readouterr().out
    killed(command, at=1, by=KeyboardInterrupt)
    said = "".join(capsys.readouterr().out.split())  # broken anywhere in the path
    assert "results.json;thesamecommandgoesonfromthere." in said
    assert cli.main(command) == 0
    assert figures(tmp_path) == figures(unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_sigkill_at_random_times(seed, tmp_path):
    """Three times, all optimizers, and compared with what another process found."""
    rng = random.Random(seed)
    command = [sys.executable, "-m", "eigensam_jax", "compare", "--seeds", "1"]
    command += ["--epochs", "20", "--out"]
    once, again = tmp_path / "once", tmp_path / "again"
    subprocess.run([*command, once], check=True, capture_output=True)
    checkpoint, command = again / CHECKPOINT, [*command, again]
    written = lambda: checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    for _ in range(3):
        before = written()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while written() == before and process.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 3))
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    subprocess.run(command, check=True, capture_output=True)
    assert figures(again) == figures(once)
