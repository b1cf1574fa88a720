"""Exercises of the four notebooks: a check, hints and a solution for each, and a report of what is solved.

    from labutils.exercises import check, hint, report, solution

    check.safe_softmax(safe_softmax)      # says whether the function is right, and if not, what is wrong and where
    hint("safe_softmax")                  # the next of two or three hints; hint("safe_softmax", 1): the first
    solution("safe_softmax")              # the lab's own answer
    report()                              # what is solved in all notebooks

A check never raises because of the student's function. A stub is "not yet", and an exception inside the function is
reported with its line.

    core                      what an exercise is, its random inputs, and the outcome of its check
    calls                     calls a student's function in this process, and explains an exception
    judging                   judges what the function returned
    notebook01 .. notebook04  the checks and hints of each notebook
    solutions                 the lab's own answers
    progress                  a small file with what a student has solved
    grading                   runs returned notebooks in processes of their own, and marks their exercises
"""

from __future__ import annotations

import ast
import difflib
import textwrap
from collections.abc import Callable
from pathlib import Path

from labutils.exercises import notebook01, notebook02, notebook03, notebook04, progress
from labutils.exercises.calls import LocalCall
from labutils.exercises.core import EXERCISES, NOT_YET, PASSED, Exercise, Outcome, outcome_of

_SOLUTIONS = Path(__file__).parent / "solutions"
_hints_given: dict[str, int] = {}
_NOTEBOOKS = {
    "01": "Setup and Comparison",
    "02": "FlashAttention Demo",
    "03": "Long-Sequence Training",
    "04": "Performance Analysis",
}


def names(notebook: str | None = None) -> list[str]:
    """Names of all exercises, or of the exercises of one notebook ("01" to "04"), in the order of the notebook."""
    return [name for name, exercise in EXERCISES.items() if notebook in (None, exercise.notebook)]


def _find(name: str) -> Exercise:
    if name not in EXERCISES:
        near = difflib.get_close_matches(str(name), EXERCISES, n=1)
        raise ValueError(
            f"There is no exercise {name!r}. {f'Did you mean {near[0]!r}? ' if near else ''}The exercises are"
            f" {', '.join(EXERCISES)}."
        )
    return EXERCISES[name]


def evaluate(name: str, function: Callable, seed: int = 0) -> Outcome:
    """Checks a function without printing or recording anything.

    Args:
        name: the exercise.
        function: the student's function.
        seed: the seed of the random inputs.

    Raises:
        ValueError: there is no exercise of this name.
    """
    _find(name)
    return outcome_of(name, LocalCall(function), seed)


class _Check:
    """`check.<name>(function)` for each exercise."""

    def __getattr__(self, name: str) -> Callable[[Callable], None]:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            exercise = _find(name)
        except ValueError as error:
            raise AttributeError(str(error)) from None

        def print_outcome(function: Callable) -> None:
            outcome = evaluate(name, function)
            print(_text_of(exercise, outcome))
            note = progress.record(outcome)
            if note:
                print(note)

        print_outcome.__name__ = print_outcome.__qualname__ = name
        print_outcome.__doc__ = f"Checks your function for the exercise {exercise.title!r}, and says what it found."
        return print_outcome

    def __dir__(self) -> list[str]:
        return list(EXERCISES)


check = _Check()
"""`check.<name>(function)` prints whether a function solves the exercise, and what is wrong and where if not."""


def _text_of(exercise: Exercise, outcome: Outcome) -> str:
    if outcome.status == PASSED:
        return f"{exercise.name}: passed. Right in every case that was tried."
    if outcome.status == NOT_YET:
        return (
            f'{exercise.name}: not yet. {outcome.message}\n  hint("{exercise.name}") helps; you can also go on'
            " without it."
        )
    return f'{outcome}\n  hint("{exercise.name}") helps.'


def hint(name: str, step: int | None = None) -> None:
    """Prints the next hint for an exercise, or the hint of a given number.

    Args:
        name: the exercise.
        step: the number of the hint, from 1. Without it, each call prints the next hint.

    Raises:
        ValueError: there is no exercise of this name, or no hint of this number.
    """
    exercise = _find(name)
    count = len(exercise.hints)
    if step is None:
        step = _hints_given.get(name, 0) + 1
        if step > count:
            print(f'There are {count} hints, and you have seen them all. solution("{name}") shows the answer.')
            return
    if not 1 <= step <= count:
        raise ValueError(f"{name} has hints 1 to {count}; there is no hint {step}.")
    _hints_given[name] = max(step, _hints_given.get(name, 0))
    print(textwrap.fill(f"Hint {step} of {count}: {exercise.hints[step - 1]}", 110, subsequent_indent="  "))


def solution_source(name: str) -> str:
    """The source of the lab's own answer, ready for the stub's cell.

    Raises:
        ValueError: there is no exercise of this name.
    """
    exercise = _find(name)
    text = (_SOLUTIONS / f"notebook{exercise.notebook}.py").read_text(encoding="utf-8")
    lines = text.splitlines()
    found = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name in exercise.parts:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found.append("\n".join(lines[first - 1 : node.end_lineno]))
    return "\n\n\n".join(found)


def solution(name: str) -> None:
    """Prints the lab's own answer to an exercise; raises ValueError if there is no exercise of this name."""
    print(solution_source(name))


def report() -> None:
    """Prints which exercises of all notebooks are solved."""
    states, note = progress.load()
    solved = [name for name in EXERCISES if states.get(name, {}).get("passed")]
    print(f"{len(solved)} of {len(EXERCISES)} exercises solved")
    for notebook, title in _NOTEBOOKS.items():
        mine = names(notebook)
        print(f"\n{notebook} {title}: {sum(name in solved for name in mine)} of {len(mine)}")
        for name in mine:
            exercise, state = EXERCISES[name], states.get(name, {})
            mark = "x" if name in solved else " "
            last = "" if name in solved else f", last try: {state['last']}" if state.get("last") else ""
            print(f"  [{mark}] {name:<20} {exercise.title}, about {exercise.minutes} min{last}")
    if note:
        print(f"\n{note}")


# These were imported only for the checks that they register.
del notebook01, notebook02, notebook03, notebook04
