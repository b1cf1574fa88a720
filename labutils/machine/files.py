"""Writing files so that a full disk, a read-only folder or an interrupt costs nothing that was there before."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path


def replace(path: str | Path, content: str | bytes) -> None:
    """Writes a file so that whoever reads it, at any moment, finds all of the old content or all of the new.

    Args:
        path: the file; its folder is made where it is not there.
        content: text is written in UTF-8.

    Raises:
        OSError: it could not be written. The message names the file (the folder, where that could not be made), which
            is as it was, and nothing is left beside it.
    """
    replace_together({Path(path): content})


def replace_together(contents: Mapping[Path, str | bytes]) -> None:
    """`replace` for files of which one says what another holds: none changes before there is room for all.

    Args:
        contents: file -> content, in the order in which the files take their places.

    Raises:
        OSError: as for `replace`.
    """
    new = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in contents}
    for path in new:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        for path, content in contents.items():
            new[path].write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        for path in new:
            os.replace(new[path], path)
    except OSError as error:  # that of a full disk names no file
        raise OSError(error.errno, f"{error.strerror} (nothing was written)", str(path)) from error
    finally:
        for path in new.values():
            with contextlib.suppress(OSError):  # a read-only file system refuses, also where there is nothing
                path.unlink(missing_ok=True)  # what a full disk cut short is of no use, and takes room
