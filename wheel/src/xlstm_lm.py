"""Makes sure that the package `xlstm` is the one of the distribution `xlstm-lm`.

`xlstm` is a namespace package, so any other package or module of that name on the path wins without
a word. Import this module first, and there is a word:

    import xlstm_lm
    from xlstm.inference.load_model import load_run

Raises:
    ImportError: If `import xlstm` would import something else; the message names it.
"""

import importlib.util
import os
from importlib.metadata import distributions

_DISTRIBUTION = "xlstm-lm"
# A module that only our `xlstm` has.
_OURS = "installation.py"


def _check() -> None:
    spec = importlib.util.find_spec("xlstm")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    is_namespace = spec is not None and spec.origin is None
    if is_namespace and any(os.path.isfile(os.path.join(x, _OURS)) for x in folders):
        return
    if spec is None or is_namespace:
        raise ImportError(
            f"the package xlstm is missing or incomplete: install {_DISTRIBUTION} again"
        )
    owner = _distribution_of(spec.origin)
    if owner:
        remedy = f"run `pip uninstall {owner.partition(' ')[0]}`, or use another environment"
        owner = f" of the distribution {owner}"
    else:
        remedy = "rename it, or start in another folder"
    raise ImportError(
        f"`import xlstm` finds {spec.origin}{owner}, not the package of {_DISTRIBUTION}: {remedy}"
    )


def _distribution_of(path: str) -> str:
    """Returns name and version of the distribution that installed a file, or ""."""
    path = os.path.realpath(path)
    for distribution in distributions():
        for file in distribution.files or ():
            # Resolving every file of every distribution would take seconds.
            if file.name == os.path.basename(path) and (
                os.path.realpath(distribution.locate_file(file)) == path
            ):
                return f"{distribution.metadata['Name']} {distribution.version}"
    return ""


_check()

from xlstm.installation import VERSION as __version__  # noqa: E402, F401  Only after the check.
