"""The sandbox of a student's notebook: a process with limits, as the grader starts it, talks to it and ends it.

The other end, inside the process, is `worker`. Nothing that comes from there is trusted.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from labutils.exercises.core import Failed, NotYet
from labutils.exercises.grading import wire
from labutils.exercises.grading.grades import CRASHED, TIMED_OUT, clean
from labutils.machine import runtime

_KEPT = (  # environment variables that the process gets
    "PATH",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "LABUTILS_DEVICE",
    "TRITON_INTERPRET",
)
_PREFIXES_KEPT = ("CUDA_", "NVIDIA_", "OMP_", "MKL_")
_NAMESPACES = ("unshare", "--user", "--map-current-user", "--pid", "--fork", "--kill-child", "--net", "--mount-proc")


@dataclass(frozen=True)
class Limits:
    """What one notebook may use.

    Attributes:
        seconds: to execute all its cells.
        call_seconds: for one call of a function. All calls of an exercise together, up to a few hundred, may take five
            times as long.
        memory_gib: memory of the host, of which CUDA's libraries take a few GiB.
    """

    seconds: float = 900.0
    call_seconds: float = 60.0
    memory_gib: float = 8.0 if runtime.interpreted else 24.0


class Lost(BaseException):
    """The student's process is gone, or took too long. Not an Exception, so that no check can catch it."""

    def __init__(self, result: str, message: str) -> None:
        super().__init__(message)
        self.result, self.message = result, message


class Absent(BaseException):
    """The notebook does not define the function. Not an Exception, so that no check can catch it."""


@functools.cache
def isolation() -> tuple[str, ...]:
    """The command that puts a process into its own namespaces, or () if this system does not allow that."""
    if shutil.which("unshare") is None:
        return ()
    quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        if subprocess.run([*_NAMESPACES, "true"], timeout=20, **quiet).returncode == 0:
            return _NAMESPACES
    return ()


class StudentProcess:
    """A process that executes a student's notebook, and then calls its functions.

    Args:
        limits: what the process may use.

    Raises:
        OSError: the process could not be started.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.folder = Path(tempfile.mkdtemp(prefix="labutils-grade-"))
        self.channel, theirs = socket.socketpair()
        command = [*isolation(), sys.executable, "-P", "-m", "labutils.exercises.grading.worker"]
        self.started = time.monotonic()
        with theirs:
            self.process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(int(limits.memory_gib * 1024))],
                pass_fds=[theirs.fileno()],
                cwd=self.folder,
                env=_environment(self.folder),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    def execute(self, cells: list[tuple[int, str]], progress: Callable[[int], None]) -> list[tuple[int, str]]:
        """Runs the cells; returns (number, error) of each cell that failed. Raises Lost."""
        deadline = self.started + self.limits.seconds
        self._send({"cells": [list(cell) for cell in cells]}, "at its start")
        number = 0
        for _ in range(len(cells) + 1):
            place = f"in cell {number}" if number else "before its first cell"
            message = self._receive(deadline, place, f"{self.limits.seconds:g} s for the whole notebook")
            if isinstance(message, dict) and isinstance(message.get("cell"), int):
                number = message["cell"]
                progress(number)
            elif isinstance(message, dict) and isinstance(message.get("executed"), list):
                try:
                    return [(int(n), str(text)) for n, text in message["executed"]]
                except (TypeError, ValueError, OverflowError):  # the notebook itself may have sent it
                    break
            else:
                break
        raise Lost(CRASHED, f"its process sent something that is not an answer, in cell {number}")

    def call(self, name: str, arguments: tuple, left: float = math.inf) -> tuple[Any, int]:
        """The value of a function, and the elements of the largest tensor that PyTorch made in the call.

        Args:
            name: the function.
            arguments: its arguments.
            left: seconds that its exercise has left.

        Raises:
            NotYet: the function is still a stub.
            Failed: the function raised an exception.
            Absent: the notebook does not define the function.
            Lost: the process is gone, took too long, or sent something that is not an answer.
        """
        number = secrets.token_hex(8)
        self._send({"id": number, "name": name, "arguments": arguments}, f"when {name} was called")
        seconds = self.limits.call_seconds
        deadline = time.monotonic() + min(seconds, left)
        allowed = f"{seconds:g} s for one call"
        if left < seconds:
            allowed = f"{5 * seconds:g} s for all calls of an exercise"
        for _ in range(100):
            answer = self._receive(deadline, f"in {name}", allowed)
            if isinstance(answer, dict) and answer.get("id") == number:
                break  # it answers this call, not a question that nobody asked
        else:
            raise Lost(CRASHED, f"its process answers other questions than {name}")
        if "absent" in answer:
            raise Absent
        if "not yet" in answer:
            raise NotYet(clean(answer["not yet"]))
        if "value" not in answer:
            raise Failed(clean(answer.get("failed", "no value")))
        largest = answer.get("largest")
        return answer["value"], largest if isinstance(largest, int) else 0

    def _send(self, message: Any, when: str) -> None:
        try:
            self.channel.settimeout(30)
            wire.send(self.channel, message)
        except (OSError, TimeoutError):
            raise Lost(CRASHED, f"its process was gone {when}") from None

    def _receive(self, deadline: float, place: str, allowed: str) -> Any:
        try:
            return wire.receive(self.channel, deadline, self._enforce_memory_limit)
        except TimeoutError:
            raise Lost(TIMED_OUT, f"stopped {place}: {allowed} are allowed") from None
        except EOFError:
            raise Lost(CRASHED, f"its process ended {place}") from None
        except wire.Garbled as error:
            raise Lost(
                CRASHED, f"its process sent something that is not an answer, {place} ({clean(str(error))})"
            ) from None

    def _enforce_memory_limit(self) -> None:
        used = 0
        for process in _process_tree(self.process.pid):
            with contextlib.suppress(psutil.Error):
                used += process.memory_info().rss
        if used > self.limits.memory_gib * 2**30:
            raise Lost(CRASHED, f"stopped at {used / 2**30:.1f} GiB of memory: {self.limits.memory_gib:g} are allowed")

    def close(self) -> None:
        """Ends the process and all processes that it started, and removes its folder."""
        self.channel.close()
        tree = _process_tree(self.process.pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in tree:
            with contextlib.suppress(psutil.Error):
                process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=20)
        shutil.rmtree(self.folder, ignore_errors=True)


def _process_tree(pid: int) -> list[psutil.Process]:
    """The process and its descendants; [] if it is gone."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def _environment(folder: Path) -> dict[str, str]:
    """The environment of a student's process: no tokens, an empty home and empty caches in `folder`."""
    kept = {k: v for k, v in os.environ.items() if k in _KEPT or k.startswith(_PREFIXES_KEPT)}
    own = {"HOME": "home", "LABUTILS_STATE": "state.json", "TRITON_CACHE_DIR": "triton", "TMPDIR": "tmp"}
    own |= {"IPYTHONDIR": "ipython", "MPLCONFIGDIR": "matplotlib", "XDG_CACHE_HOME": "cache"}
    for name in own.values():
        if not name.endswith(".json"):
            (folder / name).mkdir()
    kept |= {variable: str(folder / name) for variable, name in own.items()}
    return kept | {"MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


class RemoteCall:
    """A student's function in its process, as a check sees it; see `core.Call`."""

    def __init__(self, process: StudentProcess, name: str) -> None:
        self.process, self.name, self.largest = process, name, 0
        self.left = 5 * process.limits.call_seconds

    def __call__(self, *arguments: Any) -> Any:
        """The function's result; raises what `StudentProcess.call` raises."""
        start = time.monotonic()
        value, self.largest = self.process.call(self.name, arguments, self.left)
        self.left -= time.monotonic() - start
        return value
