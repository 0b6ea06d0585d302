"""Writing files whole or not at all."""

import os


def write_atomically(path: str, content: str | bytes) -> None:
    """Writes a file so that, whatever happens, either the old content or the new one is there.

    Args:
        path: The file.
        content: Its content; text is written as UTF-8.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
