"""What the README says is so: its code runs, its numbers are in the results files."""

import json
import re
from pathlib import Path

import pytest

from eigensam_jax.experiments import compare

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "eigensam_jax" / "experiments" / "results"


def test_the_python_blocks_run():
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


def test_two_commands_set_everything_up():
    commands = [x for x in README.splitlines() if x.startswith("python3 -m venv .venv")]
    assert len(commands) == 2
    assert commands[0].endswith(" && .venv/bin/eigensam compare")
    assert commands[1].endswith(" && .venv/bin/pytest")


@pytest.mark.parametrize(
    "folder", sorted(RESULTS.glob("compare_*")), ids=lambda p: p.name
)
def test_the_tables_are_those_of_the_results_files(folder):
    results = json.loads((folder / "results.json").read_text())
    assert results["complete"]
    assert results["command"] in README
    assert results["device"]["processor"] in README
    assert f"{results['wall_time_s']:.0f} s" in README
    assert compare.paired_difference(results["runs"]) in README
    for row in compare.summary(results["runs"]):
        assert f"| {' | '.join(row[:5])} |" in README  # the last column is a time


def test_links_to_files_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
