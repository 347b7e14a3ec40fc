"""Every test may use eight devices, whatever the machine has."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
