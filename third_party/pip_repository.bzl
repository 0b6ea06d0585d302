"""The repository rule behind `@pip`: locked Python packages, and the interpreter they are for.

`@pip//:jax` is a `py_library` of the installed distribution `jax` and everything that it requires.
Target names are distribution names in lower case, with `_` for `-` and `.`.
`@pip//:python_toolchain` runs every Python target with the interpreter that installed the packages:
`python3` on the PATH, or the one in the environment variable XLSTM_PYTHON.
"""

_OLDEST_PYTHON = (3, 11)
_NEWEST_PYTHON = (3, 13)

# A virtual environment may be removed; the interpreter that it was made from stays.
_DESCRIBE_PYTHON = """
import importlib.util, sys
print(*sys.version_info[:2], int(importlib.util.find_spec("pip") is not None))
print(getattr(sys, "_base_executable", sys.executable))
"""

def _find_python(repository_ctx):
    """Returns the requested interpreter, and the interpreter that it is based on."""
    wanted = repository_ctx.os.environ.get("XLSTM_PYTHON") or "python3"
    path = repository_ctx.which(wanted) if "/" not in wanted else wanted
    if not path:
        fail("No %s on the PATH; install Python 3, or name one: XLSTM_PYTHON=/path/python3." % wanted)
    result = repository_ctx.execute([path, "-c", _DESCRIBE_PYTHON])
    if result.return_code:
        fail("%s is not a working Python 3 interpreter: %s" % (path, result.stderr))
    facts, base = result.stdout.strip().split("\n")
    major, minor, has_pip = [int(fact) for fact in facts.split(" ")]
    if (major, minor) < _OLDEST_PYTHON or (major, minor) > _NEWEST_PYTHON:
        fail("%s is Python %d.%d, but Python %d.%d to %d.%d is needed; " % (
            (path, major, minor) + _OLDEST_PYTHON + _NEWEST_PYTHON
        ) + "name one with XLSTM_PYTHON=/path/python3.")
    if not has_pip:
        fail("%s has no pip; install it (Debian: apt-get install python3-pip), " % path +
             "or name another interpreter with XLSTM_PYTHON=/path/python3.")
    return path, base

def _find_locks(repository_ctx):
    """Returns the paths of the locks to install: the lock, and what XLSTM_REQUIREMENTS adds to it."""
    label = repository_ctx.attr.requirements
    lock = repository_ctx.path(label)
    additions = (repository_ctx.os.environ.get("XLSTM_REQUIREMENTS") or "").split(",")
    additions = [addition for addition in additions if addition]
    prefix = lock.basename.replace(".txt", "_")
    names = [file.basename for file in lock.dirname.readdir() if file.basename.endswith(".txt")]
    choices = [name[len(prefix):-len(".txt")] for name in names if name.startswith(prefix)]
    for addition in additions:
        if addition not in choices:
            fail("XLSTM_REQUIREMENTS names '%s'; it can be %s, several of them, or empty." % (
                addition,
                " or ".join(sorted(choices)),
            ))
    return [lock] + [
        repository_ctx.path(label.relative(prefix + addition + ".txt"))
        for addition in additions
    ]

def _pin(repository_ctx, locks, name):
    """Returns the lines that pin a package, with its hashes; empty if the locks do not."""
    lines, is_inside = [], False
    for lock in locks:
        for line in repository_ctx.read(lock).split("\n"):
            is_inside = line.startswith(name + "==") or (is_inside and line.startswith(" "))
            if is_inside:
                lines.append(line)
    return "\n".join(lines)

def _pip_install(repository_ctx, python, locks, target, names):
    """Installs the packages of locks in a folder; only what a lock names by --no-binary is built."""
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--no-compile", "--no-build-isolation", "--only-binary", ":all:", "--target", target]
    for lock in locks:
        command += ["-r", lock]
    result = repository_ctx.execute(
        command,
        environment = {
            # Overrides settings in a user's pip configuration that reject `--target`.
            "PIP_REQUIRE_VIRTUALENV": "0",
            "PIP_USER": "0",
            "PYTHONPATH": "%s" % repository_ctx.path("setuptools"),
        },
        timeout = 3600,
    )
    if result.return_code:
        fail("pip could not install %s; is the package registry reachable? It said:\n%s" % (
            names,
            result.stderr,
        ))

def _pip_repository_impl(repository_ctx):
    locks = _find_locks(repository_ctx)
    names = " and ".join([lock.basename for lock in locks])
    generator = repository_ctx.path(repository_ctx.attr._generator)
    python, base_python = _find_python(repository_ctx)

    repository_ctx.report_progress("installing the packages of %s" % names)
    backend = _pin(repository_ctx, locks, "setuptools")
    if backend:
        # It builds what has no wheel; in an environment of its own pip would take an unlocked one.
        repository_ctx.file("setuptools.txt", backend)
        _pip_install(repository_ctx, python, ["setuptools.txt"], "setuptools", names)
    _pip_install(repository_ctx, python, locks, "site-packages", names)

    repository_ctx.report_progress("writing the BUILD file")
    repository_ctx.symlink(repository_ctx.attr._rules, "python_rules.bzl")
    result = repository_ctx.execute(
        [python, "-B", generator, base_python] + locks,
        environment = {"PYTHONPATH": "site-packages"},
        timeout = 3600,
    )
    if result.return_code:
        fail("The installed packages of %s cannot be used: %s" % (names, result.stderr))

pip_repository = repository_rule(
    doc = "Installs hash-locked requirements; one `py_library` per distribution.",
    implementation = _pip_repository_impl,
    attrs = {
        "requirements": attr.label(
            doc = "The lock NAME.txt. XLSTM_REQUIREMENTS=x,y adds those of NAME_x.txt and NAME_y.txt.",
            mandatory = True,
        ),
        "_generator": attr.label(default = Label("//third_party:pip_repository.py")),
        "_rules": attr.label(default = Label("//third_party:python_rules.bzl")),
    },
    environ = ["XLSTM_PYTHON", "XLSTM_REQUIREMENTS"],
)
