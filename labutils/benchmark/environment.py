"""Says what this machine has, and which attention backends run on it, each found by trying it.

    from labutils.benchmark import environment
    environment.verify_flash_attention()            # prints the report, which ends in a status line
    environment.verify_flash_attention(force=True)  # raises unless a kernel compiled for a GPU ran

Nothing here shows a path or the name of a host: reports end up in notebooks and in stored results.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from labutils.attention import reference
from labutils.machine import runtime, versions

PROBE_SHAPE = (1, 128, 2, 64)
"""(B, N, H, D) of what each backend is tried on: small enough for the interpreter, large enough for all."""

TITLES = {
    "sdpa_flash": "PyTorch SDPA, flash",
    "sdpa_cudnn": "PyTorch SDPA, cuDNN",
    "sdpa_efficient": "PyTorch SDPA, memory-efficient",
    "sdpa_math": "PyTorch SDPA, math",
    "flash_attn": "flash-attn package",
    "triton_v1": "this lab's Triton v1",
    "triton_v2": "this lab's Triton v2",
    "flex": "FlexAttention",
}
"""The backends, in the order in which they are reported."""

FLASH = ("sdpa_flash", "sdpa_cudnn", "flash_attn", "triton_v1", "triton_v2", "flex")
"""The backends that are FlashAttention. Memory-efficient attention tiles too, but is another algorithm."""

# The lowest compute capability on which each backend has a kernel, and the architecture of that number.
# PyTorch's (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp) and flash-attn's own requirements; Triton's
# are the runtime's.
_LOWEST_CAPABILITY = {
    "sdpa_flash": ((8, 0), "Ampere"),
    "sdpa_cudnn": ((8, 0), "Ampere"),
    "flash_attn": ((8, 0), "Ampere"),
    "triton_v1": (runtime.OLDEST_CAPABILITY, "Turing"),
    "triton_v2": (runtime.OLDEST_CAPABILITY, "Turing"),
    "flex": (runtime.OLDEST_CAPABILITY, "Turing"),
}

_GPU_ONLY = ("sdpa_cudnn", "sdpa_efficient", "flash_attn")

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Environment:
    """The machine and the software that a measurement was made with. None where there is no such thing."""

    gpu: str | None
    capability: tuple[int, int] | None
    memory_gib: float | None
    driver: str | None
    cuda: str | None
    torch: str
    triton: str | None
    transformers: str | None
    flash_attn: str | None
    python: str
    os: str
    cpu: str
    git_revision: str | None
    date: str
    launch_table: str | None = None
    """Launch configurations of the user's own that the kernels use; None where all are the shipped ones."""

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON takes them: the compute capability as text, "9.0"; `launch_table` where there is one."""
        fields = asdict(self) | {"capability": None if self.capability is None else _dotted(self.capability)}
        return {name: value for name, value in fields.items() if name != "launch_table" or value is not None}


@dataclass(frozen=True)
class Backend:
    """One attention backend on this machine.

    Attributes:
        name: as in tables and figures, see `TITLES`.
        available: it ran on tensors of `PROBE_SHAPE` and its result obeyed the error rule of `reference`.
        reason: how it ran, or why it cannot.
        runs_on: "gpu" (a compiled GPU kernel), "cpu" (a compiled CPU kernel), "interpreter" (a Triton kernel in
            Triton's interpreter), or "" where it is not available.
    """

    name: str
    available: bool
    reason: str
    runs_on: str = ""


# ----------------------------------------------------------------------------------------------------------
# The machine
# ----------------------------------------------------------------------------------------------------------


def environment(*, launch_table: bool = True) -> Environment:
    """What this machine has, at this moment. The GPU is the one in use: None under LABUTILS_DEVICE=cpu.

    Args:
        launch_table: say whether a launch table of the user's own is in force; False for what is about to write it.

    Raises:
        RuntimeError: the user's launch table is damaged, or was named and is not there.
    """
    used = runtime.device.type == "cuda"
    gpu = _gpu() if used else None
    return Environment(
        gpu=None if gpu is None else gpu[0],
        capability=runtime.capability if used else None,
        memory_gib=None if runtime.memory_gib is None else round(runtime.memory_gib, 1),
        driver=_driver(),
        cuda=torch.version.cuda,
        torch=str(torch.__version__),  # a class of PyTorch's own, which a checkpoint could not hold
        triton=_version("triton"),
        transformers=_version("transformers"),
        flash_attn=_version("flash-attn"),
        python=platform.python_version(),
        os=_operating_system(),
        cpu=_processor(),
        git_revision=_git_revision(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        launch_table=_launch_table() if used and launch_table else None,
    )


def _launch_table() -> str | None:
    """The user's launch table, named by a hash of its entries: two that differ are two environments."""
    from labutils.attention.kernels import launch_table

    entries = launch_table.tuned_here(0)
    digest = hashlib.sha256(repr(sorted(entries.items(), key=repr)).encode()).hexdigest()
    return f"{len(entries)} tuned entries, {digest[:8]}" if entries else None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two environments as dictionaries, apart from the date and from `settings`, which are no part
    of the machine: ["driver: 570.1, now 580.65", ...]."""
    return [
        f"{name}: {before.get(name)}, now {now.get(name)}"
        for name in sorted({*before, *now} - {"date", "settings"})
        if before.get(name) != now.get(name)
    ]


def _gpu() -> tuple[str, tuple[int, int]] | None:
    """Name and compute capability of the GPU that PyTorch sees, whether the lab uses it or not."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(), torch.cuda.get_device_capability()


def _version(distribution: str) -> str | None:
    """The installed version, read without importing: transformers alone would take seconds."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _answer(*command: str, cwd: Path | None = None) -> str | None:
    """What a program prints, or None where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=15, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@functools.cache
def _driver() -> str | None:
    """Version of the NVIDIA driver, which PyTorch itself does not know."""
    answer = _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return answer.splitlines()[0].strip() if answer else None


def _operating_system() -> str:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = f"{platform.system()} {platform.release()}"
    return f"{name}, {platform.machine()}"


def _processor() -> str:
    """Model of the CPU and the number of cores that this process may use."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass  # not Linux: what `platform` says has to do
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} {'core' if cores == 1 else 'cores'}"


def _git_revision() -> str | None:
    """Revision of the checkout that labutils runs from, "+changes" if its code differs; None without one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None  # installed without a clone; a repository further up would be another project
    revision = _answer("git", "rev-parse", "--short=12", "HEAD", cwd=root)
    # Notebooks and stored results are what a measurement writes; only the code that made it counts as a
    # change.
    changed = _answer("git", "status", "--porcelain", "--", "labutils", ":(exclude)labutils/results", cwd=root)
    return f"{revision}+changes" if revision and changed else revision


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def why_no_gpu() -> tuple[str, str]:
    """Why the lab does not use a GPU here, and what to do about it; two empty strings where it does."""
    if runtime.device.type == "cuda":
        return "", ""
    gpu, driver = _gpu(), _driver()
    if gpu is not None and gpu[1] < runtime.OLDEST_CAPABILITY:
        return (
            f"{gpu[0]} has compute capability {_dotted(gpu[1])}, Triton compiles for "
            f"{_dotted(runtime.OLDEST_CAPABILITY)} or higher",
            "Use a GPU of the Turing generation (2018) or a later one.",
        )
    if gpu is not None:
        return (
            f"{gpu[0]} is there, but LABUTILS_DEVICE=cpu or TRITON_INTERPRET=1 asks for the CPU",
            "Unset both variables and restart the kernel.",
        )
    if driver is None:
        return (
            "no NVIDIA GPU found (nvidia-smi is not there or does not answer)",
            "Use a machine with an NVIDIA GPU, Turing (2018) or later. If this one has one, install its driver.",
        )
    if torch.version.cuda is None:
        return (
            f"NVIDIA's driver {driver} is there, but this PyTorch is a CPU build",
            "Install a CUDA build of PyTorch (pytorch.org/get-started/locally has the command), and restart.",
        )
    return (
        f"NVIDIA's driver {driver} is there, but PyTorch's CUDA {torch.version.cuda} finds no GPU through it",
        f"Update the driver to one that supports CUDA {torch.version.cuda}, and check that "
        "CUDA_VISIBLE_DEVICES hides no GPU.",
    )


# ----------------------------------------------------------------------------------------------------------
# The backends
# ----------------------------------------------------------------------------------------------------------


def _sdpa(backend: SDPBackend) -> Attention:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, N, H, D) -> (B, H, N, D)
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return attention


def _flash_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v)


def _triton_v1(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from labutils.attention.interface import flash_attn_v1_func

    return flash_attn_v1_func(q, k, v)


def _triton_v2(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from labutils.attention.interface import flash_attn_func

    return flash_attn_func(q, k, v)


def _flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.compile(flex_attention)(q, k, v).transpose(1, 2)


_RUNNERS: dict[str, Attention] = {
    "sdpa_flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "sdpa_efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa_math": _sdpa(SDPBackend.MATH),
    "flash_attn": _flash_attn,
    "triton_v1": _triton_v1,
    "triton_v2": _triton_v2,
    "flex": _flex,
}


def backends(*, compile_flex: bool | None = None) -> list[Backend]:
    """Every attention backend, tried on this machine. The first call in a process does the work, later ones remember.

    Args:
        compile_flex: whether to compile FlexAttention. Not given: only with a GPU. For a CPU its C++ code alone takes
            longer to compile than all the rest of the report together.
    """
    if compile_flex is None:
        compile_flex = runtime.device.type == "cuda"
    return [
        Backend(
            "flex",
            False,
            "not tried: compiling it takes long. `python -m labutils check --compile-flex` does",
        )
        if name == "flex" and not compile_flex
        else _try(name)
        for name in TITLES
    ]


def _sample() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of `PROBE_SHAPE`; from a generator of its own, so that a report moves nobody's seed."""
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(PROBE_SHAPE, generator=generator) for _ in range(3))
    q, k, v = (x.to(runtime.device, runtime.dtype) for x in made)
    return q, k, v


@functools.cache
def _try(name: str) -> Backend:
    """Runs one backend and judges its result."""
    on_gpu = runtime.device.type == "cuda"
    if name == "flash_attn" and _version("flash-attn") is None:
        built_in = ": PyTorch's built-in flash kernel is used" if _try("sdpa_flash").available else ""
        return Backend(name, False, f"not installed, and optional{built_in}")
    if name in _GPU_ONLY and not on_gpu:
        return Backend(name, False, "has kernels for NVIDIA GPUs alone, and none is in use here")

    q, k, v = _sample()
    with warnings.catch_warnings(record=True) as refusals:
        warnings.simplefilter("always")  # PyTorch says in warnings why a backend refuses its input
        try:
            out = _RUNNERS[name](q, k, v)
            if on_gpu:
                torch.cuda.synchronize()  # a kernel that dies does so after the call has returned
        except Exception as error:  # whatever goes wrong in a backend is that backend's reason, not our failure
            return Backend(name, False, _reason(name, error, [str(w.message) for w in refusals]))
    verdict = reference.check_attention(out, q, k, v)
    if not verdict:
        return Backend(name, False, _condense(f"it ran, but its result is wrong: {verdict}"))

    dtype = str(runtime.dtype).removeprefix("torch.")
    if name.startswith("triton") and runtime.interpreted:
        how = "in Triton's interpreter: right, but never to be timed"
        return Backend(name, True, f"{how}, {dtype}", "interpreter")
    where = "gpu" if on_gpu else "cpu"
    how = "ordinary operations" if name == "sdpa_math" else "compiled kernel"
    return Backend(name, True, f"{how} on the {where.upper()}, {dtype}", where)


def _reason(name: str, error: Exception, refusals: list[str]) -> str:
    """One readable sentence on why a backend failed, from its exception and the warnings before it."""
    lowest, generation = _LOWEST_CAPABILITY.get(name, ((0, 0), ""))
    if runtime.capability is not None and runtime.capability < lowest:
        return (
            f"needs compute capability {_dotted(lowest)} ({generation}) or higher, this GPU has "
            f"{_dotted(runtime.capability)}"
        )
    if name == "flash_attn" and isinstance(error, ImportError):
        return (
            f"version {_version('flash-attn')} is installed but cannot be imported "
            f"({_condense(str(error))}). It may be built for another PyTorch than {torch.__version__}: "
            "rebuild it, or uninstall it"
        )
    # A header ("Flash attention kernel not used because:") and the switches of the other backends explain
    # nothing.
    told = [text for text in refusals if "not used because" not in text and "runtime disabled" not in text]
    if name.startswith("sdpa") and told:
        return "; ".join(dict.fromkeys(_condense(text) for text in told))
    return _condense(f"{type(error).__name__}: {error}")


def _condense(text: str, longest: int = 220) -> str:
    """The first line of a message, without the place in PyTorch's source and without this machine's paths."""
    text = re.sub(r"\s*\(Triggered internally at [^)]*\)\.?", "", text).strip()
    text = next((line.strip() for line in text.splitlines() if line.strip()), "no message")
    text = re.sub(r"(?:[A-Za-z]:)?(?:[/\\][^\s/\\:'\",()]+){2,}", lambda path: re.split(r"[/\\]", path[0])[-1], text)
    return text if len(text) <= longest else text[: longest - 3].rstrip() + "..."


# ----------------------------------------------------------------------------------------------------------
# The report
# ----------------------------------------------------------------------------------------------------------


def as_dict(*, compile_flex: bool | None = None) -> dict[str, Any]:
    """Environment, backends and verdict as JSON takes them; `cause` and `remedy` are None where flash runs compiled.

    Args:
        compile_flex: as for `backends`.
    """
    tried = backends(compile_flex=compile_flex)
    flash = _compiled_flash(tried)
    cause, remedy = (None, None) if flash else _cause_and_remedy(tried)
    machine = environment()
    return {
        "environment": machine.as_dict(),
        "untested_versions": versions.untested(machine.torch, machine.triton),
        "triton_kernels": "interpreter" if runtime.interpreted else "compiled",
        "backends": [asdict(backend) for backend in tried],
        "compiled_flash_kernels_on_gpu": flash,
        "status": _status(tried).removeprefix("Status: "),
        "cause": cause,
        "remedy": remedy,
    }


def report(*, compile_flex: bool | None = None) -> str:
    """The machine, then FlashAttention as a checklist: GPU, compute capability, the flash-attn package, each backend
    with its reason, and one line that sums up.

    Args:
        compile_flex: as for `backends`.
    """
    machine = environment()
    facts = [  # what, its value, and what to say where there is none
        ("driver", machine.driver, "none found"),
        ("CUDA", machine.cuda, "none: this PyTorch is a CPU build"),
        ("torch", machine.torch, ""),
        ("triton", machine.triton, "not installed"),
        ("transformers", machine.transformers, "not installed"),
        ("Python", machine.python, ""),
        ("system", machine.os, ""),
        ("CPU", machine.cpu, ""),
        ("Triton kernels", "interpreted, on the CPU" if runtime.interpreted else "compiled, on the GPU", ""),
    ]
    if untested := versions.untested(machine.torch, machine.triton):
        facts.append(("tested versions", None, untested))
    if machine.launch_table is not None:
        facts.append(("launch table", f"{machine.launch_table}: `python -m labutils tune --show`", ""))
    lines = ["This machine"]
    lines += [_row(value is not None, what, value or absent) for what, value, absent in facts]
    memory = f"{machine.gpu}, {machine.memory_gib} GiB"
    shape = ", ".join(map(str, PROBE_SHAPE))
    lines += ["", f"FlashAttention, each backend tried on tensors (B, N, H, D) = ({shape})"]
    lines.append(_row(machine.gpu is not None, "GPU", memory if machine.gpu else why_no_gpu()[0]))
    lines.append(_row(machine.capability is not None, "compute capability", _about_capability(machine.capability)))
    tried = backends(compile_flex=compile_flex)
    found = {backend.name: backend for backend in tried}
    for name in ("flash_attn", *(other for other in TITLES if other != "flash_attn")):
        backend = found[name]
        version = f"{machine.flash_attn}, " if name == "flash_attn" and backend.available else ""
        lines.append(_row(backend.available, TITLES[name], version + backend.reason))
    return "\n".join([*lines, "", _status(tried)])


def _about_capability(capability: tuple[int, int] | None) -> str:
    if capability is None:
        return "none"
    needed, generation = _LOWEST_CAPABILITY["sdpa_flash"]
    if capability >= needed:
        return _dotted(capability)
    return f"{_dotted(capability)}; PyTorch's flash kernel and flash-attn need {_dotted(needed)} ({generation})"


def _row(there: bool, what: str, text: str) -> str:
    width = max(map(len, TITLES.values()))
    return f"  [{'x' if there else ' '}] {what:<{width}}  {text}"


def _compiled_flash(tried: Sequence[Backend]) -> list[str]:
    """Names of the FlashAttention backends that ran as compiled kernels on a GPU."""
    return [b.name for b in tried if b.name in FLASH and b.available and b.runs_on == "gpu"]


def _status(tried: Sequence[Backend]) -> str:
    names = _compiled_flash(tried)
    if names:
        titles = "; ".join(TITLES[name] for name in names)  # some have a comma in their name
        return f"Status: FlashAttention runs compiled on this GPU ({titles})."
    cause, _ = _cause_and_remedy(tried)
    here = [f"{TITLES[b.name]} ({b.runs_on})" for b in tried if b.name in FLASH and b.available]
    instead = f" What runs instead: {'; '.join(here)}." if here else ""
    return f"Status: no FlashAttention kernel compiled for a GPU runs here: {cause}.{instead}"


def _cause_and_remedy(tried: Sequence[Backend]) -> tuple[str, str]:
    """Why no compiled flash kernel ran on a GPU, and what to do."""
    if runtime.device.type != "cuda":
        return why_no_gpu()
    failed = "; ".join(f"{TITLES[b.name]}: {b.reason}" for b in tried if b.name in FLASH)
    return (
        f"none of them ran on this GPU ({failed})",
        "A driver older than PyTorch's CUDA, or torch and triton versions that do not belong together, break "
        "several at once: update the driver, and install the lab in a new virtual environment.",
    )


def verify_flash_attention(force: bool = False, verbose: bool = True) -> bool:
    """Whether a FlashAttention kernel, compiled for a GPU, ran on this machine.

    Args:
        force: raise where none did.
        verbose: print `report()`, which ends in a status line.

    Raises:
        RuntimeError: with `force`; it names the cause and the remedy.
    """
    if verbose:
        print(report())
    tried = backends()
    if _compiled_flash(tried):
        return True
    if force:
        cause, remedy = _cause_and_remedy(tried)
        raise RuntimeError(f"No FlashAttention kernel compiled for a GPU runs here: {cause}. {remedy}")
    return False


def cuda_compiler() -> str | None:
    """Version of the CUDA compiler nvcc, "13.0", or None where there is none on the PATH.

    PyTorch and Triton do not use it; building flash-attn does.
    """
    told = _answer("nvcc", "--version") or ""
    return told.partition("release ")[2].partition(",")[0] or None
