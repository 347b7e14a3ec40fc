"""The progress of a command: a bar in a terminal, else a line now and then."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from eigensam_jax.experiments.records import results

SECONDS = 30.0  # from one line to the next
# In seconds; rich's default of 30 shows no time left for longer pieces.
_SPEED_PERIOD = 86_400.0

Record = dict[str, Any]
Advance = Callable[..., None]  # how much more is done, and what is being done
Piece = tuple[str, Callable[[Advance], list[Record]]]  # its name, and what does it


def done(
    work: Iterable[Piece], total: float, console: Console
) -> Iterator[list[Record]]:
    """Does work piece by piece; yields each piece's records, rounded."""
    with shown(console) as bar:
        task = bar.add_task("", total=total)
        for name, do in work:
            bar.update(task, description=name)

            def advance(more: float, doing: str = "", name: str = name) -> None:
                text = f"{name}: {doing}" if doing else name
                bar.update(task, advance=more, description=text)

            yield results.rounded(do(advance))


@contextmanager
def shown(console: Console) -> Iterator[Progress]:
    """A bar of the running task; without a terminal, a line every `SECONDS`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(
        *columns,
        console=console,
        transient=True,
        speed_estimate_period=_SPEED_PERIOD,
        disable=not console.is_terminal,
    )
    over = threading.Event()

    def say() -> None:
        while not over.wait(SECONDS):
            if line := _line(bar):
                console.print(line, highlight=False, soft_wrap=True)

    saying = threading.Thread(target=say, daemon=True)
    with bar:
        if not console.is_terminal:
            saying.start()
        try:
            yield bar
        finally:
            over.set()
            if saying.is_alive():
                saying.join()


def _line(bar: Progress) -> str:
    """The bar of the last task, as text."""
    if not bar.tasks:
        return ""
    task = bar.tasks[-1]
    done = f"{int(task.completed)} of {task.total:g}" if task.total else task.completed
    took, left = (
        "?" if x is None else str(timedelta(seconds=round(x)))
        for x in (task.elapsed, task.time_remaining)
    )
    return f"{task.description}: {done} done, {took} so far, {left} left"
