"""Two processes of four devices each, and one of eight."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import processes


def test_two_processes_train_as_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    out = tmp_path / "trained.npz"
    script = Path(processes.__file__)
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", script, "2", str(i), str(port), out],
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
    assert len(got) > 20
    for name, run in processes.RUNS.items():
        for path, expected in processes.leaves(run).items():
            off = np.linalg.norm(got[f"{name} {path}"] - expected)
            assert off <= 1e-5 * np.linalg.norm(expected), (name, path)
