"""Grades folders of returned notebooks.

A returned notebook is a stranger's program. It runs in a process of its own (`grading.worker`), with a clean
environment, an empty home, limits on time and memory and, where the system allows it, in namespaces without a network
and without sight of other processes. That process gives no marks. The checks run here, in code that no student has
touched: they draw inputs from a seed that nobody has seen, send them over, and judge the values that come back. So a
notebook that patches the checks, writes results, prints marks or deletes files changes nothing but its own process.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import functools
import json
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
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import psutil

from labutils.exercises import names
from labutils.exercises.core import EXERCISES, NOT_YET, PASSED, Failed, NotYet, Outcome, run
from labutils.exercises.grading import wire
from labutils.machine import runtime

TIMED_OUT, CRASHED, MISSING, UNREADABLE = "timed out", "crashed", "missing", "unreadable"
LARGEST_NOTEBOOK = 50 * 2**20
_KEPT = (
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
_OFFERED = ("check", "hint", "report", "solution")
_SUSPICIOUS = {"ctypes", "socket", "subprocess", "signal", "multiprocessing", "inspect", "gc"}


@dataclass(frozen=True)
class Mark:
    """One row of the table: one exercise of one returned notebook."""

    submission: str
    """Path of the notebook below the folder."""
    notebook: str
    """"01" to "04", or empty where it could not be told."""
    exercise: str
    result: str
    """passed, wrong, error, not yet, missing, timed out, crashed or unreadable."""
    points: int
    """1 where it passed, else 0."""
    seconds: float
    message: str
    remarks: str


COLUMNS = tuple(field.name for field in fields(Mark))
"""Columns of the table, in their order."""


@dataclass(frozen=True)
class Limits:
    """What one notebook may use: seconds to execute it, seconds of one call, GiB of the host's memory.

    CUDA's libraries alone take a few GiB of it. All calls of one exercise together, and a check makes up to a few
    hundred, may take five times as long as one.
    """

    seconds: float = 900.0
    call_seconds: float = 60.0
    memory_gib: float = 8.0 if runtime.interpreted else 24.0


class Lost(BaseException):
    """The student's process is gone, or took too long. No Exception: no check may catch it."""

    def __init__(self, result: str, message: str) -> None:
        super().__init__(message)
        self.result, self.message = result, message


class Absent(BaseException):
    """The notebook defines no such function. No Exception, as above."""


# ---------------------------------------------------------------------------------------------------------------------
# One process
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def isolation() -> tuple[str, ...]:
    """The command that puts a process into namespaces of its own, empty where this system does not allow it."""
    if shutil.which("unshare") is None:
        return ()
    quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        if subprocess.run([*_NAMESPACES, "true"], timeout=20, **quiet).returncode == 0:
            return _NAMESPACES
    return ()


class Worker:
    """A process that has a student's notebook in it."""

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
        """Runs the cells; returns (number, error) of those that failed. Raises Lost."""
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
                except (TypeError, ValueError, OverflowError):  # it may come from the notebook and hold anything
                    break
            else:
                break
        raise Lost(CRASHED, f"its process sent something that is no answer, in cell {number}")

    def call(self, name: str, arguments: tuple, left: float = math.inf) -> tuple[Any, int]:
        """The value of a function and the size of its largest tensor.

        Args:
            name: of the function. arguments: for it. left: seconds that are left to its exercise.

        Raises:
            NotYet, Failed, Absent, Lost: see there.
        """
        number = secrets.token_hex(8)
        self._send({"id": number, "name": name, "arguments": arguments}, f"when {name} was called")
        one = self.limits.call_seconds
        deadline = time.monotonic() + min(one, left)
        allowed = f"{one:g} s for one call" if one <= left else f"{5 * one:g} s for all calls of an exercise"
        for _ in range(100):
            answer = self._receive(deadline, f"in {name}", allowed)
            if isinstance(answer, dict) and answer.get("id") == number:  # else an answer to nothing that was asked
                break
        else:
            raise Lost(CRASHED, f"its process answers other questions than {name}")
        if "absent" in answer:
            raise Absent
        if "not yet" in answer:
            raise NotYet(_clean(answer["not yet"]))
        if "value" not in answer:
            raise Failed(_clean(answer.get("failed", "no value")))
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
            return wire.receive(self.channel, deadline, self._memory)
        except TimeoutError:
            raise Lost(TIMED_OUT, f"stopped {place}: {allowed} are allowed") from None
        except EOFError:
            raise Lost(CRASHED, f"its process ended {place}") from None
        except wire.Garbled as error:
            raise Lost(
                CRASHED, f"its process sent something that is no answer, {place} ({_clean(str(error))})"
            ) from None

    def _memory(self) -> None:
        used = 0
        for process in _family(self.process.pid):
            with contextlib.suppress(psutil.Error):
                used += process.memory_info().rss
        if used > self.limits.memory_gib * 2**30:
            raise Lost(CRASHED, f"stopped at {used / 2**30:.1f} GiB of memory: {self.limits.memory_gib:g} are allowed")

    def close(self) -> None:
        """Ends the process and all that it has started, and removes its folder."""
        self.channel.close()
        family = _family(self.process.pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=20)
        shutil.rmtree(self.folder, ignore_errors=True)


def _family(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def _environment(folder: Path) -> dict[str, str]:
    """What a student's process may know of this one's environment: no tokens, no home, no shared caches."""
    kept = {k: v for k, v in os.environ.items() if k in _KEPT or k.startswith(_PREFIXES_KEPT)}
    own = {"HOME": "home", "LABUTILS_STATE": "state.json", "TRITON_CACHE_DIR": "triton", "TMPDIR": "tmp"}
    own |= {"IPYTHONDIR": "ipython", "MPLCONFIGDIR": "matplotlib", "XDG_CACHE_HOME": "cache"}
    for name in own.values():
        if not name.endswith(".json"):
            (folder / name).mkdir()
    kept |= {variable: str(folder / name) for variable, name in own.items()}
    return kept | {"MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


class RemoteCall:
    """A student's function in its process, as a check sees it."""

    def __init__(self, worker: Worker, name: str) -> None:
        self.worker, self.name, self.largest = worker, name, 0
        self.left = 5 * worker.limits.call_seconds

    def __call__(self, *arguments: Any) -> Any:
        """The function's result; raises what `Worker.call` does."""
        start = time.monotonic()
        value, self.largest = self.worker.call(self.name, arguments, self.left)
        self.left -= time.monotonic() - start
        return value


# ---------------------------------------------------------------------------------------------------------------------
# One notebook
# ---------------------------------------------------------------------------------------------------------------------


def find(folder: Path) -> list[Path]:
    """The notebooks below a folder, without Jupyter's checkpoints and what macOS adds to archives.

    Raises:
        ValueError: there is none, or no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: name the one that holds the returned notebooks.")
    leftovers = {".ipynb_checkpoints", "__MACOSX"}
    found = sorted(
        path
        for path in folder.rglob("*.ipynb")
        if not leftovers & set(path.relative_to(folder).parts) and not path.name.startswith("._") and path.is_file()
    )
    if not found:
        raise ValueError(f"There is no .ipynb in {folder} or below.")
    return found


def read_cells(path: Path) -> list[tuple[int, str]]:
    """(number, source) of the code cells that are to be executed.

    Raises:
        ValueError: the file is no notebook.
    """
    try:
        if path.stat().st_size > LARGEST_NOTEBOOK:
            raise ValueError(f"it has more than {LARGEST_NOTEBOOK // 2**20} MiB")
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark first
        if not text.strip():
            raise ValueError("it is empty")
        cells = json.loads(text)["cells"]
        result = []
        for number, cell in enumerate(cells, start=1):
            source = cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])
            tags = cell.get("metadata", {}).get("tags", [])
            if cell["cell_type"] == "code" and "skip-execution" not in tags:
                result.append((number, source))
        return result
    except UnicodeDecodeError:
        raise ValueError("it is no text in UTF-8") from None
    except (OSError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is no notebook ({type(error).__name__})") from None
    except json.JSONDecodeError:
        raise ValueError("it is no JSON") from None


def which_notebook(cells: list[tuple[int, str]]) -> str:
    """ "01" to "04": the notebook most of whose exercises are defined or checked in these cells, or "" if none is."""
    text = "\n".join(source for _, source in cells)
    counts = dict.fromkeys(sorted({exercise.notebook for exercise in EXERCISES.values()}), 0)
    for name, exercise in EXERCISES.items():
        counts[exercise.notebook] += f"def {name}(" in text or f"check.{name}(" in text
    best = max(counts, key=counts.__getitem__)
    return best if counts[best] else ""


def remarks(cells: list[tuple[int, str]]) -> dict[str, str]:
    """What a teacher may want to look at, by exercise; "" for the notebook as a whole. A hint, and no proof."""
    found: dict[str, set[str]] = {}
    for _, source in cells:
        lines = "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))
        try:
            tree = ast.parse(lines)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        for node in ast.walk(tree):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom) and node.module == "labutils.exercises":
                modules = [f"labutils.exercises.{a.name}" for a in node.names if a.name not in _OFFERED]
            for module in modules:
                if module.split(".")[0] in _SUSPICIOUS or module.startswith("labutils.exercises"):
                    found.setdefault("", set()).add(f"imports {module}")
            if isinstance(node, ast.FunctionDef) and node.name in EXERCISES:
                used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                used |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
                for name in sorted(
                    used & {"reference", "exercises", "solutions", "solution", "scaled_dot_product_attention"}
                ):
                    found.setdefault(node.name, set()).add(f"uses {name}")
    return {name: _clean("; ".join(sorted(texts))) for name, texts in found.items()}


def grade_cells(
    cells: list[tuple[int, str]] | str,
    submission: str,
    limits: Limits,
    progress: Callable[[str], None] = lambda text: None,
) -> Generator[Mark, None, None]:
    """Marks of the exercises of one notebook, as they are found.

    Args:
        cells: from `read_cells`, or why the file could not be read.
        submission: the name of the notebook in the table. limits: for its process.
        progress: gets a few words now and then.

    Whatever the notebook does, there is one mark for each exercise of the notebook that it is. Where one function hangs
    or ends the process, the process is started anew for those after it.
    """
    if isinstance(cells, str):
        yield Mark(submission, "", "", UNREADABLE, 0, 0.0, _clean(cells), "")
        return
    notebook = which_notebook(cells)
    if not notebook:
        yield Mark(submission, "", "", MISSING, 0, 0.0, "it has none of the lab's exercises", "")
        return
    notes = remarks(cells)
    waiting = names(notebook)
    seed = secrets.randbits(62)  # one for this notebook, known to nobody before
    worker, broken = None, ""

    def mark(name: str, outcome: Outcome, seconds: float) -> Mark:
        note = "; ".join(filter(None, [notes.get(name), notes.get(""), broken]))
        points = int(outcome.status == PASSED)
        return Mark(
            submission, notebook, name, outcome.status, points, round(seconds, 2), _clean(outcome.message), note
        )

    try:
        while waiting:
            try:
                worker = Worker(limits)
                failed = worker.execute(cells, lambda number: progress(f"cell {number} of {cells[-1][0]}"))
                broken = "; ".join(f"cell {number} failed: {_clean(error, 80)}" for number, error in failed[:3])
            except Lost as lost:
                for name in waiting:
                    yield mark(
                        name, Outcome(name, lost.result, f"the notebook did not run to its end: {lost.message}"), 0.0
                    )
                return
            except OSError as error:
                raise RuntimeError(f"The process for {submission} could not be started: {error}") from error
            while waiting:
                name = waiting.pop(0)
                progress(name)
                start = time.monotonic()
                try:
                    outcome = run(name, RemoteCall(worker, name), seed)
                except Absent:
                    yield mark(name, Outcome(name, MISSING, "the notebook defines no such function"), 0.0)
                    continue
                except Lost as lost:
                    yield mark(name, Outcome(name, lost.result, lost.message), time.monotonic() - start)
                    break
                yield mark(name, outcome, time.monotonic() - start)
            worker.close()
            worker = None
    finally:
        if worker is not None:
            worker.close()


def _clean(text: Any, longest: int = 400) -> str:
    """A student's text, fit for a table: printable, short, and no formula of a spreadsheet."""
    text = "".join(c if c.isprintable() else " " for c in str(text))
    text = " ".join(text.split())[:longest]
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


# ---------------------------------------------------------------------------------------------------------------------
# A folder
# ---------------------------------------------------------------------------------------------------------------------


def grade_folder(folder: Path, table: Path, limits: Limits, say: Callable[[str], None] = print) -> list[Mark]:
    """Grades every notebook below a folder and writes the table row by row.

    Args:
        folder: of returned notebooks, one folder or one file for each student.
        table: the CSV file to make; columns are `COLUMNS`.
        limits: of each notebook.
        say: gets a line for each notebook.

    Raises:
        ValueError: there are no notebooks. FileExistsError: the table is there already.
    """
    from tqdm.auto import tqdm

    paths = find(folder)
    if table.exists():
        raise FileExistsError(table)
    # All is read before the first notebook runs: a notebook may delete the others.
    submissions = [(_label(path.relative_to(folder)), _cells_or_reason(path)) for path in paths]
    package = _Package()
    marks: list[Mark] = []
    _save(table, marks)
    with tqdm(total=len(submissions), unit="notebook", leave=False) as bar:
        for submission, cells in submissions:
            start, first = time.monotonic(), len(marks)
            progress = functools.partial(_show, bar, submission)
            try:
                with contextlib.closing(grade_cells(cells, submission, limits, progress)) as found:
                    for mark in found:
                        marks.append(mark)
                        _save(table, marks)
            finally:  # after an interrupt, too
                changed = package.restore()
            if changed:
                note = f"changed files of labutils, which were restored: {', '.join(changed[:3])}"
                if package.kept:
                    say(f"labutils was changed meanwhile, and restored; what stood there is in {package.kept}")
                marks[first:] = [replace(mark, remarks=_clean(f"{note}; {mark.remarks}")) for mark in marks[first:]]
            _save(table, marks)
            bar.update()
            bar.clear()
            say(f"{submission}: {_summary(marks[first:])}, {time.monotonic() - start:.0f} s")
    return marks


def _label(path: Path) -> str:
    """A path for the table and the terminal, whatever bytes are in the names that students give."""
    return _clean(os.fsencode(path).decode("utf-8", "backslashreplace"), 1000)


def _cells_or_reason(path: Path) -> list[tuple[int, str]] | str:
    try:
        return read_cells(path)
    except ValueError as error:
        return str(error)


def _save(table: Path, marks: list[Mark]) -> None:
    """Writes the whole table anew: what somebody did to the file in the meantime is gone."""
    table.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=table.parent, prefix=f".{table.name}")  # a name that nobody can guess
    try:
        with os.fdopen(descriptor, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(map(asdict, marks))
        os.chmod(temporary, 0o644)
        os.replace(temporary, table)
    except OSError as error:  # that of a full disk names no file
        raise OSError(error.errno, f"{error.strerror} (rows written before are kept)", str(table)) from error
    finally:
        Path(temporary).unlink(missing_ok=True)


class _Package:
    """The sources of labutils as they are before any notebook has run."""

    def __init__(self) -> None:
        root = Path(__file__).resolve().parents[2]
        self.sources = {path: path.read_bytes() for path in sorted(root.rglob("*.py"))}
        self.kept = ""
        """Folder with what stood in place of the sources, for the teacher to look at."""

    def restore(self) -> list[str]:
        """Puts back what a notebook has changed or deleted; returns the names of these files."""
        changed = []
        for path, source in self.sources.items():
            if path.is_symlink() or not path.is_file() or path.read_bytes() != source:
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.is_symlink() or path.exists():
                    # moved, and not written over: a link's target is no file of ours
                    self.kept = self.kept or tempfile.mkdtemp(prefix="labutils-changed-")
                    shutil.move(path, Path(self.kept) / f"{len(os.listdir(self.kept))}-{path.name}")
                path.write_bytes(source)
                changed.append(path.name)
        return changed


def _show(bar: Any, submission: str, text: str) -> None:
    bar.set_postfix_str(f"{submission}: {text}")


def _summary(marks: list[Mark]) -> str:
    if not marks[0].exercise:
        return f"{marks[0].result}, {marks[0].message}"
    counts: dict[str, int] = {}
    for mark in marks:
        counts[mark.result] = counts.get(mark.result, 0) + 1
    rest = ", ".join(f"{count} {result}" for result, count in counts.items() if result not in (PASSED, NOT_YET))
    text = f"{counts.get(PASSED, 0)} of {len(marks)} passed"
    return f"{text}; {rest}" if rest else text
