"""What the command lines share: how a parser is made, types of arguments, and the exit status of a program."""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

INTERRUPTED = 130
"""The exit status after Control-C, as a shell has it."""

LARGEST = 2**31 - 1
"""The largest whole number of an argument: no length, count or size of the lab is larger."""


# ------------------------------------------------------------------------------------------------------------
# A program
# ------------------------------------------------------------------------------------------------------------


def new_parser(program: str, description: str, epilog: str | None = None) -> ArgumentParser:
    """A parser without arguments.

    Args:
        program: what the user types before the arguments: "python -m labutils check".
        description, epilog: texts above and below the list of arguments in the help.
    """
    return ArgumentParser(
        prog=program,
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.HelpFormatter,  # a default stands in its help text, as "%(default)s"
    )


def exit_status(name: str, run: Callable[[Sequence[str]], int], words: Sequence[str]) -> int:
    """Runs a command and returns its exit status, also if it ends before its own error handling begins.

    Args:
        name: stands before an error.
        run: the command, a function of the words after its name.
        words: these words.
    """
    try:
        return run(words)
    except KeyboardInterrupt:  # while the command imported its modules
        return INTERRUPTED
    except (RuntimeError, ValueError) as error:
        if "labutils.machine.runtime" in sys.modules:
            raise
        # `runtime` refused to be imported: LABUTILS_DEVICE names a device that is unknown or missing
        print(f"{name}: {error}", file=sys.stderr)
        return 1


# ------------------------------------------------------------------------------------------------------------
# Types of arguments
# ------------------------------------------------------------------------------------------------------------


def argument_type(of_text: Callable[[str], Any]) -> Callable[[Any], Any]:
    """Makes a type of arguments from a function of an argument's text.

    jsonargparse calls a type with the text, then with the value that came of it, and with the default. A value is
    returned as it is.
    """

    @functools.wraps(of_text)
    def parse(given: Any) -> Any:
        return of_text(given) if isinstance(given, str) else given

    return parse


@argument_type
def whole_number(text: str) -> int:
    """A type of arguments: a whole number from 1 to `LARGEST`. Raises argparse.ArgumentTypeError for anything else."""
    number = int(text) if text.isdecimal() and len(text) <= len(str(LARGEST)) else 0
    if not 1 <= number <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text}: it must be 1 or more, a whole number, and at most {LARGEST:,}")
    return number


@argument_type
def path(text: str) -> Path:
    """A type of arguments: a path, with `~` replaced. Raises argparse.ArgumentTypeError if no home folder is known."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text}: the home folder is not known here; give it without `~`") from error


@argument_type
def seconds(text: str) -> float:
    """A type of arguments: seconds, from 0 to below 3600. Raises argparse.ArgumentTypeError for anything else."""
    if not 0 <= (number := _number(text)) < 3600:
        raise argparse.ArgumentTypeError(f"{text}: it must be a number of seconds, 0 or more and less than 3600")
    return number


@argument_type
def some_seconds(text: str) -> float:
    """A type of arguments: as `seconds`, but more than 0, for a command that would measure nothing in 0 seconds."""
    if not 0 < (number := _number(text)) < 3600:
        raise argparse.ArgumentTypeError(f"{text}: it must be a number of seconds, above 0 and less than 3600")
    return number


def listed(kind: Callable[[str], Any], choices: Sequence[Any] | None = None) -> Callable[[Any], Any]:
    """Makes a type of arguments: values separated by commas. The list has each value once.

    Args:
        kind: the type of one value, a function of its text.
        choices: the values that are allowed; None allows all that `kind` takes.

    Returns:
        The type. It raises argparse.ArgumentTypeError for an empty list, and names the values that are not allowed.
    """
    known = "" if choices is None else f" Choose from {', '.join(map(str, choices))}."

    @argument_type
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
    """The number in a text; nan for any other text, which fails every comparison."""
    try:
        return float(text)
    except ValueError:
        return math.nan
