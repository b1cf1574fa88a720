"""Runs a student's notebook in a process of its own, then their functions on inputs that the grader sends.

`python -P -m labutils.exercises.grading.worker FD MEMORY_MIB` talks over the socket FD; `grader` starts it.
Nothing here is trusted: the student's code runs in this process and may change all of it.
"""

from __future__ import annotations

import contextlib
import resource
import socket
import sys
from typing import Any

from labutils.exercises.core import Failed, LocalCall, NotYet, explain, said
from labutils.exercises.grading import wire
from labutils.machine import runtime


def _limit(memory_mib: int) -> None:
    """Limits of the kernel on memory, files and core dumps; on a GPU machine the driver's mappings forbid the first."""
    limits = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 2**30)]
    if runtime.interpreted:
        limits.append((resource.RLIMIT_DATA, memory_mib * 2**20))
    for kind, value in limits:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (value, value))


def main(arguments: list[str]) -> None:
    """Executes the cells that the first message brings, and then answers calls until the other side is gone."""
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
        except BaseException as escaped:  # KeyboardInterrupt, GeneratorExit: the student's, not ours
            error = escaped
        if error is not None:
            first = next(iter(said(error).splitlines()), "")
            errors.append([number, f"{type(error).__name__}: {first[:200]}"])
    wire.send(channel, {"executed": errors[:50]})
    while True:
        request = wire.receive(channel)
        answer = _answer(shell.user_ns, request["name"], request["arguments"])
        try:
            wire.send(channel, {"id": request["id"]} | answer)
        except (ValueError, RecursionError) as error:
            wire.send(channel, {"id": request["id"], "failed": f"What it returned cannot be sent: {said(error)}"})


def _answer(namespace: dict[str, Any], name: str, arguments: tuple) -> dict[str, Any]:
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
