"""The pages say what the results files say, and `eigensam report` makes them."""

import json
import shutil
from pathlib import Path

import pytest
from command_line import error_of

from eigensam_jax.experiments import cli, report

ROOT = Path(__file__).parents[2]
FOUND = report.results_of(ROOT)
PAGES = list(report.pages_of(ROOT))
MARK = "<!-- report: compare_digits summary main -->\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_no_page_would_change(page):
    text = page.read_text()
    assert report.rendered(text, FOUND, page.name) == text


@pytest.mark.parametrize("folder", list(FOUND))
def test_results_are_complete_and_in_a_table_with_their_command(folder):
    document = FOUND[folder]
    pages = "".join(page.read_text() for page in report.pages_of(ROOT))
    assert document["complete"]
    assert any(f"report: {x}" in pages for x in (folder, f"track_mlp+{folder}"))
    for command in document["commands"]:
        assert f"`{command}`" in pages
        assert f"results/{folder}" in command
        assert " /" not in command, "a path of the machine that ran it"


def test_rows_are_replaced_and_headers_are_not():
    page = f"Before.\n\n{MARK}| a | b |\n| --- | --- |\n| old | 0 |\n\nAfter.\n"
    new = report.rendered(page, FOUND, "page")
    assert new.startswith(f"Before.\n\n{MARK}| a | b |\n| --- | --- |\n| adamw | ")
    assert new.endswith(" |\n\nAfter.\n")
    assert "| old | 0 |" not in new
    assert report.rendered(new, FOUND, "page") == new


def test_what_follows_a_blank_line_is_kept():
    text = "<!-- report: compare_digits run -->\n\nA line.\n\nAnother.\n"
    page = report.rendered(text, FOUND, "page")
    mark, line, *rest = page.split("\n")
    assert mark == "<!-- report: compare_digits run -->"
    assert line.startswith("5 seeds, ")
    assert "\n".join(rest) == "\nA line.\n\nAnother.\n"


def test_a_page_without_marks_stays_as_it_is():
    assert report.rendered("| a |\n| --- |\n| 1 |\n", FOUND, "page").endswith("| 1 |\n")


@pytest.mark.parametrize("mark", ["nowhere summary", "compare_digits nothing"])
def test_what_there_is_not_is_named(mark):
    page = f"<!-- report: {mark} -->\n| a |\n| --- |\n"
    with pytest.raises(report.UserError, match=mark.split()[0]) as raised:
        report.rendered(page, FOUND, "page.md")
    assert "page.md asks for the table" in str(raised.value)
    assert "compare_digits" in str(raised.value)


@pytest.mark.parametrize(
    ("mark", "reason"),
    [
        ("compare_digits summary mein", "no table mein; name a table of main"),
        ("compare_digits frontier steps", "no table steps; name a table of main"),
        ("frontier_vit over_training lambda_max", "no table main; name a table of"),
        ("track_mlp track x", "could not convert string to float"),
        ("spectrum_digits spectrum", "invalid literal"),
        ("bench_cpu bench mlp", "'mlp'"),
    ],
)
def test_what_a_table_is_not_of_is_named(mark, reason):
    page = f"<!-- report: {mark} -->\n| a |\n| --- |\n"
    with pytest.raises(report.UserError, match=reason) as raised:
        report.rendered(page, FOUND, "page.md")
    assert "page.md asks for the table" in str(raised.value)


def test_a_page_that_is_no_text_is_named(tmp_path, capsys):
    folder = tmp_path / report.FOLDER / "compare_digits"
    shutil.copytree(ROOT / report.FOLDER / "compare_digits", folder)
    page = tmp_path / "README.md"
    page.write_bytes(b"\xff\xfe")
    assert f"{page} is not text" in error_of(
        ["report", "--root", str(tmp_path)], capsys
    )


@pytest.mark.usefixtures("drawn")
def test_the_command_writes_pages_and_plots(tmp_path, capsys):
    folder = tmp_path / report.FOLDER / "spectrum_digits"
    shutil.copytree(ROOT / report.FOLDER / "spectrum_digits", folder)
    (folder / "spectrum.png").unlink()
    page = tmp_path / "README.md"
    page.write_text(
        "<!-- report: spectrum_digits spectrum 2 -->\n| i | λ |\n| --- | --- |\n"
    )
    assert cli.main(["report", "--only", "track", "--root", str(tmp_path)]) == 0
    assert capsys.readouterr().out == ""  # of which there is nothing here
    assert cli.main(["report", "--root", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert str(page) in printed
    assert (folder / "spectrum.png").stat().st_size > 1000
    first, second = page.read_text().splitlines()[3:]
    document = json.loads((folder / "results.json").read_text())
    assert f"{document['runs'][0]['eigenvalues'][0]:.4f}" in first
    assert second.startswith("| 2 | ")
    assert cli.main(["report", "--root", str(tmp_path)]) == 0
    assert str(page) not in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[1]", "\x00", '{"schema": 0}', '{"schema": 1}'),
        '{"schema": 1, "commands": [], "complete": true, "runs": [{}]}',
        '{"schema": 1, "commands": ["python x"], "complete": true, "runs": [{}]}',
        '{"schema": 1, "commands": ["eigensam sde"], "complete": true, "runs": []}',
    ],
)
def test_a_damaged_file_is_named(content, tmp_path, capsys):
    folder = tmp_path / report.FOLDER / "compare_digits"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(content)
    error = error_of(["report", "--root", str(tmp_path)], capsys)
    assert str(folder / "results.json") in error


def test_what_is_not_complete_is_refused_before_anything_is_written(tmp_path, capsys):
    for name in ("spectrum_digits", "compare_digits"):
        shutil.copytree(ROOT / report.FOLDER / name, tmp_path / report.FOLDER / name)
    path = tmp_path / report.FOLDER / "compare_digits" / "results.json"
    document = json.loads(path.read_text()) | {"complete": False}
    path.write_text(json.dumps(document))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    error = error_of(["report", "--root", str(tmp_path)], capsys)
    assert "compare_digits is not complete; finish it: eigensam compare" in error
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    only = ["report", "--only", "spectrum", "--root", str(tmp_path)]
    assert cli.main(only) == 0  # which it is no part of


def test_a_folder_without_results_is_refused(tmp_path, capsys):
    assert str(tmp_path) in error_of(["report", "--root", str(tmp_path)], capsys)
