"""When the programs of a launch run: more of them than a GPU has places for."""

from __future__ import annotations

import heapq
from collections.abc import Iterable


def makespan(work: Iterable[float], slots: int) -> float:
    """When the last of a launch's programs ends, if each starts as soon as one of `slots` places is free.

    Args:
        work: what each program takes, in the order in which they start; in any unit.
        slots: programs that run at a time: those of one multiprocessor times the multiprocessors.

    Raises:
        ValueError: no slot.
    """
    if slots < 1:
        raise ValueError(f"slots={slots}: a program needs a place to run.")
    ends = [0.0] * slots
    for takes in work:
        heapq.heapreplace(ends, ends[0] + takes)
    return max(ends)
