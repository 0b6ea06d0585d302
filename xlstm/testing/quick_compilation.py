"""How XLA compiles quickly, for tests that compile much and compute little."""

import importlib.metadata

# Options for the compiler of one function, as in `jax.jit(..., compiler_options=...)`.
QUICK_COMPILATION = {"xla_backend_optimization_level": 0}
if importlib.metadata.version("jax").startswith("0.10."):
    # Most of what was left of the time. Later versions do not know the flag, and would not start.
    QUICK_COMPILATION["xla_cpu_use_fusion_emitters"] = False

# The same for a whole process, in XLA_FLAGS, which is read when JAX first looks for devices.
QUICK_XLA_FLAGS = " ".join(
    f"--{name}={str(value).lower()}" for name, value in QUICK_COMPILATION.items()
)
