"""The repositories that a workspace needs to build `@xlstm`."""

load("//third_party:bazel_defaults.bzl", "bazel_defaults")
load("//third_party:pip_repository.bzl", "pip_repository")

def xlstm_dependencies():
    """Declares `@pip`, its Python toolchain, and stand-ins for what Bazel 4 would download.

    Call it from WORKSPACE, before anything else: the first declaration of a repository wins.
    """
    bazel_defaults()
    pip_repository(
        name = "pip",
        requirements = Label("//third_party:requirements.txt"),
    )
    native.register_toolchains("@pip//:python_toolchain")
