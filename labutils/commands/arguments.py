"""What the command lines share: types of arguments, whose errors say what is asked for, and an exit status."""

from __future__ import annotations

import argparse
import math

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


def _number(text: str) -> float:
    """The number that a text says; for any other text nan, which no comparison lets through."""
    try:
        return float(text)
    except ValueError:
        return math.nan
