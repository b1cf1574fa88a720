"""Writes files so that a full disk, a read-only folder or an interrupt destroys no file that existed before."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path


def replace(path: str | Path, content: str | bytes) -> None:
    """Writes a file. A reader finds, at any moment, all of the old content or all of the new.

    Args:
        path: the file; its folder is made if it does not exist.
        content: text is written in UTF-8.

    Raises:
        OSError: the file could not be written. The message names the file, or the folder that could not be made. The
            file is as it was, and no other file is left beside it.
    """
    replace_together({Path(path): content})


def replace_together(contents: Mapping[Path, str | bytes]) -> None:
    """`replace` for files that describe each other: no file changes before there is room for all of them.

    Args:
        contents: file -> content; the files are replaced in this order.

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
    except OSError as error:  # the error of a full disk names no file
        raise OSError(error.errno, f"{error.strerror} (nothing was written)", str(path)) from error
    finally:
        for path in new.values():
            with contextlib.suppress(OSError):  # a read-only file system refuses even if there is nothing
                path.unlink(missing_ok=True)  # a file that a full disk cut short only takes room
