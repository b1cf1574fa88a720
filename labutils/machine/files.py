"""Files that must not be lost: writes them as a whole, sets damaged ones aside, and keeps a second writer out."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO


class InUse(ValueError):
    """Another process writes the same files; the message names the folder or file, and the process."""


# ------------------------------------------------------------------------------------------------------------
# Places
# ------------------------------------------------------------------------------------------------------------


def expanded(path: str | Path, named_by: str) -> Path:
    """A path that a user has given, with `~` and `~name` replaced by the home folder.

    Args:
        path: as given in an environment variable, a flag or a configuration.
        named_by: this variable, flag or key, for the message.

    Raises:
        ValueError: the home folder is not known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{named_by}={path}: the home folder is not known here. Give the path without `~`.") from error


def state_folder() -> Path:
    """The folder in which the lab keeps its files about a user.

    It is `labutils` in `XDG_STATE_HOME`, or in `~/.local/state` if that is not set. Containers often have neither
    `HOME` nor an entry for their user. The folder is then `labutils-<user id>` among the temporary files.
    """
    if base := os.environ.get("XDG_STATE_HOME"):
        with contextlib.suppress(ValueError):
            return expanded(base, "XDG_STATE_HOME") / "labutils"
    try:
        return Path.home() / ".local" / "state" / "labutils"
    except RuntimeError:
        folder = Path(tempfile.gettempdir()) / f"labutils-{os.getuid()}"
        with contextlib.suppress(OSError):
            if folder.lstat().st_uid != os.getuid():  # another user made it, perhaps to plant a table
                return folder.with_name(f"{folder.name}-{os.getpid()}")
        return folder


def check_writable(folder: Path, what: str) -> None:
    """Makes a folder, and tries whether files can be made in it. Work of minutes must not end with that question.

    Args:
        folder: the folder.
        what: begins the message: "run.folder=runs/a".

    Raises:
        ValueError: the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{what} cannot be written to ({error}): name another.") from error


# ------------------------------------------------------------------------------------------------------------
# Writing
# ------------------------------------------------------------------------------------------------------------


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
    for path in contents:
        path.parent.mkdir(parents=True, exist_ok=True)
    new = {path: beside(path) for path in contents}
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


def beside(path: Path) -> Path:
    """The path at which this process writes new content, before it replaces `path`.

    Processes that were killed while they wrote have left such files. This function removes those whose process does
    not exist any more.
    """
    name = re.compile(rf"\.{re.escape(path.name)}\.(\d+)")
    with contextlib.suppress(OSError):  # sweeping is a courtesy
        for other in path.parent.iterdir():
            if (found := name.fullmatch(other.name)) and not _runs(int(found[1])):
                other.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}")


def _runs(pid: int) -> bool:
    """Whether a process of this id exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it belongs to another user, or is no id at all: leave its file
        return True
    return True


def set_aside(path: Path, *, copy: bool = False) -> Path:
    """Renames a file that is damaged or not ours, so that nothing overwrites it.

    Args:
        path: the file.
        copy: leave the file where it is, and only make the copy.

    Returns:
        Its new path: the old one with ".set-aside" after it, or ".set-aside-2" and so on if that exists.

    Raises:
        OSError: the file cannot be renamed or copied.
    """
    number = 1
    while True:
        new = path.with_name(f"{path.name}.set-aside{'' if number == 1 else f'-{number}'}")
        try:
            os.link(path, new)  # unlike a rename, this fails if the name is taken
            break
        except FileExistsError:
            number += 1
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            new.write_bytes(path.read_bytes())  # a file system without links
            break
    if not copy:
        path.unlink()
    return new


# ------------------------------------------------------------------------------------------------------------
# One writer at a time
# ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Keeps other processes of the lab from writing the same files. The hold ends with the process, however it ends.

    Args:
        path: the file that stands for the hold. It has the id of the process, and is removed at the end.
        what: names what is held, at the beginning of the message: "run.folder=runs/a".

    Raises:
        InUse: another process holds it.
        OSError: the file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _locked(path, what)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)  # while it is still locked: nobody else can hold it now
        file.close()


def _locked(path: Path, what: str) -> BinaryIO:
    """The file at `path`, locked, with this process's id in it."""
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            pid = file.read(20).decode("ascii", "replace").strip() or "unknown"
            file.close()
            raise InUse(
                f"{what} is in use by another process (pid {pid}): wait until it ends, stop it, or name another."
            ) from error
        except OSError:
            return file  # a file system without locks
        # The process that held it may have removed the file between the two calls above.
        with contextlib.suppress(FileNotFoundError):
            if _same(file, path):
                file.truncate(0)
                file.write(f"{os.getpid()}\n".encode("ascii"))
                file.flush()
                return file
        file.close()


def _same(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is still the one at `path`."""
    return os.path.samestat(os.fstat(file.fileno()), path.stat())
