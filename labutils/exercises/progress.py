"""What a student has solved, kept in a small file of their own.

The file is `LABUTILS_STATE` where that is set, else `labutils/progress.json` under `XDG_STATE_HOME` (`~/.local/state`
where that is not set). It belongs to the student: grading never reads it. Where it cannot be written, as with a
read-only home, the exercises work all the same, and say once that nothing is kept.
"""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

from labutils.exercises.core import PASSED, Outcome
from labutils.machine import files

_DAMAGED = "The file with the progress of earlier sessions is damaged; it begins anew."
_told = False
_session: dict[str, dict[str, Any]] = {}  # what this process has recorded, for where no file can hold it


def state_file() -> Path:
    """Where the progress is kept."""
    chosen = os.environ.get("LABUTILS_STATE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "labutils" / "progress.json"


def load() -> tuple[dict[str, dict[str, Any]], str]:
    """The state of each exercise that was tried, and a sentence about the file where it cannot be used.

    Returns:
        {"safe_softmax": {"last": "wrong", "passed": None or the date}, ...} and "" or the sentence.
    """
    try:
        stored = json.loads(state_file().read_text(encoding="utf-8"))
        entries = stored["exercises"]
        states = {name: {"last": str(entry["last"]), "passed": entry.get("passed")} for name, entry in entries.items()}
    except FileNotFoundError:
        return dict(_session), ""
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        return dict(_session), f"The progress of earlier sessions cannot be read ({_reason(error)})."
    except (ValueError, KeyError, TypeError, AttributeError):
        return dict(_session), _DAMAGED
    return states | {name: entry for name, entry in _session.items() if name not in states}, ""


def record(outcome: Outcome) -> str:
    """Keeps an outcome; an exercise once passed stays so.

    Returns:
        "", or a sentence: that a damaged file begins anew, or, the first time alone, that nothing can be kept. A file
        that cannot be read is left as it is.
    """
    global _told
    states, note = load()
    passed = states.get(outcome.exercise, {}).get("passed")
    if outcome.status == PASSED:
        passed = passed or datetime.date.today().isoformat()
    _session[outcome.exercise] = states[outcome.exercise] = {"last": outcome.status, "passed": passed}
    reason = note
    if note in ("", _DAMAGED):
        try:
            _write(states)
            return note
        except (OSError, RuntimeError) as error:
            reason = f"{_reason(error)}."
    if _told:
        return ""
    _told = True
    return (
        f"Your progress is kept in this session alone: {reason} To keep it, set LABUTILS_STATE to a file that you may "
        "read and write, before you start JupyterLab."
    )


def _write(states: dict[str, dict[str, Any]]) -> None:
    """Replaces the file as a whole, so that an interrupt, or a second notebook, leaves no half of it."""
    files.replace(state_file(), json.dumps({"exercises": states}, indent=1))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).splitlines()[0]
