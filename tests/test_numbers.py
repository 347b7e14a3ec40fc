"""The numbers in the pages are those of the results files."""

import json
import re
from pathlib import Path

import pytest

from eigensam_jax.benchmarks import bench_tables, track
from eigensam_jax.experiments import compare, sde_tables, spectrum

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "eigensam_jax" / "experiments" / "results"
TRACKING = ROOT / "eigensam_jax" / "benchmarks" / "results"
TRACKING_PAGE = (TRACKING / "README.md").read_text()
COST_PAGE = (TRACKING / "COST.md").read_text()
SDE_PAGE = (RESULTS / "SDE.md").read_text()
COMPARE_PAGE = (RESULTS / "README.md").read_text()


def test_two_commands_set_everything_up():
    commands = [x for x in README.splitlines() if x.startswith("python3 -m venv .venv")]
    assert len(commands) == 2
    assert commands[0].endswith(" && .venv/bin/eigensam compare")
    assert commands[1].endswith(" && .venv/bin/pytest")


@pytest.mark.parametrize(
    "folder", sorted(RESULTS.glob("compare_*")), ids=lambda p: p.name
)
def test_the_page_on_the_comparison_says_what_the_results_files_say(folder):
    results = read(folder)
    pages = (
        [COMPARE_PAGE, README] if folder.name == "compare_digits" else [COMPARE_PAGE]
    )
    for page in pages:
        assert results["command"] in page
        assert results["device"]["processor"] in page
        assert re.search(rf"\b{results['wall_time_s']:.0f} s\b", page)
        for row in compare.summary(results["runs"]):
            shown = row if folder.name == "compare_digits" else row[:5]  # without times
            assert f"| {' | '.join(shown)} |" in page
    assert compare.paired_difference(results["runs"]) in COMPARE_PAGE


def read(folder):
    results = json.loads((folder / "results.json").read_text())
    assert results["complete"]
    return results


@pytest.mark.parametrize(
    "folder", sorted(TRACKING.glob("track_*")), ids=lambda p: p.name
)
def test_the_page_on_trackers_says_what_the_results_files_say(folder):
    results = read(folder)
    runs = results["runs"]
    for command in results["commands"]:
        assert command in TRACKING_PAGE
    assert results["device"]["processor"] in TRACKING_PAGE
    rows = [row for alpha in track.alphas(runs) for row in track.summary(runs, alpha)]
    for row in (*rows, *track.differences(runs)):
        assert f"| {' | '.join(row)} |" in TRACKING_PAGE


def test_the_readme_sums_up_the_page_on_trackers():
    folders = [TRACKING / f"track_{name}" for name in ("mlp", "strided_cnn", "digits")]
    runs = [read(folder)["runs"] for folder in folders]
    summaries = [
        {row[0]: row for row in track.summary(of_network, alpha)}
        for of_network in runs
        for alpha in (0.2, 1.0)
    ]
    for name in track.TRACKERS:
        cells = [rows[name][2] if name in rows else "–" for rows in summaries]
        products = f"{track.TRACKERS[name].products:g}"
        assert f"| {' | '.join([name, products, *cells])} |" in README


def test_the_page_on_cost_says_what_the_results_files_say():
    measured, grown = read(TRACKING / "bench_cpu"), read(TRACKING / "bench_growth")
    rows = [row for run in measured["runs"] for row in bench_tables.summary(run)]
    rows += bench_tables.growth_summary(grown["runs"])
    rows += bench_tables.devices_summary(grown["runs"])
    for row in rows:
        assert f"| {' | '.join(row)} |" in COST_PAGE
    for results in (measured, grown):
        assert all(command in COST_PAGE for command in results["commands"])
    assert measured["device"]["processor"] in COST_PAGE


def test_the_readme_sums_up_the_page_on_cost():
    summaries = [
        {row[0]: row for row in bench_tables.summary(run)}
        for run in read(TRACKING / "bench_cpu")["runs"]
    ]
    for name in dict.fromkeys(name for rows in summaries for name in rows):
        cells = [
            cell
            for rows in summaries
            for cell in (
                (rows[name][1], rows[name][-1].split()[0])
                if name in rows
                else ("–", "–")
            )
        ]
        assert f"| {' | '.join([name, *cells])} |" in README


def test_the_spectrum_is_that_of_the_results_file():
    results = json.loads((RESULTS / "spectrum_digits" / "results.json").read_text())
    assert results["command"] in COMPARE_PAGE
    for row in spectrum.summary(results)[:5]:
        assert f"| {' | '.join(row)} |" in COMPARE_PAGE


def test_what_is_said_of_the_equations_is_in_their_results_file():
    results = read(RESULTS / "sde_mnist")
    runs, config = results["runs"], results["config"]
    rows = sde_tables.distances(runs) + sde_tables.slopes(runs)
    rows += sde_tables.moments(runs) + sde_tables.costs(runs)
    for row in rows + sde_tables.differences(runs) + sde_tables.rates(runs):
        assert f"| {' | '.join(row)} |" in SDE_PAGE
    assert results["device"]["processor"] in SDE_PAGE
    seeds = {run["seed"] for run in runs if "seed" in run}
    assert all(command in SDE_PAGE for command in results["commands"])
    assert f"{results['wall_time_s']:.0f} s on" in SDE_PAGE.replace("\n", " ")
    assert f"{config['num_batches']} fixed batches" in SDE_PAGE
    assert f"{len(seeds)} seeds" in SDE_PAGE
    assert f"{config['steps']} steps" in SDE_PAGE
    assert f"{config['num_batches'] * config['batch_size']:,}" in SDE_PAGE
