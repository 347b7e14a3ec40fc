"""What the pages say in words of the results files; tables are `eigensam report`'s."""

import re
from pathlib import Path

import pytest

from eigensam_jax.experiments.records import results

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "notebooks" / "results"


FOLDERS = sorted(path.parent for path in RESULTS.glob("*/results.json"))
FINDINGS = (RESULTS / "findings.md").read_text()


def test_two_commands_set_everything_up():
    commands = [x for x in README.splitlines() if x.startswith("python3 -m venv .venv")]
    assert len(commands) == 2
    assert commands[0].endswith(" && .venv/bin/eigensam compare")
    assert commands[1].endswith(" && .venv/bin/pytest")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_page_names_its_machine_and_the_index_its_page(folder):
    page = (folder / "README.md").read_text()
    assert results.read(folder / "results.json")["device"]["processor"] in page
    assert f"({folder.name}/README.md)" in (RESULTS / "README.md").read_text()


def test_the_findings_are_a_page():
    prose = re.sub(r"^\|.*", "", FINDINGS, flags=re.MULTILINE)
    assert len(re.sub(r"\]\([^)]*\)", "", prose).split()) <= 1_500


MEASURED = re.compile(r"(\d+\.?\d*)%? ± (\d+\.?\d*)")


def test_what_is_found_stands_in_the_tables_of_the_pages_that_are_linked():
    seen = 0
    for paragraph in FINDINGS.split("\n\n"):
        if paragraph.startswith("<!-- report: "):  # in test_report
            continue
        linked = re.findall(r"\]\((\w+/README\.md)", paragraph)
        pages = "".join((RESULTS / link).read_text() for link in linked)
        table = "\n".join(x for x in pages.splitlines() if x.startswith("| "))
        cells = MEASURED.findall(table)
        for number in MEASURED.findall(" ".join(paragraph.split())):
            digits = [len(x.partition(".")[2]) for x in number]
            rounded = {
                tuple(f"{float(x):.{n}f}" for x, n in zip(cell, digits, strict=True))
                for cell in cells
            }
            assert number in rounded, paragraph
            seen += 1
    assert seen > 60


def test_what_is_said_of_the_equations_is_in_their_results_file():
    folder = RESULTS / "sde_mnist"
    page = " ".join((folder / "README.md").read_text().split())
    found = results.read(folder / "results.json")
    config, seeds = found["config"], {run["seed"] for run in found["runs"]}
    assert f"{found['wall_time_s']:.0f} s on" in page
    assert f"{config['num_batches']} fixed batches" in page
    assert f"{len(seeds)} seeds" in page
    assert f"{config['steps']} steps" in page
    assert f"{config['num_batches'] * config['batch_size']:,}" in page
