"""The notebooks: executed as they are kept, and again here at a small size."""

import ast
import datetime
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook, tag):
    (cell,) = [
        cell for cell in code_cells(notebook) if tag in cell.metadata.get("tags", ())
    ]
    return cell


def test_there_are_notebooks():
    assert len(PATHS) >= 5


@every_notebook
def test_it_was_executed_from_top_to_bottom(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 200_000
    cells = code_cells(notebook)
    assert cells[0] is tagged(notebook, "install")
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [
        x for x in outputs if x.output_type == "error" or x.get("name") == "stderr"
    ]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    times = [
        datetime.datetime.fromisoformat(cell.metadata.execution[moment])
        for cell in cells
        for moment in ("iopub.execute_input", "iopub.status.idle")
    ]
    assert max(times) - min(times) < datetime.timedelta(minutes=3)


@every_notebook
def test_it_says_nothing_of_the_machine_it_ran_on(path):
    notebook = nbformat.read(path, as_version=4)
    texts = [cell.source for cell in notebook.cells]
    for output in [x for cell in code_cells(notebook) for x in cell.outputs]:
        texts += [output.get("text", ""), output.get("data", {}).get("text/plain", "")]
    absolute = re.compile(r"(?<![\w.:/])/\w+(?:/[\w.-]+)+")
    assert absolute.search("in /usr/lib/module.py")
    assert not absolute.findall("\n".join(texts))


def until_slow(cells):
    """Those before the first that is tagged "slow", which the others build on."""
    tags = [cell.metadata.get("tags", ()) for cell in cells]
    return cells[: next((i for i, x in enumerate(tags) if "slow" in x), None)]


def has_slow_cells(path):
    cells = nbformat.read(path, as_version=4).cells
    return len(until_slow(cells)) < len(cells)


# What a notebook leaves behind: its names, and what it sets in JAX.
REMEMBER = "import jax\njax.at_first = dict(jax.config.values)"
FORGET = """
%reset -f
import jax
for name, value in jax.at_first.items():
    if jax.config.values[name] != value:
        jax.config.update(name, value)
%reset -f
"""


def run(client, cells):
    """In the client's process, that is started."""
    client.nb = nbformat.v4.new_notebook(cells=cells)
    for index, cell in enumerate(cells):
        client.execute_cell(cell, index)


@pytest.fixture(scope="module")
def client():
    """One process for many notebooks: its start, and the imports, take seconds.

    On two devices where it does not say how many: eight of them wait for each other.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_NUM_CPU_DEVICES", "2")
        client = NotebookClient(None, timeout=300, kernel_name="python3")
        with client.setup_kernel():
            run(client, [nbformat.v4.new_code_cell(REMEMBER)])
            yield client


@pytest.mark.parametrize(
    ("path", "whole"),
    [
        *(pytest.param(path, False, id=path.stem) for path in PATHS),
        *(
            pytest.param(path, True, id=f"{path.stem} whole", marks=pytest.mark.slow)
            for path in filter(has_slow_cells, PATHS)
        ),
    ],
)
def test_it_runs(path, whole, client):
    """At the size that its cell of parameters names for that."""
    notebook = nbformat.read(path, as_version=4)
    cell = tagged(notebook, "parameters")
    targets = [node.targets[0].id for node in ast.parse(cell.source).body]
    small = cell.metadata.smoke
    assert set(small) <= set(targets)
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in small.items())
    if not whole:
        notebook.cells = until_slow(notebook.cells)
    if any("jax_num_cpu_devices" in cell.source for cell in code_cells(notebook)):
        # To be said before the first computation of a process.
        NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    else:
        run(client, [nbformat.v4.new_code_cell(FORGET), *notebook.cells])
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [x.text for x in outputs if x.get("name") == "stderr"]
