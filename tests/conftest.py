"""What every test runs with: eight devices, and programs that compile fast.

The suite compiles far longer than it computes.
"""

import functools
import gc
import os

import jax
from jax._src.interpreters import mlir

SETTINGS = {
    "jax_num_cpu_devices": 8,
    "jax_disable_most_optimizations": True,
    "jax_persistent_cache_min_compile_time_secs": 0,
}
XLA_FLAGS = "--xla_cpu_parallel_codegen_split_count=1"  # one module in place of many
if jax.__version_info__ < (0, 11):  # the older way to make code, in half of the time
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"


def pytest_configure(config):
    """Compiles a program once, for both workers and for the next run too.

    What the environment sets stays: it is in force already.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if XLA_FLAGS not in flags:  # as it is in a worker
        os.environ["XLA_FLAGS"] = f"{XLA_FLAGS} {flags}"
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
