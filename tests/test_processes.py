"""Two processes of four devices each, and one of eight."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import processes
import pytest


@pytest.mark.parametrize(
    "name",  # on one process, all ways to run are in update/test_devices.py
    ["sharded", pytest.param("shard_map", marks=pytest.mark.slow)],
)
def test_two_processes_train_as_one_does(name, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    out = tmp_path / "trained.npz"
    script = Path(processes.__file__)
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", script, name, "2", str(i), str(port), out],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        logs = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(logs)
    got = np.load(out)
    assert len(got) > 10
    for path, expected in processes.leaves(processes.RUNS[name]).items():
        off = np.linalg.norm(got[path] - expected)
        assert off <= 1e-5 * np.linalg.norm(expected), path
