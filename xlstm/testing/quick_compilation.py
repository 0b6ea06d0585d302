"""Options for fast compilation, for tests that compile much and compute little."""

import jax

# Options for one function: `jax.jit(..., compiler_options=QUICK_COMPILATION)`.
QUICK_COMPILATION = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    # Saves most of the remaining time. Later versions lack the flag and would fail to start.
    QUICK_COMPILATION["xla_cpu_use_fusion_emitters"] = False

# The same for a process, in XLA_FLAGS, which JAX reads when it first looks for devices.
QUICK_XLA_FLAGS = " ".join(
    f"--{name}={str(value).lower()}" for name, value in QUICK_COMPILATION.items()
)
