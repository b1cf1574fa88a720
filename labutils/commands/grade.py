"""`python -m labutils grade FOLDER --csv grades.csv`: executes returned notebooks and scores their exercises."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from labutils.commands.arguments import INTERRUPTED, argument_type, new_parser, path

LARGEST = 1e6  # seconds, which are eleven days, or GiB: the system's timers and limits take no number of any size


@argument_type
def _positive(text: str) -> float:
    """A type of arguments: a number above 0, at most `LARGEST`. Raises argparse.ArgumentTypeError for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number up to {LARGEST:,.0f}")
    return value


def parser() -> ArgumentParser:
    """The parser of the command's arguments."""
    parser = new_parser(
        "python -m labutils grade",
        "Execute every notebook below FOLDER in a process of its own, test the functions of its exercises on inputs "
        "that nobody has seen, and write one row for each exercise. This runs students' code: do it in a container, as "
        "a user who may write nothing but the table.",
    )
    parser.add_argument("folder", type=path, metavar="FOLDER", help="holds the returned notebooks, at any depth")
    parser.add_argument(
        "--csv", type=path, required=True, metavar="FILE", help="the table to write; must not exist yet"
    )
    parser.add_argument(
        "--limit", type=_positive, default=900.0, metavar="SECONDS", help="to execute one notebook (default: 900)"
    )
    parser.add_argument(
        "--call-limit",
        type=_positive,
        default=60.0,
        metavar="SECONDS",
        help="for one call of a function (default: 60)",
    )
    parser.add_argument(
        "--memory", type=_positive, metavar="GIB", help="for one notebook's processes (default: 8; 24 on a GPU machine)"
    )
    return parser


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def run(words: Sequence[str]) -> int:
    """Grades, and returns 0, whatever the marks; 2 if nothing could be graded, 130 after an interrupt."""
    arguments = parser().parse_args(words)
    import signal

    from labutils.exercises.grading import grader, sandbox

    for number in (signal.SIGTERM, signal.SIGHUP):  # a closed terminal must not leave students' processes behind
        signal.signal(number, _stop)
    memory = {} if arguments.memory is None else {"memory_gib": arguments.memory}
    limits = sandbox.Limits(arguments.limit, arguments.call_limit, **memory)
    if sandbox.isolation():
        print("Each notebook runs in namespaces of its own: no network, no sight of other processes.", flush=True)
    else:
        print(
            "labutils grade: this system gives no namespaces to processes. Students' code sees your processes and the "
            "network; run this in a container.",
            file=sys.stderr,
        )
    try:
        marks = grader.grade_folder(arguments.folder, arguments.csv, limits, lambda line: print(line, flush=True))
    except FileExistsError:
        print(f"labutils grade: {arguments.csv} exists: name another file, or remove it.", file=sys.stderr)
        return 2
    except (ValueError, OSError, RuntimeError) as error:
        print(f"labutils grade: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nlabutils grade: stopped; the rows so far are in {arguments.csv}.", file=sys.stderr)
        return INTERRUPTED
    notebooks = len({mark.submission for mark in marks})
    print(
        f"{notebooks} notebooks, {sum(mark.points for mark in marks)} exercises passed; the table is in"
        f" {arguments.csv}."
    )
    return 0
