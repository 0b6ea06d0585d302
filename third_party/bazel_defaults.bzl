"""Small local stand-ins for the repositories that Bazel 4 downloads for every build.

Bazel 4 itself refers to `@rules_cc`, `@rules_java` and `@remote_coverage_tools`, and downloads them
although a Python build does not use them. A repository that WORKSPACE declares first replaces the
default.
"""

_CC_RULES = [
    "cc_binary",
    "cc_import",
    "cc_library",
    "cc_proto_library",
    "cc_test",
    "cc_toolchain",
    "cc_toolchain_suite",
    "objc_library",
]

_JAVA_RULES = [
    "java_binary",
    "java_import",
    "java_library",
    "java_lite_proto_library",
    "java_package_configuration",
    "java_plugin",
    "java_proto_library",
    "java_runtime",
    "java_test",
    "java_toolchain",
]

_EMPTY_COVERAGE_TOOLS = """
filegroup(
    name = "coverage_report_generator",
    visibility = ["//visibility:public"],
)
"""

def _native_rules_impl(repository_ctx):
    repository_ctx.file("WORKSPACE", "workspace(name = \"%s\")\n" % repository_ctx.name)
    repository_ctx.file("BUILD", repository_ctx.attr.build)
    if repository_ctx.attr.rules:
        language = repository_ctx.attr.language
        repository_ctx.file(language + "/BUILD")
        repository_ctx.file(
            language + "/defs.bzl",
            "\n".join(["%s = native.%s" % (rule, rule) for rule in repository_ctx.attr.rules]) + "\n",
        )

_native_rules = repository_rule(
    implementation = _native_rules_impl,
    attrs = {
        "build": attr.string(doc = "The text of the repository's BUILD file."),
        "language": attr.string(doc = "The package whose defs.bzl offers `rules`."),
        "rules": attr.string_list(doc = "Native rules that defs.bzl offers under their own names."),
    },
)

def bazel_defaults():
    """Declares the stand-ins for Bazel 4; later versions keep their own defaults."""

    # Debian's Bazel 4.2.3 has no version number.
    if native.bazel_version and not native.bazel_version.startswith("4."):
        return
    existing = native.existing_rules()
    if "rules_cc" not in existing:
        _native_rules(name = "rules_cc", language = "cc", rules = _CC_RULES)
    if "rules_java" not in existing:
        _native_rules(name = "rules_java", language = "java", rules = _JAVA_RULES)
    if "remote_coverage_tools" not in existing:
        _native_rules(name = "remote_coverage_tools", build = _EMPTY_COVERAGE_TOOLS)
