"""The test rule of this repository."""

_MAIN = Label("//xlstm/testing:pytest_main.py")
_QUICK_COMPILATION = Label("//xlstm/testing:quick_compilation")

def xlstm_test(name, srcs, deps = [], args = [], devices = None, env = {}, size = "small", **kwargs):
    """A `py_test` that pytest runs.

    XLA compiles quickly, without optimising. JAX runs on the CPU; `--test_env=JAX_PLATFORMS=cuda` selects the GPU. On the GPU, float32 matrix
    products use float32, not the default TF32, unless a test asks otherwise.

    Args:
      name: The name of the test.
      srcs: The test files.
      deps: The libraries that they import, including hypothesis; pytest and quick_compilation are added.
      args: More arguments for pytest.
      devices: The number of devices that JAX sees, simulated on the CPU. None keeps JAX's default.
      env: More environment variables.
      size: Bazel's test size.
      **kwargs: More attributes of `py_test`.
    """
    if devices:
        env = dict(env, XLA_FLAGS = "--xla_force_host_platform_device_count=%d" % devices)
    native.py_test(
        name = name,
        size = size,
        srcs = srcs + [_MAIN],
        main = _MAIN,
        args = ["$(rootpath %s)" % src for src in srcs] + args,
        env = env,
        deps = deps + ["@pip//:pytest", _QUICK_COMPILATION],
        **kwargs
    )
