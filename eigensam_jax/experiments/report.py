"""`eigensam report`: rewrites tables and plots of the pages from the results files.

A page marks the place of a table and keeps its own headers:

    <!-- report: compare_digits summary main -->
    | | gradients |
    | --- | --- |

After `report:` come a results folder (or several, joined by +), the name of a table in
the `tables` of their wing, and that table's argument, if it takes one. The rows under
the headers are replaced. The name `run` gives a paragraph on seeds, time and machine.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eigensam_jax.experiments.errors import UserError
from eigensam_jax.experiments.records import results
from eigensam_jax.experiments.wings import WINGS, wing_of

Document = dict[str, Any]

FOLDER = "notebooks/results"
PAGES = ("README.md", "notebooks/*.md", f"{FOLDER}/*.md", f"{FOLDER}/*/*.md")
_MARK = re.compile(r"<!-- report: (\S+) (\S+) ?([^>]*?) -->\n")


def run(root: Path, only: str | None = None) -> list[Path]:
    """Updates the pages and plots of a clone; returns the files written, plots first.

    `only` limits the update to one wing.

    Raises:
      UserError: if there are no results, or some are damaged or not complete, or a
        page asks for an unknown table.
    """
    found = results_of(root)
    if not found:
        raise UserError(
            f"--root {root} holds no results under {FOLDER}; name a clone's folder"
        )
    for name, document in found.items():
        if only in (None, wing_of(document)) and not document["complete"]:
            raise UserError(
                f"{FOLDER}/{name} is not complete; finish it: "
                f"{document['commands'][-1]}"
            )
    pages = {path: _text(path) for path in pages_of(root)}
    new = {
        path: rendered(text, found, str(path.relative_to(root)), only)
        for path, text in pages.items()
    }
    written = []
    for name, document in found.items():
        wing, folder = wing_of(document), root / FOLDER / name
        if only in (None, wing):
            WINGS[wing].plots(document, folder)
            written += sorted(folder.glob("*.png"))
    for path, text in new.items():
        if text != pages[path]:
            path.write_text(text, "utf-8")
            written.append(path)
    return written


def results_of(root: Path) -> dict[str, Document]:
    """The results files of a clone, by folder name."""
    found = {}
    for path in sorted(root.glob(f"{FOLDER}/*/{results.FILE}")):
        found[path.parent.name] = document = results.read(path)
        try:
            wing_of(document), document["complete"], document["runs"][0]
        except (KeyError, IndexError) as error:
            raise UserError(
                f"{path} holds no results of a command ({error})"
            ) from error
    return found


def _text(page: Path) -> str:
    try:
        return page.read_text("utf-8")
    except ValueError as error:
        raise UserError(f"{page} is not text in UTF-8 ({error})") from error


def pages_of(root: Path) -> Iterator[Path]:
    """The pages of a clone."""
    for pattern in PAGES:
        yield from sorted(root.glob(pattern))


def rendered(
    text: str, found: dict[str, Document], page: str, only: str | None = None
) -> str:
    """A page with its marked rows and paragraphs replaced by those of the results.

    `found` holds the results by folder. `page` names the page in errors. `only` limits
    the update to one wing.
    """
    first, *pieces = _MARK.split(text)
    result = [first]
    for where, name, what, rest in zip(*(pieces[i::4] for i in range(4)), strict=True):
        folders, tables = where.split("+"), dict[str, Any]()
        wing = wing_of(found[folders[0]]) if folders[0] in found else None
        if wing is not None and set(folders) <= set(found):
            tables = WINGS[wing].tables([found[folder] for folder in folders])
        if name not in ("run", *tables):
            raise UserError(
                f"{page} asks for the table {name} of {where}; there are "
                f"{', '.join(('run', *tables))} of {', '.join(found)}"
            )
        block, *after = re.split(r"\A\n|\n\n", rest, maxsplit=1)
        lines = block.splitlines()
        if only in (None, wing) and name == "run":
            lines = provenance(found[folders[0]])
        elif only in (None, wing):
            try:
                rows = [f"| {' | '.join(row)} |" for row in tables[name](what)]
            except (UserError, ValueError, KeyError) as error:
                asked = f"{page} asks for the table {name} {what} of {where}"
                raise UserError(f"{asked}: {error}") from error
            lines = [*lines[:2], *rows]
        mark = " ".join(part for part in (where, name, what) if part)
        block = "\n".join([f"<!-- report: {mark} -->", *lines])
        result += [block, "\n\n" if after else "\n", *after]
    return "".join(result)


def provenance(document: Document) -> list[str]:
    """The paragraph on seeds, wall time and machine."""
    device, versions = document["device"], document["versions"]
    seeds = {run["seed"] for run in document["runs"] if not run.get("tuning")}
    platform, kind = device["platform"], device["kind"]
    chip = "" if kind == platform else f"{kind}, "
    count = f"{len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}"
    return [
        f"{count}, {document['wall_time_s']:,.0f} s on {platform} "
        f"({chip}{device['processor']}, {device['cores']} cores), "
        f"jax {versions['jax']}."
    ]
