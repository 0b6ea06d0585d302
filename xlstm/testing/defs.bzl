"""The test rule of this repository."""

load("//third_party:python_rules.bzl", "py_test")

_MAIN = Label("//xlstm/testing:pytest_main.py")
_QUICK_COMPILATION = Label("//xlstm/testing:quick_compilation")

def xlstm_test(
        name,
        srcs,
        deps = [],
        args = [],
        devices = None,
        quick_compilation = True,
        env = {},
        size = "small",
        **kwargs):
    """A `py_test` that pytest runs.

    JAX runs on the CPU; `--test_env=JAX_PLATFORMS=cuda` selects the GPU. On the GPU, float32 matrix
    products use float32, not the default TF32, unless a test asks otherwise.

    Args:
      name: The name of the test.
      srcs: The test files.
      deps: The libraries that they import, including hypothesis; pytest and quick_compilation are added.
      args: More arguments for pytest.
      devices: The number of devices that JAX sees, simulated on the CPU. None keeps JAX's default.
      quick_compilation: Whether XLA compiles quickly, without optimizing for the CPU. Processes that the
        test starts inherit this.
      env: More environment variables.
      size: Bazel's test size.
      **kwargs: More attributes of `py_test`.
    """
    if devices:
        env = dict(env, XLA_FLAGS = "--xla_force_host_platform_device_count=%d" % devices)
    if not quick_compilation:
        env = dict(env, XLSTM_TEST_QUICK_COMPILATION = "0")
    py_test(
        name = name,
        size = size,
        srcs = srcs + [_MAIN],
        main = _MAIN,
        args = ["$(rootpath %s)" % src for src in srcs] + args,
        env = env,
        deps = deps + ["@pip//:pytest", _QUICK_COMPILATION],
        **kwargs
    )
