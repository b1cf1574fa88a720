"""`python -m labutils check`: reports what this machine has, and which attention backends run on it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from labutils.commands.arguments import new_parser


def parser() -> ArgumentParser:
    """The parser of the command's arguments."""
    parser = new_parser(
        "python -m labutils check",
        "Report GPU, driver and versions, and try every attention backend on a small tensor. A backend is available, "
        "or the report gives the reason why not.",
        epilog="In CI or before production: python -m labutils check --force",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="exit with status 1, cause and remedy, unless a compiled flash kernel ran on a GPU",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--compile-flex",
        action="store_true",
        default=None,
        help="compile FlexAttention even without a GPU, which takes longer than all the rest",
    )
    return parser


def run(words: Sequence[str]) -> int:
    """Prints the report. Returns 1 if the lab cannot run here, or if `--force` finds no compiled flash kernel."""
    arguments = parser().parse_args(words)
    try:
        from labutils.benchmark import environment  # a device that is asked for and not there raises here

        if arguments.json:
            found = environment.report_as_dict(compile_flex=arguments.compile_flex)
            print(json.dumps(found, indent=2))
        else:
            print(environment.report(compile_flex=arguments.compile_flex))
        if arguments.force:
            environment.verify_flash_attention(force=True, verbose=False)
    except (RuntimeError, ValueError) as error:
        print(f"labutils check: {error}", file=sys.stderr)
        return 1
    return 0
