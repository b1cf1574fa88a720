"""The table of grades: its rows, its file, and texts of students made fit for it."""

from __future__ import annotations

import csv
import os
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from labutils.exercises.core import NOT_YET, PASSED

TIMED_OUT, CRASHED, MISSING, UNREADABLE = "timed out", "crashed", "missing", "unreadable"


@dataclass(frozen=True)
class Mark:
    """One row of the table: one exercise of one returned notebook."""

    submission: str
    """Path of the notebook below the folder."""
    notebook: str
    """"01" to "04", or "" if it could not be told."""
    exercise: str
    result: str
    """"passed", "wrong", "error", "not yet", "missing", "timed out", "crashed" or "unreadable"."""
    points: int
    """1 if it passed, otherwise 0."""
    seconds: float
    message: str
    remarks: str


COLUMNS = tuple(field.name for field in fields(Mark))
"""Columns of the table, in their order."""


def clean(text: Any, longest: int = 400) -> str:
    """A student's text made fit for the table: printable, short, and never a formula of a spreadsheet."""
    text = "".join(c if c.isprintable() else " " for c in str(text))
    text = " ".join(text.split())[:longest]
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def label(path: Path) -> str:
    """A path as text for the table and the terminal, whatever bytes a student's file name has."""
    return clean(os.fsencode(path).decode("utf-8", "backslashreplace"), 1000)


def save(table: Path, marks: list[Mark]) -> None:
    """Writes the whole table anew, so that a change by a notebook in the meantime is lost.

    Raises:
        OSError: the table cannot be written; the file keeps the rows that it had.
    """
    table.parent.mkdir(parents=True, exist_ok=True)
    # a name that no notebook can guess
    descriptor, temporary = tempfile.mkstemp(dir=table.parent, prefix=f".{table.name}")
    try:
        with os.fdopen(descriptor, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(map(asdict, marks))
        os.chmod(temporary, 0o644)
        os.replace(temporary, table)
    except OSError as error:  # the error of a full disk does not name the file
        raise OSError(error.errno, f"{error.strerror} (rows written before are kept)", str(table)) from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def summary(marks: list[Mark]) -> str:
    """The marks of one notebook in a line: "2 of 6 passed; 1 wrong"."""
    if not marks[0].exercise:
        return f"{marks[0].result}, {marks[0].message}"
    counts: dict[str, int] = {}
    for mark in marks:
        counts[mark.result] = counts.get(mark.result, 0) + 1
    rest = ", ".join(f"{count} {result}" for result, count in counts.items() if result not in (PASSED, NOT_YET))
    text = f"{counts.get(PASSED, 0)} of {len(marks)} passed"
    return f"{text}; {rest}" if rest else text
