"""Hatchling's hook: records the commit in what it builds, as `xlstm.installation` reads it."""

import runpy
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_COMMIT = "xlstm/COMMIT"


class CommitHook(BuildHookInterface):
    """Adds the file with the commit, unless the sources have one, as those of an sdist do."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Writes the file; `build_data` then includes it."""
        if self.target_name == "wheel" and version == "editable":
            return  # The checkout itself is on the path.
        if Path(self.root, _COMMIT).exists():
            return
        commit = runpy.run_path(str(Path(self.root, "xlstm/installation.py")))["commit"]()
        self._folder = tempfile.TemporaryDirectory()
        file = Path(self._folder.name, "COMMIT")
        file.write_text(f"{commit}\n")
        build_data["force_include"][str(file)] = _COMMIT

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Removes the temporary file."""
        if folder := getattr(self, "_folder", None):
            folder.cleanup()
