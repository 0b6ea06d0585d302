"""The rules for Python targets: every BUILD and .bzl file of this repository takes them from here.

Bazel 4 to 6 have them built in. Where Bazel has none, this file is the place to load those of
`@rules_python` instead.
"""

load("@bazel_tools//tools/python:toolchain.bzl", _py_runtime_pair = "py_runtime_pair")

py_binary = native.py_binary
py_library = native.py_library
py_runtime = native.py_runtime
py_runtime_pair = _py_runtime_pair
py_test = native.py_test
