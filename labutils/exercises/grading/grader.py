"""Grades returned notebooks, one or a whole folder.

A returned notebook is a stranger's program. It runs in a sandbox (`sandbox`): a process with a clean environment, an
empty home and limits on time and memory. If the system allows it, the process has no network and cannot see other
processes. It gives no marks. The checks run here, in code that no student has touched: they draw inputs from a seed
that nobody has seen, send them to the process, and judge the values that come back. So a notebook that patches the
checks, writes results, prints marks or deletes files changes only its own process.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

from labutils.exercises import names
from labutils.exercises.core import PASSED, Outcome, outcome_of
from labutils.exercises.grading import grades, submissions
from labutils.exercises.grading.grades import MISSING, UNREADABLE, Mark
from labutils.exercises.grading.sandbox import Absent, Limits, Lost, RemoteCall, StudentProcess


def grade_cells(
    cells: list[tuple[int, str]] | str,
    submission: str,
    limits: Limits,
    progress: Callable[[str], None] = lambda text: None,
) -> Generator[Mark, None, None]:
    """Yields the mark of each exercise of one notebook, whatever the notebook does.

    If a function hangs or ends its process, a new process tests the exercises after it.

    Args:
        cells: what `submissions.read_cells` returned, or the reason why the file could not be read.
        submission: the name of the notebook in the table.
        limits: what its process may use.
        progress: gets a few words now and then.

    Raises:
        RuntimeError: the process could not be started.
    """
    if isinstance(cells, str):
        yield Mark(submission, "", "", UNREADABLE, 0, 0.0, grades.clean(cells), "")
        return
    notebook = submissions.which_notebook(cells)
    if not notebook:
        yield Mark(submission, "", "", MISSING, 0, 0.0, "it has none of the lab's exercises", "")
        return
    notes = submissions.remarks(cells)
    waiting = names(notebook)
    seed = secrets.randbits(62)  # a new seed for each notebook, which nobody knows before
    process, broken = None, ""

    def mark(name: str, outcome: Outcome, seconds: float) -> Mark:
        note = "; ".join(filter(None, [notes.get(name), notes.get(""), broken]))
        points = int(outcome.status == PASSED)
        return Mark(
            submission, notebook, name, outcome.status, points, round(seconds, 2), grades.clean(outcome.message), note
        )

    try:
        while waiting:
            try:
                process = StudentProcess(limits)
                failed = process.execute(cells, lambda number: progress(f"cell {number} of {cells[-1][0]}"))
                broken = "; ".join(f"cell {number} failed: {grades.clean(error, 80)}" for number, error in failed[:3])
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
                    outcome = outcome_of(name, RemoteCall(process, name), seed)
                except Absent:
                    yield mark(name, Outcome(name, MISSING, "the notebook does not define this function"), 0.0)
                    continue
                except Lost as lost:
                    yield mark(name, Outcome(name, lost.result, lost.message), time.monotonic() - start)
                    break
                yield mark(name, outcome, time.monotonic() - start)
            process.close()
            process = None
    finally:
        if process is not None:
            process.close()


def grade_folder(folder: Path, table: Path, limits: Limits, say: Callable[[str], None] = print) -> list[Mark]:
    """Grades every notebook below a folder, and writes the table after each mark.

    Args:
        folder: the returned notebooks, with a folder or a file for each student.
        table: the CSV file to make; its columns are `grades.COLUMNS`.
        limits: what each notebook may use.
        say: gets a line for each notebook.

    Raises:
        ValueError: there are no notebooks.
        FileExistsError: the table exists already.
        RuntimeError: the process of a notebook could not be started.
        OSError: the table cannot be written.
    """
    from tqdm.auto import tqdm

    paths = submissions.find(folder)
    if table.exists():
        raise FileExistsError(table)
    # All notebooks are read before the first one runs, which may delete the others.
    notebooks = [(grades.label(path.relative_to(folder)), _cells_or_reason(path)) for path in paths]
    sources = _LabSources()
    marks: list[Mark] = []
    grades.save(table, marks)
    with tqdm(total=len(notebooks), unit="notebook", leave=False) as bar:
        for submission, cells in notebooks:
            start, first = time.monotonic(), len(marks)
            progress = functools.partial(_show, bar, submission)
            try:
                with contextlib.closing(grade_cells(cells, submission, limits, progress)) as found:
                    for mark in found:
                        marks.append(mark)
                        grades.save(table, marks)
            finally:  # also after an interrupt
                changed = sources.restore()
            if changed:
                note = f"changed files of labutils, which were restored: {', '.join(changed[:3])}"
                if sources.kept:
                    say(f"labutils was changed meanwhile, and restored; the changed files are in {sources.kept}")
                marks[first:] = [
                    replace(mark, remarks=grades.clean(f"{note}; {mark.remarks}")) for mark in marks[first:]
                ]
            grades.save(table, marks)
            bar.update()
            bar.clear()
            say(f"{submission}: {grades.summary(marks[first:])}, {time.monotonic() - start:.0f} s")
    return marks


def _cells_or_reason(path: Path) -> list[tuple[int, str]] | str:
    try:
        return submissions.read_cells(path)
    except ValueError as error:
        return str(error)


class _LabSources:
    """The sources of labutils as they were before any notebook ran."""

    def __init__(self) -> None:
        root = Path(__file__).resolve().parents[2]
        self.sources = {path: path.read_bytes() for path in sorted(root.rglob("*.py"))}
        self.kept = ""
        """Folder with the changed files, for the teacher to look at; "" if there are none."""

    def restore(self) -> list[str]:
        """Restores the files that a notebook changed or deleted; returns their names."""
        changed = []
        for path, source in self.sources.items():
            if path.is_symlink() or not path.is_file() or path.read_bytes() != source:
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.is_symlink() or path.exists():
                    # moved, not overwritten: a link may lead to a file that is not ours
                    self.kept = self.kept or tempfile.mkdtemp(prefix="labutils-changed-")
                    shutil.move(path, Path(self.kept) / f"{len(os.listdir(self.kept))}-{path.name}")
                path.write_bytes(source)
                changed.append(path.name)
        return changed


def _show(bar: Any, submission: str, text: str) -> None:
    bar.set_postfix_str(f"{submission}: {text}")
