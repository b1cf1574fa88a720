"""The lab's command line: `python -m labutils --help` lists the commands. Each lives in `labutils.commands`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from labutils.commands.arguments import exit_status

COMMANDS = {
    "lab": "open the notebooks in JupyterLab",
    "check": "report what this machine has and which attention backends run on it",
    "bench": "measure time, peak memory and error of attention implementations",
    "tune": "time launch configurations of the kernels on this GPU and keep the fastest",
    "train": "train a GPT-2 on long texts, from a YAML file and flags",
    "grade": "execute returned notebooks and score their exercises",
}
"""Each command and its line in the help. `labutils.commands` has a module of the same name."""


def parser() -> ArgumentParser:
    """The parser of the first word, the name of a command. The command itself parses the words after it."""
    lines = "\n".join(f"  {name:<8}{does}" for name, does in COMMANDS.items())
    top = ArgumentParser(
        prog="python -m labutils",
        usage="python -m labutils [--help] COMMAND ...",
        description="The FlashAttention lab: four notebooks, from naive attention to kernels of your own.",
        epilog=f"commands:\n{lines}\n\n`python -m labutils COMMAND --help` explains a command and its arguments.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("command", metavar="COMMAND", choices=list(COMMANDS), help="one of the commands below")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    Args:
        argv: the words of the command line; None for those that Python was started with.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = parser().parse_args(words[:1]).command
    command = importlib.import_module(f"labutils.commands.{name}")
    return exit_status(f"labutils {name}", command.run, words[1:])


if __name__ == "__main__":
    sys.exit(main())
