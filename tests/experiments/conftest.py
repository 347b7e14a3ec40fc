"""What tests of the commands read is the same on a slow machine."""

import pytest

from eigensam_jax.experiments.records import progress


@pytest.fixture(autouse=True)
def _no_lines_of_progress(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 3_600.0)
