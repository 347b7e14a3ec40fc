"""What is shown while a command runs."""

import io
import time

from rich.console import Console

from eigensam_jax.experiments.records import progress, tables


def test_the_time_left_is_known_however_long_a_part_takes():
    now = [0.0]
    with progress.shown(Console(quiet=True)) as bar:
        bar.get_time = lambda: now[0]
        task = bar.add_task("long", total=5)
        for minutes in (10, 20):
            now[0] = 60.0 * minutes
            bar.advance(task)
        assert bar.tasks[0].time_remaining == 3 * 600


def test_a_line_now_and_then_where_output_is_piped(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.02)
    console = Console(file=io.StringIO(), width=20)
    with progress.shown(console) as bar:
        task = bar.add_task("sam, seed 0", total=8)
        bar.advance(task, 2)
        while "\n" not in console.file.getvalue():
            time.sleep(0.01)
    first, *_ = console.file.getvalue().splitlines()
    assert first.startswith("sam, seed 0: 2 of 8 done, 0:00:00 so far, ")
    said = console.file.getvalue()
    time.sleep(0.1)
    assert console.file.getvalue() == said  # and none afterwards


def test_nothing_is_called_an_interval_that_is_of_one_seed():
    assert "95%" not in tables.of_seeds([{"seed": 3}, {"seed": 9, "tuning": True}])
    assert "95%" in tables.of_seeds([{"seed": 3}, {"seed": 4}])
