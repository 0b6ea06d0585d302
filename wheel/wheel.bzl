"""The rule that builds a wheel."""

def _wheel_impl(ctx):
    folder = ctx.actions.declare_directory(ctx.label.name)
    files = depset(transitive = [dep[DefaultInfo].default_runfiles.files for dep in ctx.attr.deps])

    # Files that Bazel made start the tools, and those of other repositories are requirements.
    ours = [f for f in files.to_list() if f.is_source and not f.short_path.startswith("../")]
    arguments = ctx.actions.args()
    arguments.add_all([folder], expand_directories = False)
    arguments.add(ctx.info_file)
    arguments.add_all(ours + ctx.files.srcs)
    arguments.use_param_file("%s", use_always = True)
    arguments.set_param_file_format("multiline")
    ctx.actions.run(
        outputs = [folder],
        inputs = ours + ctx.files.srcs + [ctx.info_file],
        executable = ctx.executable._build_wheel,
        arguments = [arguments],
        mnemonic = "Wheel",
        progress_message = "Building a wheel",
    )
    return [DefaultInfo(files = depset([folder]), runfiles = ctx.runfiles([folder]))]

wheel = rule(
    doc = "A folder with the wheel of Python targets and all of this repository that they need.",
    implementation = _wheel_impl,
    attrs = {
        "deps": attr.label_list(doc = "Python targets.", mandatory = True),
        "srcs": attr.label_list(
            doc = "Further files: pyproject.toml and the files that it names, and sources whose " +
                  "packages come with an extra alone.",
            allow_files = True,
            mandatory = True,
        ),
        "_build_wheel": attr.label(
            default = Label("//wheel:build_wheel"),
            cfg = "exec",
            executable = True,
        ),
    },
)
