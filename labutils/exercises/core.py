"""An exercise: its registration, the random inputs of its check, and the outcome of the check.

The same check runs in two places. In a notebook it calls the student's function directly (`calls.LocalCall`). When a
teacher grades, the function lives in another process, and the check reaches it through a socket
(`grading.sandbox.RemoteCall`). So a check works with values only: it draws inputs on the CPU, calls the function, and
gets tensors on the CPU back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

PASSED, WRONG, ERROR, NOT_YET = "passed", "wrong", "error", "not yet"


class Wrong(Exception):
    """The function returned something that breaks a requirement; the text says which, where and why."""


class NotYet(Exception):
    """The stub is still a stub."""


class Failed(Exception):
    """The function raised an exception; the text names the exception, its line and what to do."""


class Call(Protocol):
    """A student's function as a check sees it."""

    largest: int
    """Elements of the largest tensor that PyTorch made during the last call."""

    def __call__(self, *arguments: Any) -> Any:
        """The function's result with tensors on the CPU; raises NotYet or Failed."""
        ...


@dataclass(frozen=True)
class Exercise:
    """One exercise: where it stands, how long it takes, what it asks, and how it is checked."""

    name: str
    notebook: str
    """"01" to "04"."""
    title: str
    minutes: int
    examine: Callable[[Call, torch.Generator], None]
    """The check: calls the function on inputs from the generator, and raises Wrong if a result is wrong."""
    hints: tuple[str, ...]
    parts: tuple[str, ...]
    """Names of the definitions that make up the solution; the last one is the function itself."""


@dataclass(frozen=True)
class Outcome:
    """What a check found: `status` is "passed", "wrong", "error" or "not yet"."""

    exercise: str
    status: str
    message: str = ""

    def __str__(self) -> str:
        first = f"{self.exercise}: {self.status}"
        return f"{first}. {self.message}" if self.message else f"{first}."


EXERCISES: dict[str, Exercise] = {}
"""Every exercise by its name, in the order of the notebooks."""


def exercise(
    notebook: str, title: str, minutes: int, hints: Sequence[str], parts: Sequence[str] = ()
) -> Callable[[Callable[[Call, torch.Generator], None]], Callable[[Call, torch.Generator], None]]:
    """Registers the decorated check as an exercise of the same name.

    Args:
        notebook: "01" to "04".
        title: the exercise's title in the report.
        minutes: how long it takes.
        hints: two or three; each says more than the one before.
        parts: names of further definitions that belong to the solution, such as a kernel.
    """

    def register(examine: Callable[[Call, torch.Generator], None]) -> Callable[[Call, torch.Generator], None]:
        name = examine.__name__
        EXERCISES[name] = Exercise(name, notebook, title, minutes, examine, tuple(hints), (*parts, name))
        return examine

    return register


def outcome_of(name: str, call: Call, seed: int = 0) -> Outcome:
    """Runs the check of an exercise; returns an outcome whatever the student's function does."""
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            EXERCISES[name].examine(call, generator)
    except NotYet as reason:
        return Outcome(name, NOT_YET, str(reason))
    except Wrong as reason:
        return Outcome(name, WRONG, str(reason))
    except Failed as reason:
        return Outcome(name, ERROR, str(reason))
    except Exception as reason:  # a value that no check expects: an integer of a million digits, a broken object
        return Outcome(
            name, WRONG, f"What it returned cannot be judged ({type(reason).__name__}: {error_text(reason)[:200]})."
        )
    return Outcome(name, PASSED)


def error_text(error: BaseException) -> str:
    """The text of an exception, or "" if an exception of a student's own class fails to give its text."""
    try:
        return str(error).strip()
    except Exception:
        return ""


# ---------------------------------------------------------------------------------------------------------------------
# Random inputs of a check
# ---------------------------------------------------------------------------------------------------------------------


def draw(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal numbers of this shape, on the CPU."""
    return torch.randn(shape, generator=generator).to(dtype)


def pick(generator: torch.Generator, values: list[int]) -> int:
    """One of the values."""
    return values[int(torch.randint(len(values), (), generator=generator))]


def integer(generator: torch.Generator, low: int, high: int) -> int:
    """An integer from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))
