"""What the command lines share: types of arguments, whose errors say what is asked for, and an exit status."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

INTERRUPTED = 130
"""What a shell calls the end by Control-C."""


def whole_number(text: str) -> int:
    """An argparse type: 1 or more. Raises argparse.ArgumentTypeError for anything else."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: it must be 1 or more, a whole number")
    return number


def seconds(text: str) -> float:
    """An argparse type: seconds from 0 to less than an hour. Raises argparse.ArgumentTypeError for anything else."""
    if not 0 <= (number := _number(text)) < 3600:
        raise argparse.ArgumentTypeError(f"{text}: it must be a number of seconds, 0 or more and less than 3600")
    return number


def some_seconds(text: str) -> float:
    """An argparse type: as `seconds`, but more than 0, where nothing would be measured in none."""
    if not 0 < (number := _number(text)) < 3600:
        raise argparse.ArgumentTypeError(f"{text}: it must be a number of seconds, above 0 and less than 3600")
    return number


def listed(kind: Callable[[str], Any], choices: Sequence[Any] | None = None) -> Callable[[str], list]:
    """Makes an argparse type: values separated by commas, each kept once.

    Args:
        kind: the type of one value: a function of its text.
        choices: what is allowed; all that `kind` takes where not given.

    Returns:
        The type. It raises argparse.ArgumentTypeError for no value at all and for one that is not allowed.
    """
    known = "" if choices is None else f" Choose from {', '.join(map(str, choices))}."

    def parse(text: str) -> list:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not parts:
            raise argparse.ArgumentTypeError(f"{text!r}: give at least one value.{known}")
        values: dict[Any, None] = {}
        wrong = []
        for part in parts:
            try:
                value = kind(part)
            except ValueError:
                wrong.append(part)
                continue
            if choices is None or value in choices:
                values[value] = None
            else:
                wrong.append(part)
        if wrong:
            are = "is" if len(wrong) == 1 else "are"
            raise argparse.ArgumentTypeError(f"{', '.join(wrong)} {are} not known.{known}")
        return list(values)

    return parse


def _number(text: str) -> float:
    """The number that a text says; for any other text nan, which no comparison lets through."""
    try:
        return float(text)
    except ValueError:
        return math.nan
