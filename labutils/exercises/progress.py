"""What a student has solved, kept in a small file.

The file is `LABUTILS_STATE` if that is set, otherwise `labutils/progress.json` under `XDG_STATE_HOME` (by default
`~/.local/state`). It belongs to the student: grading never reads it. If it cannot be written, as in a read-only home,
the exercises still work, and say once that the progress is not kept.

A file that is damaged, or that something else has written, is never overwritten. `record` sets it aside under another
name, and keeps the entries that can still be read.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from pathlib import Path
from typing import Any

from labutils.exercises.core import PASSED, Outcome
from labutils.machine import files

_warned = False  # whether this process has said that nothing can be kept
_session: dict[str, dict[str, Any]] = {}  # what this process has recorded: all that counts if there is no file


def state_file() -> Path:
    """Where the progress is kept.

    Raises:
        ValueError: `LABUTILS_STATE` begins with `~`, and the home folder is not known.
    """
    chosen = os.environ.get("LABUTILS_STATE")
    return files.expanded(chosen, "LABUTILS_STATE") if chosen else files.state_folder() / "progress.json"


def load() -> tuple[dict[str, dict[str, Any]], str]:
    """The state of each exercise that was tried, and a sentence if the file cannot be used, or only a part of it.

    Returns:
        {"safe_softmax": {"last": "wrong", "passed": None or the date}, ...}, and the sentence or "".
    """
    states, note, _ = _load()
    return states, note


def _load() -> tuple[dict[str, dict[str, Any]], str, Path | None]:
    """As `load`, and the file if it must be set aside before anything is written."""
    try:
        path = state_file()
        content = path.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return dict(_session), "", None
    except (OSError, ValueError) as error:
        return dict(_session), f"The progress of earlier sessions cannot be read ({_reason(error)}).", None
    states, whole = _entries(content)
    states |= {name: entry for name, entry in _session.items() if name not in states}
    if whole:
        return states, "", None
    return states, f"{path}, the file with the progress of earlier sessions, is damaged or of another program.", path


def _entries(content: str) -> tuple[dict[str, dict[str, Any]], bool]:
    """The readable entries in the text of a file, and whether these are all that the file has."""
    try:
        found = json.loads(content.removeprefix("\ufeff"))
        if not isinstance(found, dict) or not isinstance(entries := found.get("exercises"), dict):
            return {}, False
        whole = set(found) == {"exercises"}
    except (ValueError, RecursionError):
        entries, whole = _salvaged(content), False
    states = {name: entry for name, stored in entries.items() if (entry := _entry(stored))}
    return states, whole and len(states) == len(entries)


def _entry(stored: Any) -> dict[str, Any] | None:
    """A stored entry if it is one, else None."""
    if not isinstance(stored, dict) or not isinstance(stored.get("last"), str):
        return None
    passed = stored.get("passed")
    if passed is not None and not (isinstance(passed, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", passed)):
        return None
    return {"last": stored["last"], "passed": passed}


def _salvaged(content: str) -> dict[str, Any]:
    """The whole entries in a text that is no JSON any more, for instance because its end is missing."""
    if not re.match(r'\s*\{\s*"exercises"\s*:', content):
        return {}
    entries = {}
    for found in re.finditer(r'"(\w+)"\s*:\s*(\{[^{}]*\})', content):
        try:
            entries[found[1]] = json.loads(found[2])
        except ValueError:
            continue
    return entries


def record(outcome: Outcome) -> str:
    """Records an outcome. An exercise that has passed once stays passed.

    A file that cannot be read is left as it is. A damaged or foreign file is set aside under another name.

    Returns:
        "", or a sentence for the student: a file was set aside, or nothing can be kept (said only once).
    """
    global _warned
    states, note, damaged = _load()
    passed = states.get(outcome.exercise, {}).get("passed")
    if outcome.status == PASSED:
        passed = passed or datetime.date.today().isoformat()
    _session[outcome.exercise] = states[outcome.exercise] = {"last": outcome.status, "passed": passed}
    reason = note
    if not note or damaged:
        try:
            said = ""
            if damaged is not None:
                said = f"{note} It was set aside as {files.set_aside(damaged).name}; entries that can be read are kept."
            files.replace(state_file(), json.dumps({"exercises": states}, indent=1))
            return said
        except (OSError, ValueError) as error:
            reason = f"{_reason(error)}."
    if _warned:
        return ""
    _warned = True
    return (
        f"Your progress is kept only for this session: {reason} To keep it, set LABUTILS_STATE to a file that you may "
        "read and write, before you start JupyterLab."
    )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).splitlines()[0]
