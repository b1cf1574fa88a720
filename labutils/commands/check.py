"""`python -m labutils check`: what this machine has, and which attention backends run on it."""

from __future__ import annotations

import argparse
import json
import sys


def run(arguments: argparse.Namespace) -> int:
    """Prints the report; with `--force`, 1 unless a compiled flash kernel ran on a GPU."""
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


def add(commands: argparse._SubParsersAction) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(
        "check",
        help="report what this machine has and which attention backends run on it",
        description=(
            "Report GPU, driver and versions, and try every attention backend on a small tensor: each is "
            "available, or the reason why not is given."
        ),
        epilog="In CI or before production: python -m labutils check --force",
        allow_abbrev=False,
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
    parser.set_defaults(run=run)
