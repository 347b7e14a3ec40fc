"""What every test runs with: eight devices, no screen, programs that compile fast.

The suite compiles far longer than it computes.
"""

import functools
import gc
import os

import jax
import matplotlib
from jax._src.interpreters import mlir

from eigensam_jax.experiments.cli import compile_fast

SETTINGS = {
    "jax_num_cpu_devices": 8,
    "jax_persistent_cache_min_compile_time_secs": 0,
}


def pytest_configure(config):
    """Compiles a program once, for both workers and for the next run too.

    What the environment sets stays: it is in force already.
    """
    compile_fast()
    matplotlib.use("Agg")  # draws without a screen
    # Threads of both workers' BLAS would wait for each other, for tens of seconds.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    cache = {"jax_compilation_cache_dir": str(config.cache.mkdir("jax"))}
    for name, value in (SETTINGS | cache).items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
            os.environ[name.upper()] = str(value)  # for the processes that tests start
    # To make what a program is written down in takes as long as to compile a small one.
    mlir.make_ir_context = functools.cache(mlir.make_ir_context)
    gc.set_threshold(50_000, 20, 20)  # tracing makes much that lives for long


def pytest_collection_finish():
    """What is imported stays: the collector need not look at it again."""
    gc.collect()
    gc.freeze()
