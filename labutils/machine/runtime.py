"""Decides, before anything else is imported, how this machine runs the lab: device, dtype, interpreter, problem sizes.

With a CUDA GPU of compute capability 7.5 or higher, Triton kernels are compiled. Without one they run in Triton's
interpreter, on the CPU. The decision is made once, at import. Every other module and notebook reads it here:

    from labutils import runtime
    q = torch.randn(1, runtime.choose(cpu=256, gpu=4096), 8, 64, device=runtime.device, dtype=runtime.dtype)

Environment variables: `LABUTILS_DEVICE=cpu` (or `TRITON_INTERPRET=1`) asks for the interpreter on a machine that has a
GPU. `LABUTILS_DEVICE=cuda` asks for the GPU: if no GPU can be used, the import raises a RuntimeError that says why.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable
from typing import TypeVar

import torch

from labutils.machine import chips

_T = TypeVar("_T")

LARGE_GPU_GIB = 40  # from this much memory on, a GPU gets the problem sizes of a data-centre card

# Costs, right to an order of magnitude, by which `sizes` chooses problems that end in seconds. They are never shown as
# a measurement.
_INTERPRETER_SECONDS_PER_TILE = 0.006  # a 128 x 128 tile of scores, any head dimension
_SCORE_BYTES_MOVED = 24  # per score by naive attention: write and read S, S * scale, P in 4 bytes
_BYTES_PER_SECOND = {"cpu": 4e9, "gpu": 150e9, "large_gpu": 1500e9}
_CPU_SCORE_LIMIT_GIB = 1.0  # of one copy of the scores: the owner of a laptop needs the rest of its memory


def _asked_to_interpret() -> bool:
    """Whether TRITON_INTERPRET is set to a word that Triton takes for yes."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def _cuda_capability() -> tuple[int, int] | None:
    """Compute capability of the GPU to use; None if kernels cannot be compiled for a GPU here."""
    wanted = os.environ.get("LABUTILS_DEVICE", "").strip().lower()
    if wanted not in ("", "cpu", "cuda"):
        raise ValueError(f"LABUTILS_DEVICE={wanted!r} is not known: unset it, or set it to 'cpu' or 'cuda'.")
    if wanted == "cpu" or _asked_to_interpret():
        return None
    if not torch.cuda.is_available():
        if wanted == "cuda":
            raise RuntimeError(
                "LABUTILS_DEVICE=cuda was asked for, but torch.cuda.is_available() is False: "
                f"torch {torch.__version__} was built for {torch.version.cuda or 'the CPU only'}. Install a CUDA "
                "build of PyTorch and a driver that it supports, or unset LABUTILS_DEVICE."
            )
        return None
    if torch.version.hip is not None:
        raise RuntimeError(
            "This PyTorch is a ROCm build. The lab is tested only on NVIDIA GPUs: set LABUTILS_DEVICE=cpu to run "
            "it in Triton's interpreter."
        )
    capability = torch.cuda.get_device_capability()
    if capability < chips.OLDEST:
        why = (
            f"{torch.cuda.get_device_name()} has compute capability {chips.dotted(capability)}, and Triton compiles "
            f"for {chips.dotted(chips.OLDEST)} or higher"
        )
        if wanted == "cuda":
            raise RuntimeError(f"LABUTILS_DEVICE=cuda was asked for, but {why}. Unset it to run on the CPU.")
        warnings.warn(
            f"{why}: the lab runs on the CPU, in Triton's interpreter. Set LABUTILS_DEVICE=cpu to be told no more.",
            stacklevel=3,
        )
        return None
    return capability


def _switch_interpreter_on() -> None:
    """Sets TRITON_INTERPRET before triton is imported, repairs the interpreter and tests the result."""
    if "triton" in sys.modules:
        # Triton wraps its own library (tl.max, tl.sum, ...) while it is imported; set later, the switch works by half.
        standard = sys.modules.get("triton.language.standard")
        if not _asked_to_interpret() or type(getattr(standard, "max", None)).__name__ != "InterpretedFunction":
            raise RuntimeError(
                "triton was imported before labutils, so its interpreter can no longer be switched on, and this "
                "machine has no GPU to compile for. Restart the kernel (or the program) and import labutils first: "
                "before triton, and before `GPT2LMHeadModel` and others of transformers, which import triton. If the "
                "program cannot import labutils first, set TRITON_INTERPRET=1 in its environment: then any order works."
            )
    os.environ["TRITON_INTERPRET"] = "1"
    from labutils.machine import interpreter

    interpreter.install()
    interpreter.self_test()


capability: tuple[int, int] | None = _cuda_capability()
"""Compute capability of the GPU in use, (9, 0) on an H200; None without a GPU."""

interpreted: bool = capability is None
"""True if Triton kernels run in the interpreter: right, but thousands of times slower, so never timed."""

device: torch.device = torch.device("cpu" if interpreted else "cuda")
"""Where the lab puts its tensors."""

memory_gib: float | None = None if interpreted else torch.cuda.get_device_properties(0).total_memory / 2**30
"""Memory of the GPU in GiB; None without a GPU."""


def default_dtype(capability: tuple[int, int] | None) -> torch.dtype:
    """The dtype that the lab computes in on a GPU of this compute capability.

    bfloat16 on Ampere (8.0) and later; float16 on Turing (7.5), which has no bfloat16 arithmetic; float32 without a GPU
    (None), since a CPU computes fastest in it.
    """
    if capability is None:
        return torch.float32
    return torch.bfloat16 if capability >= chips.BFLOAT16 else torch.float16


dtype: torch.dtype = default_dtype(capability)
"""The dtype that examples use on this machine."""


def _tier() -> str:
    if interpreted or memory_gib is None:
        return "cpu"
    return "large_gpu" if memory_gib >= LARGE_GPU_GIB else "gpu"


def _cpu_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _machine() -> str:
    if not interpreted:
        return torch.cuda.get_device_name()
    cores = _cpu_cores()
    return f"CPU, {cores} core{'s' if cores > 1 else ''}"


machine: str = _machine()
"""Name of this machine, short enough for a figure's title."""


def choose(*, cpu: _T, gpu: _T, large_gpu: _T | None = None) -> _T:
    """The value meant for this machine.

    Args:
        cpu: without a GPU, when kernels run in the interpreter.
        gpu: with any GPU.
        large_gpu: with a GPU of 40 GiB or more; None: as `gpu`.
    """
    tier = _tier()
    if tier == "large_gpu" and large_gpu is not None:
        return large_gpu
    return cpu if tier == "cpu" else gpu


def sizes(
    wanted: Iterable[int],
    *,
    batch: int = 1,
    heads: int = 1,
    head_dim: int = 64,
    through: str = "torch",
    repeats: int = 10,
    seconds: float = 5.0,
) -> list[int]:
    """The wanted sequence lengths that this machine finishes, all together, in about `seconds`.

    A sweep asks for every length that it would like, and gets the lengths that fit. The estimate counts the N x N work
    of naive attention, and is right only to an order of magnitude. GPU memory does not count, on purpose: running out
    of it is a result worth a row.

    Args:
        wanted: sequence lengths N.
        batch, heads, head_dim: B, H and D of the problem.
        through: "torch" for PyTorch operations, "triton" for our kernels (without a GPU, in the interpreter).
        repeats: how often each length runs.
        seconds: the budget for all lengths together.

    Returns:
        The lengths in ascending order; never empty: the shortest is always in.

    Raises:
        ValueError: `wanted` is empty or `through` unknown.
    """
    lengths = sorted(set(wanted))
    if not lengths:
        raise ValueError("`wanted` is empty: name at least one sequence length.")
    if through not in ("torch", "triton"):
        raise ValueError(f"through={through!r} is not known: 'torch' or 'triton'.")
    kept: list[int] = []
    spent = 0.0
    for n in lengths:
        if through == "triton" and interpreted:
            tiles = (-(-n // 128)) ** 2
            cost = batch * heads * tiles * _INTERPRETER_SECONDS_PER_TILE
        else:
            traffic = batch * heads * n * n * (_SCORE_BYTES_MOVED + head_dim / 8)
            cost = traffic / _BYTES_PER_SECOND[_tier()]
        spent += repeats * cost
        too_large = interpreted and through == "torch" and batch * heads * n * n * 4 > _CPU_SCORE_LIMIT_GIB * 2**30
        if kept and (spent > seconds or too_large):
            break
        kept.append(n)
    return kept


def seed(value: int = 0) -> torch.Generator:
    """Seeds PyTorch's global generators and returns a generator on `device` with the same seed."""
    torch.manual_seed(value)
    return torch.Generator(device=device).manual_seed(value)


def summary() -> str:
    """One line: the machine, the dtype that the lab uses on it, and how Triton kernels run there."""
    how = "in Triton's interpreter (right, but slow: never timed)" if interpreted else "compiled"
    memory = "" if memory_gib is None else f" with {memory_gib:.0f} GiB"
    return f"{machine}{memory}: {str(dtype).removeprefix('torch.')}, Triton kernels run {how}"


def _wake_autograd() -> None:
    """Runs one backward pass on the GPU, so that autograd's own thread has a CUDA context.

    Else a backward pass that begins with a matmul finds no context, and PyTorch prints a warning about cuBLAS.
    """
    torch.ones(1, device=device, requires_grad=True).sum().backward()


if interpreted:
    _switch_interpreter_on()
else:
    _wake_autograd()
