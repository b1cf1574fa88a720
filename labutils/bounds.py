"""Launches a kernel where every address is looked at, and says which program left its tensors.

In the interpreter this happens in this process (`analysis.count_traffic`). A process that compiles its kernels starts
another one with the interpreter switched on, which is what running this module as a program does.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from labutils import runtime
from labutils.analysis import count_traffic

_HEADER = "import torch\nimport triton\nimport triton.language as tl\n\n\n"


def out_of_bounds(kernel: Any, grid: Sequence[int], *arguments: Any, **constants: Any) -> str | None:
    """Runs `kernel[grid](*arguments, **constants)` in the interpreter, and returns what is wrong with its addresses.

    Args:
        kernel: a function with @triton.jit that calls no helper function of its own and uses nothing but `tl`,
            `triton` and `torch` from outside. Defined in a notebook's cell or in a file.
        grid: programs along each axis.
        arguments, constants: as of the launch. In another process the kernel gets copies, and what it writes is lost.

    Returns:
        The text of the IndexError: kernel, program, by how much which tensor was missed; None where every access was
        inside.

    Raises:
        RuntimeError: the child process failed, for another reason than an address.
    """
    if runtime.interpreted:
        try:
            with count_traffic(check_bounds=True):
                kernel[tuple(grid)](*arguments, **constants)
        except IndexError as error:
            return str(error)
        return None
    with TemporaryDirectory() as folder:
        source, launch, answer = (Path(folder) / name for name in ("kernel.py", "launch.pt", "answer.pt"))
        source.write_text(_HEADER + inspect.getsource(kernel.fn), encoding="utf-8")
        moved = [a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments]
        torch.save((kernel.fn.__name__, tuple(grid), moved, constants), launch)
        package_root = str(Path(__file__).resolve().parent.parent)
        search_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        child = subprocess.run(
            [sys.executable, "-m", "labutils.bounds", folder],
            env=os.environ | {"LABUTILS_DEVICE": "cpu", "PYTHONPATH": search_path},
            capture_output=True,
            text=True,
        )
        if child.returncode != 0:
            raise RuntimeError(f"the launch failed in its own process:\n{child.stderr.strip()[-2000:]}")
        return torch.load(answer)


def _main(folder: Path) -> None:
    name, grid, arguments, constants = torch.load(folder / "launch.pt")
    spec = importlib.util.spec_from_file_location("kernel", folder / "kernel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.save(out_of_bounds(getattr(module, name), grid, *arguments, **constants), folder / "answer.pt")


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
