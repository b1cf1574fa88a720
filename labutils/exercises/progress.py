"""What a student has solved, kept in a small file.

The file is `LABUTILS_STATE` if that is set, otherwise `labutils/progress.json` under `XDG_STATE_HOME` (by default
`~/.local/state`). It belongs to the student: grading never reads it. If it cannot be written, as in a read-only home,
the exercises still work, and say once that the progress is not kept.
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
_warned = False  # whether this process has said that nothing can be kept
_session: dict[str, dict[str, Any]] = {}  # what this process has recorded: all that counts if there is no file


def state_file() -> Path:
    """Where the progress is kept."""
    chosen = os.environ.get("LABUTILS_STATE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "labutils" / "progress.json"


def load() -> tuple[dict[str, dict[str, Any]], str]:
    """The state of each exercise that was tried, and a sentence if the file cannot be used.

    Returns:
        {"safe_softmax": {"last": "wrong", "passed": None or the date}, ...}, and the sentence or "".
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
    """Records an outcome. An exercise that has passed once stays passed.

    A file that cannot be read is left as it is.

    Returns:
        "", or a sentence for the student: a damaged file begins anew, or nothing can be kept (said only once).
    """
    global _warned
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
    if _warned:
        return ""
    _warned = True
    return (
        f"Your progress is kept only for this session: {reason} To keep it, set LABUTILS_STATE to a file that you may "
        "read and write, before you start JupyterLab."
    )


def _write(states: dict[str, dict[str, Any]]) -> None:
    """Replaces the whole file in one step, so that an interrupt or a second notebook cannot leave half of it."""
    files.replace(state_file(), json.dumps({"exercises": states}, indent=1))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).splitlines()[0]
