"""Writing files so that a full disk, a read-only folder or an interrupt costs nothing that was there before."""

from __future__ import annotations

import os
from pathlib import Path


def replace(path: str | Path, content: str | bytes) -> None:
    """Writes a file so that whoever reads it, at any moment, finds all of the old content or all of the new.

    Args:
        path: the file; its folder is made where it is not there.
        content: text is written in UTF-8.

    Raises:
        OSError: it could not be written. The message names the file, which is as it was, and nothing is left beside it.
    """
    path = Path(path)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        new.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(new, path)
    except OSError as error:  # that of a full disk names no file
        raise OSError(error.errno, f"{error.strerror} (nothing was written)", str(path)) from error
    finally:
        new.unlink(missing_ok=True)  # what a full disk cut short is of no use, and takes room
