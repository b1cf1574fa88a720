"""What a measurement was made with: GPU, driver, versions, revision; and the report of `python -m labutils check`.

    from labutils.benchmark import environment
    environment.environment().gpu                   # the facts, one by one
    environment.verify_flash_attention()            # prints the report, which ends in a status line
    environment.verify_flash_attention(force=True)  # raises unless a kernel compiled for a GPU ran

Nothing here shows a path or the name of a host: reports end up in notebooks and in stored results.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from labutils.attention import probing
from labutils.attention.backends import BACKENDS
from labutils.machine import chips, runtime, versions


@dataclass(frozen=True)
class Environment:
    """The machine and the software that a measurement was made with. None: this machine has no such thing."""

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
    """The user's own launch configurations that the kernels use; None if all are the shipped ones."""

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON takes them: the compute capability as text, "9.0"; no `launch_table` if it is None."""
        fields = asdict(self) | {"capability": None if self.capability is None else chips.dotted(self.capability)}
        return {name: value for name, value in fields.items() if name != "launch_table" or value is not None}


# ----------------------------------------------------------------------------------------------------------
# The machine
# ----------------------------------------------------------------------------------------------------------


def environment(*, launch_table: bool = True) -> Environment:
    """What this machine has, at this moment. The GPU is the one in use: None under LABUTILS_DEVICE=cpu.

    Args:
        launch_table: say whether a launch table of the user's own is in force; False for a command that writes it.

    Raises:
        RuntimeError: the user's launch table is damaged, or was named and does not exist.
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
        triton=probing.installed_version("triton"),
        transformers=probing.installed_version("transformers"),
        flash_attn=probing.installed_version("flash-attn"),
        python=platform.python_version(),
        os=_operating_system(),
        cpu=_processor(),
        git_revision=_git_revision(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        launch_table=_launch_table() if used and launch_table else None,
    )


def _launch_table() -> str | None:
    """The user's launch table, named by a hash of its entries: two that differ are two environments."""
    from labutils.attention.kernels import tuned_table

    entries = tuned_table.tuned_here(0)
    digest = hashlib.sha256(repr(sorted(entries.items(), key=repr)).encode()).hexdigest()
    return f"{len(entries)} tuned entries, {digest[:8]}" if entries else None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two environments as dictionaries: ["driver: 570.1, now 580.65", ...].

    The date and `settings` do not count: they are not part of the machine.
    """
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


def _answer(*command: str, cwd: Path | None = None) -> str | None:
    """What a program prints; None if it is missing, fails or hangs."""
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
        pass  # not Linux: take what `platform` says
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} {'core' if cores == 1 else 'cores'}"


def _git_revision() -> str | None:
    """Revision of the checkout that labutils runs from, "+changes" if its code differs; None without a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None  # installed without a clone; a repository further up would be another project
    revision = _answer("git", "rev-parse", "--short=12", "HEAD", cwd=root)
    # A measurement writes notebooks and stored results; only a change of the code that made it counts.
    changed = _answer("git", "status", "--porcelain", "--", "labutils", ":(exclude)labutils/results", cwd=root)
    return f"{revision}+changes" if revision and changed else revision


def why_no_gpu() -> tuple[str, str]:
    """Why the lab does not use a GPU here, and what to do about it; two empty strings if it uses one."""
    if runtime.device.type == "cuda":
        return "", ""
    gpu, driver = _gpu(), _driver()
    if gpu is not None and gpu[1] < chips.OLDEST:
        return (
            f"{gpu[0]} has compute capability {chips.dotted(gpu[1])}, Triton compiles for "
            f"{chips.dotted(chips.OLDEST)} or higher",
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
# The report
# ----------------------------------------------------------------------------------------------------------


def report_as_dict(*, compile_flex: bool | None = None) -> dict[str, Any]:
    """Environment, backends and verdict as JSON takes them; no `cause` and `remedy` if a flash kernel ran on a GPU.

    Args:
        compile_flex: as for `probing.trials`.
    """
    tried = probing.trials(compile_flex=compile_flex)
    flash = probing.compiled_flash(tried)
    cause, remedy = (None, None) if flash else _cause_and_remedy(tried)
    machine = environment()
    return {
        "environment": machine.as_dict(),
        "untested_versions": versions.untested(machine.torch, machine.triton),
        "triton_kernels": "interpreter" if runtime.interpreted else "compiled",
        "backends": [asdict(trial) for trial in tried],
        "compiled_flash_kernels_on_gpu": flash,
        "status": _status(tried).removeprefix("Status: "),
        "cause": cause,
        "remedy": remedy,
    }


def report(*, compile_flex: bool | None = None) -> str:
    """The machine, then FlashAttention as a checklist: GPU, compute capability, the flash-attn package, each backend
    with its reason, and one line that sums up.

    Args:
        compile_flex: as for `probing.trials`.
    """
    machine = environment()
    facts = [  # what, its value, and what to say if it has none
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
    tried = probing.trials(compile_flex=compile_flex)
    width = max(len(_title(trial)) for trial in tried)

    def row(there: bool, what: str, text: str) -> str:
        return f"  [{'x' if there else ' '}] {what:<{width}}  {text}"

    lines = ["This machine"]
    lines += [row(value is not None, what, value or absent) for what, value, absent in facts]
    memory = f"{machine.gpu}, {machine.memory_gib} GiB"
    shape = ", ".join(map(str, probing.SHAPE))
    lines += ["", f"FlashAttention, each backend tried on tensors (B, N, H, D) = ({shape})"]
    lines.append(row(machine.gpu is not None, "GPU", memory if machine.gpu else why_no_gpu()[0]))
    lines.append(row(machine.capability is not None, "compute capability", _about_capability(machine.capability)))
    for trial in sorted(tried, key=lambda trial: not BACKENDS[trial.name].package):  # packages first
        package = BACKENDS[trial.name].package
        version = f"{probing.installed_version(package)}, " if package and trial.available else ""
        lines.append(row(trial.available, _title(trial), version + trial.reason))
    return "\n".join([*lines, "", _status(tried)])


def _about_capability(capability: chips.Capability | None) -> str:
    if capability is None:
        return "none"
    needed = BACKENDS["sdpa_flash"].lowest_capability
    if needed is None or capability >= needed:
        return chips.dotted(capability)
    return (
        f"{chips.dotted(capability)}; PyTorch's flash kernel and flash-attn need {chips.dotted(needed)} "
        f"({chips.GPUS[needed].architecture})"
    )


def _title(trial: probing.Trial) -> str:
    return BACKENDS[trial.name].title


def _status(tried: list[probing.Trial]) -> str:
    names = probing.compiled_flash(tried)
    if names:
        titles = "; ".join(BACKENDS[name].title for name in names)  # some have a comma in their name
        return f"Status: FlashAttention runs compiled on this GPU ({titles})."
    cause, _ = _cause_and_remedy(tried)
    here = [f"{_title(t)} ({t.runs_on})" for t in tried if BACKENDS[t.name].flash and t.available]
    instead = f" What runs instead: {'; '.join(here)}." if here else ""
    return f"Status: no FlashAttention kernel compiled for a GPU runs here: {cause}.{instead}"


def _cause_and_remedy(tried: list[probing.Trial]) -> tuple[str, str]:
    """Why no compiled flash kernel ran on a GPU, and what to do."""
    if runtime.device.type != "cuda":
        return why_no_gpu()
    failed = "; ".join(f"{_title(t)}: {t.reason}" for t in tried if BACKENDS[t.name].flash)
    return (
        f"none of them ran on this GPU ({failed})",
        "A driver older than PyTorch's CUDA, or torch and triton versions that do not belong together, break "
        "several at once: update the driver, and install the lab in a new virtual environment.",
    )


def verify_flash_attention(force: bool = False, verbose: bool = True) -> bool:
    """Whether a FlashAttention kernel, compiled for a GPU, ran on this machine.

    Args:
        force: raise an error if none did.
        verbose: print `report()`, which ends in a status line.

    Raises:
        RuntimeError: with `force`; it names the cause and the remedy.
    """
    if verbose:
        print(report())
    tried = probing.trials()
    if probing.compiled_flash(tried):
        return True
    if force:
        cause, remedy = _cause_and_remedy(tried)
        raise RuntimeError(f"No FlashAttention kernel compiled for a GPU runs here: {cause}. {remedy}")
    return False


def cuda_compiler() -> str | None:
    """Version of the CUDA compiler nvcc, "13.0", or None if the PATH has none.

    PyTorch and Triton do not use it; building flash-attn does.
    """
    told = _answer("nvcc", "--version") or ""
    return told.partition("release ")[2].partition(",")[0] or None
