"""Launches a kernel in Triton's interpreter and checks every address: which program leaves its tensors?

A process that interprets its kernels does so itself, by `analysis.count_traffic`. A process that compiles its kernels
starts a child, which runs this module as a program. The child is kept for later launches, since its imports take most
of the time. It ends with this process.
"""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from labutils.analysis import count_traffic
from labutils.analysis.interpreting import interpreting_python
from labutils.machine import runtime

_child: subprocess.Popen[str] | None = None
_DONE = "labutils.analysis.bounds: done\n"
_HEADER = "import torch\nimport triton\nimport triton.language as tl\n\n\n"


def out_of_bounds(kernel: Any, grid: Sequence[int], *arguments: Any, **constants: Any) -> str | None:
    """Runs `kernel[grid](*arguments, **constants)` in the interpreter, and checks every address.

    Args:
        kernel: a function with @triton.jit, from a notebook's cell or from a file. It may use only `tl`, `triton` and
            `torch` from outside, and call no helper function of its own.
        grid: programs along each axis.
        arguments, constants: of the launch. In a child process the kernel gets copies, and its results are lost.

    Returns:
        The first wrong access as text: kernel, program, tensor, and by how much it was missed. None if every access was
        inside.

    Raises:
        RuntimeError: the launch failed for another reason than an address.
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
        _ask(Path(folder))
        text, failed = torch.load(answer)
    if failed:
        raise RuntimeError(f"the launch failed in its own process:\n{text.strip()[-2000:]}")
    return text


def _ask(folder: Path) -> None:
    """Has the child do the launch in `folder`. Starts the child if there is none."""
    global _child
    if _child is None or _child.poll() is not None:
        _child = subprocess.Popen(
            **interpreting_python(["-m", "labutils.analysis.bounds"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    assert _child.stdin is not None and _child.stdout is not None  # pipes, as asked for above
    said: list[str] = []
    try:
        with suppress(BrokenPipeError):  # the child has ended; the loop below reads its last lines
            _child.stdin.write(f"{folder}\n")
            _child.stdin.flush()
        while (line := _child.stdout.readline()) != _DONE:
            if not line:
                raise RuntimeError(f"the process of the launch ended:\n{''.join(said).strip()[-2000:]}")
            said.append(line)
    except BaseException:  # after an interrupt, too: a late answer must not be taken for the next one
        _child.kill()
        with suppress(BrokenPipeError):
            _child.communicate()
        _child = None
        raise


def _main() -> None:
    """The child process: does the launch of each folder that stdin names, until stdin ends."""
    for line in sys.stdin:
        folder = Path(line.rstrip("\n"))
        try:
            name, grid, arguments, constants = torch.load(folder / "launch.pt")
            spec = importlib.util.spec_from_file_location("kernel", folder / "kernel.py")
            assert spec is not None and spec.loader is not None  # of a file that ends in .py
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            answer = (out_of_bounds(getattr(module, name), grid, *arguments, **constants), False)
        except Exception:
            answer = (traceback.format_exc(), True)
        torch.save(answer, folder / "answer.pt")
        print(_DONE, end="", flush=True)


if __name__ == "__main__":
    _main()
