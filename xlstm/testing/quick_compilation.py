"""How XLA compiles quickly, for tests that compile much and compute little."""

import importlib.metadata

# For XLA_FLAGS, which XLA reads when JAX first looks for devices.
QUICK_XLA_FLAGS = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jax").startswith("0.10."):
    # Saves most of the remaining time. Later versions do not know the flag and would not start.
    QUICK_XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
