"""How to start a Python process in which Triton interprets kernels, from a process that compiles them for a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def interpreting_python(arguments: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments for `subprocess.run` and `subprocess.Popen`: the child has this labutils and uses no GPU.

    Args:
        arguments: of Python, such as ["-m", "labutils.analysis.bounds"].
    """
    package_root = str(Path(__file__).resolve().parents[2])
    search_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    return {
        "args": [sys.executable, *arguments],
        "env": os.environ | {"LABUTILS_DEVICE": "cpu", "PYTHONPATH": search_path},
        "text": True,
    }
