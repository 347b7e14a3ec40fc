"""What every test runs with: eight devices, and programs that compile fast.

The suite compiles far longer than it computes.
"""

import os

import jax

SETTINGS = {
    "jax_num_cpu_devices": 8,
    "jax_disable_most_optimizations": True,
    "jax_persistent_cache_min_compile_time_secs": 0,
}


def pytest_configure(config):
    """Compiles a program once, for both workers and for the next run too.

    What the environment sets stays: it is in force already.
    """
    cache = {"jax_compilation_cache_dir": str(config.cache.mkdir("jax"))}
    for name, value in (SETTINGS | cache).items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
            os.environ[name.upper()] = str(value)  # for the processes that tests start
