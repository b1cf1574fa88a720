"""The program of a student's process: executes a notebook, then calls its functions on inputs that the grader sends.

`sandbox` starts it as `python -P -m labutils.exercises.grading.worker FD MEMORY_MIB`; it talks over the socket FD.
Nothing here is trusted: the student's code runs in this process, and may change all of it.
"""

from __future__ import annotations

import contextlib
import resource
import socket
import sys
from typing import Any

from labutils.exercises.calls import LocalCall, explain
from labutils.exercises.core import Failed, NotYet, error_text
from labutils.exercises.grading import wire
from labutils.machine import runtime


def _limit(memory_mib: int) -> None:
    """Limits this process: core dumps, the size of files and, without a GPU, memory."""
    limits = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 2**30)]
    if runtime.interpreted:  # the mappings of a GPU's driver would exceed any limit
        limits.append((resource.RLIMIT_DATA, memory_mib * 2**20))
    for kind, value in limits:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (value, value))


def main(arguments: list[str]) -> None:
    """Executes the cells of the first message, then answers calls until the grader closes the socket."""
    channel = socket.socket(fileno=int(arguments[0]))
    _limit(int(arguments[1]))
    from IPython.core.history import HistoryManager
    from IPython.core.interactiveshell import InteractiveShell

    HistoryManager.enabled = False
    shell = InteractiveShell.instance()
    shell.colors = "nocolor"
    cells = wire.receive(channel)["cells"]
    errors = []
    for number, source in cells:
        wire.send(channel, {"cell": number})
        try:
            result = shell.run_cell(source, store_history=False)
            error = result.error_before_exec or result.error_in_exec
        except BaseException as escaped:  # KeyboardInterrupt or GeneratorExit, raised by the student's code
            error = escaped
        if error is not None:
            first = next(iter(error_text(error).splitlines()), "")
            errors.append([number, f"{type(error).__name__}: {first[:200]}"])
    wire.send(channel, {"executed": errors[:50]})
    while True:
        request = wire.receive(channel)
        answer = _answer(shell.user_ns, request["name"], request["arguments"])
        try:
            wire.send(channel, {"id": request["id"]} | answer)
        except (ValueError, RecursionError) as error:
            wire.send(channel, {"id": request["id"], "failed": f"What it returned cannot be sent: {error_text(error)}"})


def _answer(namespace: dict[str, Any], name: str, arguments: tuple) -> dict[str, Any]:
    """Calls a function of the notebook; returns its value, or why there is none."""
    if name not in namespace:
        return {"absent": True}
    call = LocalCall(namespace[name])
    try:
        value = call(*arguments)
        return {"value": value, "largest": call.largest}
    except NotYet as reason:
        return {"not yet": str(reason)}
    except Failed as reason:
        return {"failed": str(reason)}
    except BaseException as error:
        return {"failed": explain(error)}


if __name__ == "__main__":
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        main(sys.argv[1:])
