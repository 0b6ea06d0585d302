"""The rule for our tests."""

_MAIN = Label("//xlstm/testing:pytest_main.py")

def xlstm_test(name, srcs, deps = [], args = [], devices = None, env = {}, size = "small", **kwargs):
    """A `py_test` that pytest runs.

    JAX is kept on the CPU; `--test_env=JAX_PLATFORMS=cuda` lets it take the GPU. There it multiplies
    float32 in float32, and not in TF32 as by itself, unless a test asks otherwise.

    Args:
      name: the name of the test.
      srcs: the files with the tests.
      deps: what they import; pytest need not be named, hypothesis must.
      args: further arguments for pytest.
      devices: how many devices JAX sees; simulated on the CPU. None leaves it to JAX.
      env: further environment variables.
      size: Bazel's test size.
      **kwargs: further attributes of `py_test`.
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
        deps = deps + ["@pip//:pytest"],
        **kwargs
    )
