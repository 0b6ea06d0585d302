"""How XLA compiles quickly, for tests that compile much and compute little."""

import jax

# Flags for the environment variable XLA_FLAGS, which is read when JAX first looks for devices.
QUICK_XLA_FLAGS = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):
    # Most of what was left of the time. Later versions do not know the flag, and would not start.
    QUICK_XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
