"""`eigensam report`: the tables of the pages, and the plots, from the results files.

A page says where a table goes, and leaves its headers to whoever writes the page:

    <!-- report: compare_digits summary main -->
    | | gradients |
    | --- | --- |

After `report:` come a folder of results (or several, with a + between them), the name
of a table in `ROWS`, and what that table is of, where it takes anything. The rows under
the headers are replaced. `run` in place of a table is the paragraph that says how long
it took, and on what.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from eigensam_jax.experiments.bench import plots as bench_plots
from eigensam_jax.experiments.bench import tables as bench_tables
from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.sde import run as sde
from eigensam_jax.experiments.sde import tables as sde_tables
from eigensam_jax.experiments.spectrum import plots
from eigensam_jax.experiments.spectrum import tables as spectrum_tables
from eigensam_jax.experiments.study import plots as study_plots
from eigensam_jax.experiments.study import tables as study_tables
from eigensam_jax.experiments.track import plots as track_plots
from eigensam_jax.experiments.track import tables as track_tables

Document = dict[str, Any]
Rows = list[list[str]]

FOLDER = "notebooks/results"
PAGES = ("README.md", "notebooks/*.md", f"{FOLDER}/*.md")
_MARK = re.compile(r"<!-- report: (\S+) (\S+) ?([^>]*?) -->\n")


def run(root: Path) -> list[Path]:
    """Brings the pages and plots of a clone up to date.

    Args:
      root: the folder of the clone.

    Returns:
      What was written, plots first; pages only where they changed.

    Raises:
      UserError: where there are no results, or a page asks for what there is not.
    """
    found = results_of(root)
    if not found:
        raise UserError(
            f"--root {root} holds no results under {FOLDER}; name a clone's folder"
        )
    pages = {path: path.read_text("utf-8") for path in pages_of(root)}
    new = {path: rendered(text, found, path.name) for path, text in pages.items()}
    written = [path for name in found for path in _draw(root, name, found[name])]
    for path, text in new.items():
        if text != pages[path]:
            path.write_text(text, "utf-8")
            written.append(path)
    return written


def results_of(root: Path) -> dict[str, Document]:
    """The results files of a clone, by the names of their folders."""
    return {
        path.parent.name: json.loads(path.read_text("utf-8"))
        for path in sorted(root.glob(f"{FOLDER}/*/*.json"))
    }


def pages_of(root: Path) -> Iterator[Path]:
    """The pages of a clone."""
    for pattern in PAGES:
        yield from sorted(root.glob(pattern))


def rendered(text: str, found: dict[str, Document], page: str) -> str:
    """A page with the rows and paragraphs that the results files say.

    Args:
      text: of the page.
      found: the results files, by folder.
      page: its name, for errors.
    """
    first, *pieces = _MARK.split(text)
    result = [first]
    for where, name, what, rest in zip(*(pieces[i::4] for i in range(4)), strict=True):
        folders = where.split("+")
        if name not in ROWS or not set(folders) <= set(found):
            raise UserError(
                f"{page} asks for the table {name} of {where}; there are "
                f"{', '.join(ROWS)} of {', '.join(found)}"
            )
        block, *after = re.split(r"\A\n|\n\n", rest, maxsplit=1)
        headers = [] if name == "run" else block.splitlines()[:2]
        rows = ROWS[name]([found[folder] for folder in folders], what)
        mark = " ".join(part for part in (where, name, what) if part)
        lines = [f"<!-- report: {mark} -->", *headers, *rows]
        result += ["\n".join(lines), "\n\n" if after else "\n", *after]
    return "".join(result)


def provenance(document: Document) -> list[str]:
    """The time that it took, the machine and the seeds, in one paragraph."""
    device, versions = document["device"], document["versions"]
    seeds = {run["seed"] for run in document["runs"] if not run.get("tuning")}
    platform, kind = device["platform"], device["kind"]
    chip = "" if kind == platform else f"{kind}, "
    return [
        f"{len(seeds)} seeds, {document['wall_time_s']:,.0f} s on {platform} "
        f"({chip}{device['processor']}, {device['cores']} cores), "
        f"jax {versions['jax']}."
    ]


def _table(rows: Callable[[list[Document], str], Rows]) -> Any:
    return lambda documents, what: [
        f"| {' | '.join(row)} |" for row in rows(documents, what)
    ]


def _of_runs(rows: Callable[[list[Any]], Rows]) -> Any:
    return _table(lambda documents, _: rows(documents[0]["runs"]))


def _of_study(rows: Callable[[list[Any], str], Rows]) -> Any:
    return _table(lambda documents, what: rows(documents[0]["runs"], what))


def _bench(documents: list[Document], model: str) -> Rows:
    (record,) = (run for run in documents[0]["runs"] if run["model"] == model)
    return bench_tables.summary(record)


ROWS: dict[str, Callable[[list[Document], str], list[str]]] = {
    "run": lambda documents, _: provenance(documents[0]),
    "track": _table(lambda d, alpha: track_tables.summary(d[0]["runs"], float(alpha))),
    "track_differences": _of_runs(track_tables.differences),
    "track_across": _table(lambda d, _: track_tables.across([x["runs"] for x in d])),
    "bench": _table(_bench),
    "bench_across": _of_runs(bench_tables.across),
    "growth": _of_runs(bench_tables.growth_summary),
    "devices": _of_runs(bench_tables.devices_summary),
    "spectrum": _table(lambda d, count: spectrum_tables.summary(d[0])[: int(count)]),
    "distances": _of_runs(sde_tables.distances),
    "sde_differences": _of_runs(sde_tables.differences),
    "slopes": _of_runs(sde_tables.slopes),
    "moments": _of_runs(sde_tables.moments),
    "rates": _of_runs(sde_tables.rates),
    "costs": _of_runs(sde_tables.costs),
    "tuning": _of_runs(study_tables.tuning),
    "summary": _of_study(study_tables.summary),
    "paired": _of_study(study_tables.paired),
    "against_first": _of_study(study_tables.against_first),
    "over_training": _of_study(study_tables.over_training),
}


def _draw(root: Path, name: str, document: Document) -> list[Path]:
    """Draws the plots of a results file anew."""
    folder = root / FOLDER / name
    config, runs = document.get("config", {}), document.get("runs", [])
    title = ", ".join(str(config[x]) for x in ("dataset", "model") if x in config)
    kind = name.partition("_")[0]
    if kind in study_plots.DRAW:
        study_plots.DRAW[kind](runs, title, folder / f"{kind}.png")
    elif kind == "sde":
        sde.draw(document, folder)
    elif kind == "spectrum":
        title += f", {config['optimizer']}"
        plots.spectrum(document, title, folder / "spectrum.png")
    else:
        draw: dict[str, Callable[[], None]] = {
            "track": lambda: track_plots.track(runs, title, folder / "track.png"),
            "bench": lambda: (
                bench_plots.growth(runs, folder / "growth.png")
                if name.endswith("growth")
                else bench_plots.bench(runs, folder / "bench.png")
            ),
        }
        draw[kind]()
    return sorted(folder.glob("*.png"))
