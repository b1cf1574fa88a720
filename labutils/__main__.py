"""The lab's commands: `python -m labutils --help` lists them. Each lives in `labutils.commands`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from labutils.commands import bench, check, figure, grade, lab, study, targets, train, tune
from labutils.commands.arguments import INTERRUPTED

COMMANDS = (lab, check, bench, targets, tune, study, figure, train, grade)
"""The modules of the commands, in the order in which the help lists them."""


def parser() -> argparse.ArgumentParser:
    """The command line: one subcommand for each thing the lab does outside its notebooks."""
    top = argparse.ArgumentParser(
        prog="python -m labutils",
        description="The FlashAttention lab: four notebooks, from naive attention to kernels of your own.",
        allow_abbrev=False,
    )
    commands = top.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    command_line = parser()
    arguments, extra = command_line.parse_known_args(argv)
    if extra and not getattr(arguments, "takes_extra", False):
        command_line.error(f"unrecognized arguments: {' '.join(extra)}")
    arguments.extra = [argument for argument in extra if argument != "--"]
    try:
        return arguments.run(arguments)
    except (RuntimeError, ValueError) as error:
        if "labutils.machine.runtime" in sys.modules:
            raise
        # `runtime` refused to be imported: LABUTILS_DEVICE asks for what is not known, or not there
        print(f"labutils {arguments.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before the command could see to it, as while it imports
        sys.exit(INTERRUPTED)
