"""Tries each attention backend on this machine: whether it runs, on what, and if not, why.

    from labutils.attention import probing
    [trial.name for trial in probing.trials() if trial.available]

A reason names no path and no host: reports with reasons end up in notebooks and in stored results.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import warnings
from dataclasses import dataclass

import torch

from labutils.attention import reference
from labutils.attention.backends import BACKENDS, Backend, Unsupported
from labutils.machine import chips, runtime

SHAPE = (1, 128, 2, 64)
"""(B, N, H, D) of the tensors that each backend is tried on: small enough for the interpreter, large enough for all."""


@dataclass(frozen=True)
class Trial:
    """What became of one backend on this machine.

    Attributes:
        name: of the backend, a key of `BACKENDS`.
        available: whether it ran on tensors of `SHAPE`, and its result obeyed the error rule of `reference`.
        reason: how it ran, or why it cannot.
        runs_on: "gpu" (a compiled GPU kernel), "cpu" (a compiled CPU kernel), "interpreter" (a Triton kernel in
            Triton's interpreter), or "" if it is not available.
    """

    name: str
    available: bool
    reason: str
    runs_on: str = ""


def trials(*, compile_flex: bool | None = None) -> list[Trial]:
    """Every backend that can be tried, tried on this machine. The first call of a process tries, later calls remember.

    Args:
        compile_flex: whether to compile FlexAttention; None: only on a GPU. Its C++ code for a CPU takes longer to
            compile than all the rest of the report together.
    """
    if compile_flex is None:
        compile_flex = runtime.device.type == "cuda"
    return [
        Trial(
            backend.name,
            False,
            "not tried: compiling it takes long. `python -m labutils check --compile-flex` does",
        )
        if backend.compiles and not compile_flex
        else _try(backend)
        for backend in BACKENDS.values()
        if backend.tried and backend.load is not None
    ]


def compiled_flash(tried: list[Trial]) -> list[str]:
    """Names of the FlashAttention backends that ran as compiled kernels on a GPU."""
    return [trial.name for trial in tried if BACKENDS[trial.name].flash and trial.runs_on == "gpu"]


def installed_version(distribution: str) -> str | None:
    """The version of an installed package, read without importing it: importing transformers takes seconds."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _sample() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of `SHAPE`, from a generator of their own: a report must not change the global seed."""
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(SHAPE, generator=generator, device="cpu") for _ in range(3))
    q, k, v = (x.to(runtime.device, runtime.dtype) for x in made)
    return q, k, v


@functools.cache
def _try(backend: Backend) -> Trial:
    """Runs one backend and checks its result."""
    name, on_gpu = backend.name, runtime.device.type == "cuda"
    if backend.package and installed_version(backend.package) is None:
        built_in = ": PyTorch's built-in flash kernel is used" if _try(BACKENDS["sdpa_flash"]).available else ""
        return Trial(name, False, f"not installed, and optional{built_in}")
    if not (on_gpu or backend.on_cpu):
        return Trial(name, False, "has kernels for NVIDIA GPUs only, and none is in use here")

    q, k, v = _sample()
    with warnings.catch_warnings(record=True) as refusals:
        warnings.simplefilter("always")  # PyTorch says in warnings why a backend refuses its input
        try:
            out = backend.function_to_try(q, k, v)
            if on_gpu:
                torch.cuda.synchronize()  # a kernel that dies does so after the call has returned
        except Exception as error:  # an error of a backend is that backend's reason, not our failure
            return Trial(name, False, _reason(backend, error, [str(w.message) for w in refusals]))
    verdict = reference.check_attention(out, q, k, v)
    if not verdict:
        return Trial(name, False, _condense(f"it ran, but its result is wrong: {verdict}"))

    dtype = str(runtime.dtype).removeprefix("torch.")
    if backend.on_cpu == "interpreted" and runtime.interpreted:
        how = "in Triton's interpreter: right, but never to be timed"
        return Trial(name, True, f"{how}, {dtype}", "interpreter")
    where = "gpu" if on_gpu else "cpu"
    how = "compiled kernel" if backend.fused else "ordinary operations"
    return Trial(name, True, f"{how} on the {where.upper()}, {dtype}", where)


def _reason(backend: Backend, error: Exception, refusals: list[str]) -> str:
    """One readable sentence on why a backend failed, from its exception and the warnings before it."""
    lowest = backend.lowest_capability
    if lowest is not None and runtime.capability is not None and runtime.capability < lowest:
        return (
            f"needs compute capability {chips.dotted(lowest)} ({chips.GPUS[lowest].architecture}) or higher, this GPU "
            f"has {chips.dotted(runtime.capability)}"
        )
    cause = error.__cause__ if isinstance(error, Unsupported) and error.__cause__ is not None else error
    if backend.package and isinstance(cause, ImportError):
        return (
            f"version {installed_version(backend.package)} is installed but cannot be imported "
            f"({_condense(str(cause))}). It may be built for another PyTorch than {torch.__version__}: "
            "rebuild it, or uninstall it"
        )
    # A header ("Flash attention kernel not used because:") and the switches of other backends explain nothing.
    told = [text for text in refusals if "not used because" not in text and "runtime disabled" not in text]
    if backend.sdp_backend and told:
        return "; ".join(dict.fromkeys(_condense(text) for text in told))
    return _condense(f"{type(error).__name__}: {error}")


def _condense(text: str, longest: int = 220) -> str:
    """The first line of a message, without the place in PyTorch's source and without this machine's paths."""
    text = re.sub(r"\s*\(Triggered internally at [^)]*\)\.?", "", text).strip()
    text = next((line.strip() for line in text.splitlines() if line.strip()), "no message")
    text = re.sub(r"(?:[A-Za-z]:)?(?:[/\\][^\s/\\:'\",()]+){2,}", lambda path: re.split(r"[/\\]", path[0])[-1], text)
    return text if len(text) <= longest else text[: longest - 3].rstrip() + "..."
