"""Decides, before anything else is imported, how this machine runs the lab: device, dtype, interpreter, problem sizes.

With a CUDA GPU of compute capability 7.5 or higher, Triton kernels are compiled. Without one they run in Triton's
interpreter, on the CPU. The decision is made once, at import, and every other module and notebook asks here:

    from labutils import runtime
    q = torch.randn(1, runtime.choose(cpu=256, gpu=4096), 8, 64, device=runtime.device, dtype=runtime.dtype)

Environment: `LABUTILS_DEVICE=cpu` (or `TRITON_INTERPRET=1`) asks for the interpreter on a machine that has a GPU, and
`LABUTILS_DEVICE=cuda` for the GPU: where none can be used, the import ends in a RuntimeError that says why.
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

LARGE_GPU_GIB = 40  # from here on a GPU gets the sizes of a data-centre card

# Order-of-magnitude costs from which `sizes` judges what ends in seconds. They choose a problem size and are never
# shown as a measurement.
_INTERPRETER_SECONDS_PER_TILE = 0.006  # a 128 x 128 tile of scores, any head dimension
_SCORE_BYTES_MOVED = 24  # per score by naive attention: write and read S, S * scale, P in 4 bytes
_BYTES_PER_SECOND = {"cpu": 4e9, "gpu": 150e9, "large_gpu": 1500e9}
_CPU_SCORE_LIMIT_GIB = 1.0  # one copy of the scores; the rest of a laptop's memory belongs to its owner


def _asked_to_interpret() -> bool:
    """Whether TRITON_INTERPRET is set, in any of the words that Triton takes for yes."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def _cuda_capability() -> tuple[int, int] | None:
    """Compute capability of the GPU to use, or None where kernels cannot be compiled for one."""
    wanted = os.environ.get("LABUTILS_DEVICE", "").strip().lower()
    if wanted not in ("", "cpu", "cuda"):
        raise ValueError(f"LABUTILS_DEVICE={wanted!r} is not known: unset it, or set it to 'cpu' or 'cuda'.")
    if wanted == "cpu" or _asked_to_interpret():
        return None
    if not torch.cuda.is_available():
        if wanted == "cuda":
            raise RuntimeError(
                "LABUTILS_DEVICE=cuda was asked for, but torch.cuda.is_available() is False: "
                f"torch {torch.__version__} was built for {torch.version.cuda or 'the CPU alone'}. Install a CUDA "
                "build of PyTorch and a driver that it supports, or unset LABUTILS_DEVICE."
            )
        return None
    if torch.version.hip is not None:
        raise RuntimeError(
            "This PyTorch is a ROCm build. The lab is tested on NVIDIA GPUs alone: set LABUTILS_DEVICE=cpu to run "
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
            f"{why}: the lab runs on the CPU, in Triton's interpreter. Set LABUTILS_DEVICE=cpu to say that you know.",
            stacklevel=3,
        )
        return None
    return capability


def _switch_interpreter_on() -> None:
    """Sets TRITON_INTERPRET for the import of triton that follows, mends the interpreter and tests the result."""
    if "triton" in sys.modules:
        # Triton wraps its own library (tl.max, tl.sum, ...) while it is imported; afterwards the switch is half-dead.
        standard = sys.modules.get("triton.language.standard")
        if not _asked_to_interpret() or type(getattr(standard, "max", None)).__name__ != "InterpretedFunction":
            raise RuntimeError(
                "triton was imported before labutils, so its interpreter can no longer be switched on, and this "
                "machine has no GPU to compile for. Restart the kernel (or the program) and import labutils first: "
                "before triton, and before `GPT2LMHeadModel` and others of transformers, which import triton."
            )
    os.environ["TRITON_INTERPRET"] = "1"
    from labutils.machine import interpreter

    interpreter.install()
    interpreter.self_test()


capability: tuple[int, int] | None = _cuda_capability()
"""Compute capability of the GPU in use, (9, 0) on an H200; None without a GPU."""

interpreted: bool = capability is None
"""True where Triton kernels run in the interpreter: right, but thousands of times slower, so never timed."""

device: torch.device = torch.device("cpu" if interpreted else "cuda")
"""Where the lab puts its tensors."""

memory_gib: float | None = None if interpreted else torch.cuda.get_device_properties(0).total_memory / 2**30
"""Memory of the GPU in GiB; None without a GPU."""


def default_dtype(capability: tuple[int, int] | None) -> torch.dtype:
    """The dtype the lab computes in on a GPU of this compute capability.

    Ampere (8.0) and later: bfloat16. Turing (7.5) has no bfloat16 arithmetic: float16. No GPU (None): float32, which
    the CPU computes fastest.
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
        cpu: without a GPU; where kernels run in the interpreter.
        gpu: any GPU.
        large_gpu: a GPU with 40 GiB or more; `gpu`'s value where it is not given.
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
    """Of the wanted sequence lengths, those that this machine finishes, all together, in about `seconds`.

    A sweep asks for every length that it would like and gets what fits; the estimate is of naive attention's N x N
    work. It knows orders of magnitude alone, and it leaves GPU memory out of account on purpose: running out of memory
    there is a result worth a row.

    Args:
        wanted: sequence lengths N.
        batch, heads, head_dim: B, H and D of the problem.
        through: "torch" for PyTorch operations, "triton" for our kernels (in the interpreter, where there is no GPU).
        repeats: how often each length is run.
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
    """One line: the machine, the dtype the lab uses on it, and how Triton kernels run there."""
    how = "in Triton's interpreter (right, but slow: never timed)" if interpreted else "compiled"
    memory = "" if memory_gib is None else f" with {memory_gib:.0f} GiB"
    return f"{machine}{memory}: {str(dtype).removeprefix('torch.')}, Triton kernels run {how}"


def _wake_autograd() -> None:
    """Runs one backward pass on the GPU, so that autograd's own thread has a CUDA context.

    Without it, a backward pass that begins with a matmul finds none there, and PyTorch prints a warning about cuBLAS.
    """
    torch.ones(1, device=device, requires_grad=True).sum().backward()


if interpreted:
    _switch_interpreter_on()
else:
    _wake_autograd()
