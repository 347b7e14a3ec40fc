"""The schema of results files: what is written is read, and another one is refused."""

import json
from pathlib import Path

import pytest

from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.records import results

ROOT = Path(__file__).parents[3]
COMMITTED = sorted(ROOT.glob("notebooks/results/*/*.json"))
KEYS = {"schema", "commands", "config", "versions", "device", "complete"}
KEYS |= {"wall_time_s", "runs"}


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_every_committed_file_has_the_schema(path):
    assert path.name == results.FILE
    document = results.read(path)
    assert KEYS <= set(document) <= KEYS | {"trackers"}
    assert document["complete"] is True
    for run in document["runs"]:
        assert type(run["seed"]) is int
        assert type(run["optimizer"]) is str
        assert run == results.rounded(run)
        nested = {key for key, x in run.items() if type(x) is dict}
        assert nested <= {"curves", "after"}
    texts = [x for run in document["runs"] for x in run.values() if type(x) is str]
    assert not any("(" in text for text in texts)  # no Python repr
    assert path.stat().st_size < 300_000


def test_all_together_are_small():
    assert sum(path.stat().st_size for path in COMMITTED) < 1_500_000


def test_what_is_written_is_read(tmp_path):
    document = {
        "config": {"rhos": [0.1, 0.2], "plan": {"tables": []}, "text": "a [b, {c"},
        "runs": [{"seed": 0, "curves": {"step": [1, 2], "loss": [0.5, None]}}, {}],
        "nodes": [[1, 2], [3, 4]],
        "empty": [],
    }
    path = tmp_path / "results.json"
    results.write(path, document)
    assert results.read(path) == {"schema": results.SCHEMA, **document}
    lines = path.read_text().splitlines()
    assert '    "step": [1,2],' in lines
    assert "  [1,2]," in lines
    results.write(path, results.read(path))
    assert path.read_text().splitlines() == lines


def test_a_folder_in_the_place_of_a_plot_is_found_at_once(tmp_path):
    (tmp_path / "any.png").touch()
    results.make_folder(tmp_path)
    (tmp_path / "compare.png").mkdir()
    with pytest.raises(UserError, match=r"compare\.png is a folder, where a plot goes"):
        results.make_folder(tmp_path)


def test_numbers_that_are_not_finite_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        results.write(tmp_path / "results.json", {"runs": [{"loss": float("nan")}]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("schema", [None, 0, 2, "1"])
def test_another_schema_is_refused(schema, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"schema": schema, "runs": []}))
    with pytest.raises(UserError) as raised:
        results.read(path)
    for part in (str(path), f"schema {schema}", f"reads {results.SCHEMA}"):
        assert part in str(raised.value)


def test_figures_keep_six_digits_and_whole_numbers_all():
    third = 1 / 3
    figures = {"loss": third, "step": 7, "operations": 2451595521.0, "last": None}
    figures |= {"time_s": [third], "curves": {"loss": [third, None, 12345678]}}
    figures |= {"lambda_max_residual": third, "residuals": [third]}
    assert results.rounded(figures) == {
        "loss": 0.333333,
        "step": 7,
        "operations": 2451595521.0,
        "last": None,
        "time_s": [0.333333],
        "curves": {"loss": [0.333333, None, 12345678]},
        "lambda_max_residual": 0.33,
        "residuals": [0.33],
    }
    assert results.rounded(results.rounded(figures)) == results.rounded(figures)
