"""What is shown while a command runs."""

from rich.console import Console

from eigensam_jax.experiments.records import tables


def test_the_time_left_is_known_however_long_a_part_takes():
    bar, now = tables.progress_bar(Console(quiet=True)), [0.0]
    bar.get_time = lambda: now[0]
    task = bar.add_task("long", total=5)
    for minutes in (10, 20):
        now[0] = 60.0 * minutes
        bar.advance(task)
    assert bar.tasks[0].time_remaining == 3 * 600
