"""The pairs of PyTorch and Triton that the lab was tested with, and a sentence about any other pair."""

from __future__ import annotations

from typing import NamedTuple


class Pair(NamedTuple):
    """One pair of versions.

    Attributes:
        torch: release of PyTorch, without its build: "2.13.0" also stands for "2.13.0+cpu" and "2.13.0+cu130".
        triton: release of Triton.
        python: release series of Python.
        ran: which tests ran, and on what.
    """

    torch: str
    triton: str
    python: str
    ran: str


SUITE = "whole suite, no GPU"
INTERPRETER = "interpreter and compilation tests"  # the list of files is in CONTRIBUTING.md, "Versions"

TESTED = (
    Pair("2.11.0", "3.6.0", "3.12", "GPU tests, H200"),
    Pair("2.13.0", "3.6.0", "3.11", INTERPRETER),
    Pair("2.13.0", "3.7.1", "3.11", SUITE),
    Pair("2.13.0", "3.8.0", "3.11", INTERPRETER),
    Pair("2.13.0", "3.9.0", "3.11", INTERPRETER),
    Pair("2.14.1", "3.8.0", "3.11", INTERPRETER),
    Pair("2.15.0", "3.9.0", "3.11", SUITE),
)
"""What ran and passed. tools/tested.txt has the pair that README's commands install."""


def untested(torch: str, triton: str | None) -> str | None:
    """What to tell a user whose PyTorch and Triton are no pair of `TESTED`; None if they are one.

    Args:
        torch: version of PyTorch, with or without its build.
        triton: version of Triton; None if it is not installed.
    """
    if any((pair.torch, pair.triton) == (torch.partition("+")[0], triton) for pair in TESTED):
        return None
    tested = "; ".join(f"{pair.torch} with {pair.triton} ({pair.ran})" for pair in TESTED)
    return f"torch {torch} with triton {triton or 'missing'}: not a pair that the lab was tested with. Tested: {tested}"
