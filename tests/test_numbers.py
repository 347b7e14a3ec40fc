"""What the pages say in words of the results files; tables are `eigensam report`'s."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "notebooks" / "results"


def read(folder):
    return json.loads((folder / "results.json").read_text())


def test_two_commands_set_everything_up():
    commands = [x for x in README.splitlines() if x.startswith("python3 -m venv .venv")]
    assert len(commands) == 2
    assert commands[0].endswith(" && .venv/bin/eigensam compare")
    assert commands[1].endswith(" && .venv/bin/pytest")


def test_the_pages_name_the_machine():
    for name, files in (
        ("TRACKING.md", "track_*/results.json"),
        ("COST.md", "bench_*/results.json"),
        ("SDE.md", "sde_*/results.json"),
        ("README.md", "[ac]*/*.json"),
    ):
        page, found = (RESULTS / name).read_text(), list(RESULTS.glob(files))
        assert found
        for results in found:
            assert json.loads(results.read_text())["device"]["processor"] in page


def test_what_is_said_of_the_equations_is_in_their_results_file():
    page, results = (RESULTS / "SDE.md").read_text(), read(RESULTS / "sde_mnist")
    runs, config = results["runs"], results["config"]
    seeds = {run["seed"] for run in runs if "seed" in run}
    assert f"{results['wall_time_s']:.0f} s on" in page.replace("\n", " ")
    assert f"{config['num_batches']} fixed batches" in page
    assert f"{len(seeds)} seeds" in page
    assert f"{config['steps']} steps" in page
    assert f"{config['num_batches'] * config['batch_size']:,}" in page
