"""The launch table: which blocks, warps and stages each kernel has on each GPU, as shipped and as tuned by its user.

`python -m labutils tune` times candidates on the GPU that is there and keeps the winners in a file outside of this
repository: `LABUTILS_LAUNCH_TABLE` where that is set, else `labutils/launch_table.json` under `XDG_STATE_HOME`
(`~/.local/state` where that is not set). Its entries are used instead of the shipped ones, on the GPU and with the
version of Triton with which they were timed. `LABUTILS_LAUNCH_TABLE=none` means the shipped entries alone.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from labutils.machine import files

KERNELS = ("v1", "forward", "dkdv", "dq", "decode")
EITHER = ("v1", "decode")
"""Kernels of which one entry serves both masks. The others have one for each: causal or not."""

HEAD_DIMS = (64, 128, 256)
"""An entry is for head dimensions up to one of these."""

DTYPE_CLASSES = ("16 bit", "float32")
SMALLEST_BLOCK = 16  # tl.dot takes no smaller tile


# Triton's own serve kernels as well: called by the host they take microseconds each, several times a launch.
def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is no less than n; n of 1 or more."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is launched.

    Attributes:
        block_m: rows (queries) per tile. block_n: columns (keys) per tile. Powers of two, 16 or more.
        num_warps: warps of 32 threads per program.
        num_stages: depth of the software pipeline of the inner loop: tiles in flight at once.
        tma: read the tiles of the inner loop through tensor descriptors, where the tensors allow it.
        source: the user's table that it comes from; "" for any other.
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2
    tma: bool = False
    source: str = field(default="", compare=False, repr=False)

    @staticmethod
    def block_d(head_dim: int) -> int:
        """Columns of a tile that hold one head: a power of two, since `tl.arange` makes no other."""
        return max(SMALLEST_BLOCK, next_power_of_2(head_dim))


class Place(NamedTuple):
    """What an entry is for.

    Attributes:
        kernel: one of `KERNELS`. head_dim: one of `HEAD_DIMS`, the largest D that it is for.
        causal: whether the causal mask is on; None for both. dtype: one of `DTYPE_CLASSES`.
    """

    kernel: str
    head_dim: int
    causal: bool | None
    dtype: str

    @staticmethod
    def of(kernel: str, head_dim: int, causal: bool, dtype: torch.dtype) -> Place:
        """The place of a call. A head dimension above the largest of `HEAD_DIMS` has none of its own."""
        block_d = LaunchConfig.block_d(head_dim)
        size = next((size for size in HEAD_DIMS if block_d <= size), block_d)
        kind = "float32" if dtype == torch.float32 else "16 bit"
        return Place(kernel, size, None if kernel in EITHER else causal, kind)

    def __str__(self) -> str:
        mask = {None: "", False: ", full", True: ", causal"}[self.causal]
        return f"{self.kernel}, D up to {self.head_dim}{mask}, {self.dtype}"


# ------------------------------------------------------------------------------------------------------------
# Shipped
# ------------------------------------------------------------------------------------------------------------


# Tables by (kernel, BLOCK_D up to, causal); an entry without the third holds for both. Entries as in LaunchConfig:
# block_m, block_n, num_warps, num_stages, tma.
#
# float16 and bfloat16 on 9.0: of 12 to 30 candidates each the one with the least time on an H200 at N = 1,024 and 4,096
# taken together (v1 and 256: not searched).
_HOPPER = {
    ("v1", 64): LaunchConfig(64, 64, 4, 2),
    ("v1", 128): LaunchConfig(64, 32, 4, 2),
    ("forward", 64): LaunchConfig(64, 128, 4, 2, True),
    ("forward", 128): LaunchConfig(128, 64, 4, 2, True),
    ("forward", 256): LaunchConfig(128, 64, 8, 2, True),
    ("dkdv", 64, False): LaunchConfig(64, 64, 4, 3, True),
    ("dkdv", 64, True): LaunchConfig(64, 64, 4, 2, True),
    ("dkdv", 128): LaunchConfig(64, 64, 4, 2, True),
    ("dkdv", 256): LaunchConfig(32, 64, 8, 2, True),
    ("dq", 64): LaunchConfig(128, 64, 4, 3, True),
    ("dq", 128): LaunchConfig(128, 64, 8, 3, True),
    ("dq", 256): LaunchConfig(64, 32, 8, 2, True),
    ("decode", 64): LaunchConfig(64, 128, 4, 3),
    ("decode", 128): LaunchConfig(64, 128, 4, 3),
    ("decode", 256): LaunchConfig(32, 32, 8, 3),
}
# The others were NOT TIMED. Forward, dK/dV and dQ at 64 and 128 are what `candidates.best_by_resources` chose, on each
# of these architectures, among the candidates that `tune --compile-only` lists, causal, with triton 3.7.1: no register
# spilled, two blocks on a multiprocessor where possible, then the most rows kept. v1, decoding and 256 were chosen to
# fit.
#
# 8.6, 8.9 and 12.0: 99 KiB of shared memory for a block. Compiled for 8.6; 8.9 and 12.0 have the same limits. What was
# here before (64 x 64 for dK/dV at 64) spilled 288 bytes a thread on 8.6 and 432 on 12.0, or left room for one block of
# four warps alone (the forward).
_SMALL = {
    ("v1", 64): LaunchConfig(64, 64, 4, 2),
    ("v1", 128): LaunchConfig(64, 32, 4, 2),
    ("forward", 64): LaunchConfig(128, 64, 4, 2),
    ("forward", 128): LaunchConfig(64, 32, 4, 2),
    ("forward", 256): LaunchConfig(64, 32, 8, 1),
    ("dkdv", 64): LaunchConfig(32, 64, 4, 3),
    ("dkdv", 128): LaunchConfig(32, 32, 4, 2),
    ("dkdv", 256): LaunchConfig(16, 32, 4, 1),
    ("dq", 64): LaunchConfig(128, 32, 4, 3),
    ("dq", 128): LaunchConfig(64, 64, 8, 2),
    ("dq", 256): LaunchConfig(32, 16, 4, 1),
    ("decode", 64): LaunchConfig(64, 64, 4, 3),
    ("decode", 128): LaunchConfig(32, 64, 4, 2),
    ("decode", 256): LaunchConfig(16, 32, 4, 2),
}
# 8.0: 163 KiB, so that two blocks of larger tiles share a multiprocessor; 256 by the same rule, among six candidates
# for each kernel.
_AMPERE = _SMALL | {
    ("forward", 128): LaunchConfig(64, 64, 4, 2),
    ("forward", 256): LaunchConfig(64, 64, 8, 2),
    ("dkdv", 128): LaunchConfig(32, 32, 4, 3),
    ("dkdv", 256): LaunchConfig(32, 32, 8, 1),
    ("dq", 128): LaunchConfig(64, 32, 4, 3),
    ("dq", 256): LaunchConfig(32, 32, 4, 2),
}
# 10.0: 227 KiB, and tensor memory for the accumulators of products with 64 rows or more; those with fewer run on the
# units of older GPUs. The entries of 9.0 spill 56 (forward) and 272 bytes a thread (dK/dV) at 128. dQ at 128 and all of
# 256 are those of 9.0.
_BLACKWELL = {place: config for place, config in _HOPPER.items() if place[:2] != ("dkdv", 64)} | {
    ("forward", 64): LaunchConfig(128, 64, 4, 3, True),
    ("forward", 128): LaunchConfig(128, 32, 8, 2, True),
    ("dkdv", 64): LaunchConfig(32, 128, 4, 3, True),
    ("dkdv", 128): LaunchConfig(64, 64, 8, 3, True),
    ("dq", 64): LaunchConfig(128, 64, 8, 3, True),
}
# float32 products run on the plain units, with operands in registers: 32 x 32 is what does not spill.
_SMALLEST = {(kernel, 256): LaunchConfig(16, 16, 4, 1) for kernel in KERNELS}
_FLOAT32 = {(kernel, 128): LaunchConfig(32, 32, 4, 2) for kernel in KERNELS} | _SMALLEST
# Turing: Triton emits no tensor-core instruction for it, so tiles must stay as small as for float32, and one stage
# keeps them within its 64 KiB. In float32 at 256, dK/dV needs more than that even with the smallest tiles: no entry.
# In 16 bits, forward, dQ and dK/dV at 64 and 128 and decoding at 128 are what spills nothing of two to four tiles that
# were compiled for each: 32 x 32 spilled 500 bytes a thread in the forward at 128, and up to 2,900 in the backward.
_TURING = (
    {(kernel, 128): LaunchConfig(32, 32, 4, 1) for kernel in KERNELS}
    | _SMALLEST
    | {
        ("forward", 64): LaunchConfig(32, 32, 4, 1),
        ("forward", 128): LaunchConfig(32, 16, 4, 1),
        ("dkdv", 64): LaunchConfig(16, 32, 4, 1),
        ("dkdv", 128): LaunchConfig(16, 16, 8, 1),
        ("dq", 64): LaunchConfig(32, 16, 4, 1),
        ("dq", 128): LaunchConfig(16, 16, 8, 1),
        ("decode", 64): LaunchConfig(32, 32, 4, 1),
        ("decode", 128): LaunchConfig(32, 16, 4, 1),
    }
)
_TURING_FLOAT32 = (
    {(kernel, 64): LaunchConfig(32, 32, 4, 1) for kernel in KERNELS}
    | {(kernel, 128): LaunchConfig(16, 16, 4, 1) for kernel in KERNELS}
    | {place: config for place, config in _SMALLEST.items() if place != ("dkdv", 256)}
)


def _table(capability: tuple[int, int], dtype: str) -> dict[tuple, LaunchConfig]:
    if capability < (8, 0):
        return _TURING_FLOAT32 if dtype == "float32" else _TURING
    if dtype == "float32":
        return _FLOAT32
    own: dict[tuple[int, int], dict[tuple, LaunchConfig]]
    own = {(8, 0): _AMPERE, (9, 0): _HOPPER, (10, 0): _BLACKWELL}
    return own.get(capability, _SMALL)


def _find(place: Place, capability: tuple[int, int]) -> LaunchConfig | None:
    table = _table(capability, place.dtype)
    fitting = [
        key
        for key in table
        if key[0] == place.kernel and key[1] >= place.head_dim and (len(key) == 2 or key[2] == place.causal)
    ]
    return table[min(fitting, key=lambda key: key[1])] if fitting else None


def has(place: Place, capability: tuple[int, int]) -> bool:
    """Whether the shipped table has an entry: some kernels do not fit some GPUs."""
    return _find(place, capability) is not None


def shipped(place: Place, capability: tuple[int, int]) -> LaunchConfig:
    """The shipped entry.

    Raises:
        RuntimeError: there is none, since nothing fits that GPU.
    """
    config = _find(place, capability)
    if config is None:
        remedy = "use torch.float16, or split the heads" if place.dtype == "float32" else "split the heads"
        raise RuntimeError(
            f"a GPU of compute capability {capability[0]}.{capability[1]} has too little shared memory for the kernel "
            f"{place.kernel!r} at head dimension {place.head_dim} in {place.dtype}: {remedy}."
        )
    return config


# ------------------------------------------------------------------------------------------------------------
# Tuned
# ------------------------------------------------------------------------------------------------------------


class Gpu(NamedTuple):
    """What entries were timed with, and are used with: the GPU's name and compute capability, and Triton's version."""

    name: str
    capability: tuple[int, int]
    triton: str

    @staticmethod
    def here(device_index: int = 0) -> Gpu:
        """The GPU of that number."""
        name, capability = torch.cuda.get_device_name(device_index), torch.cuda.get_device_capability(device_index)
        return Gpu(name, capability, triton.__version__)

    def __str__(self) -> str:
        return f"{self.name} ({self.capability[0]}.{self.capability[1]}), triton {self.triton}"


VARIABLE = "LABUTILS_LAUNCH_TABLE"
_REMEDY = "Measure again with `python -m labutils tune`, or remove the table with `python -m labutils tune --reset`"


def path() -> Path | None:
    """Where the user's table is; None where `LABUTILS_LAUNCH_TABLE=none` turns it off."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return None if chosen == "none" else Path(chosen)
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "labutils" / "launch_table.json"


@dataclass
class Tuned:
    """What was timed on one GPU.

    Attributes:
        entries: the winners by place. environment: what they were timed with.
        measured: a row for each candidate that was tried, as `labutils.benchmark.tuning` keeps them.
        finished: False after an interrupt, until `--resume` has measured the rest.
    """

    entries: dict[Place, LaunchConfig] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    measured: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False


def read(file: Path) -> dict[Gpu, Tuned]:
    """All that a user's table holds, by GPU.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: it cannot be read, or is none of these tables; the message says what to do.
    """
    try:
        return _parse(json.loads(file.read_text(encoding="utf-8")), file)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise RuntimeError(
            f"{file} is no table of launch configurations that can be used ({what}). {_REMEDY}."
        ) from error


def _parse(stored: Any, file: Path) -> dict[Gpu, Tuned]:
    if stored["format"] != FORMAT:
        raise ValueError(f"its format is {stored['format']!r}, and this version of labutils reads {FORMAT}")
    found = {}
    for table in stored["tables"]:
        major, minor = table["capability"]
        gpu = Gpu(str(table["gpu"]), (int(major), int(minor)), str(table["triton"]))
        entries = {}
        for entry in table["entries"]:
            place = Place(entry["kernel"], entry["head_dim"], entry["causal"], entry["dtype"])
            _check_place(place)
            config = LaunchConfig(**entry["config"], source=str(file))
            _check_config(place, config)
            entries[place] = config
        measured = list(table["measured"])
        found[gpu] = Tuned(entries, dict(table["environment"]), measured, table["finished"] is True)
    return found


FORMAT = 1


def _check_place(place: Place) -> None:
    masks = (None,) if place.kernel in EITHER else (False, True)
    if (
        place.kernel not in KERNELS
        or place.head_dim not in HEAD_DIMS
        or place.dtype not in DTYPE_CLASSES
        or not any(place.causal is mask for mask in masks)
    ):
        raise ValueError(f"{tuple(place)} is no entry of a launch table")


def _check_config(place: Place, config: LaunchConfig) -> None:
    numbers = (config.block_m, config.block_n, config.num_warps, config.num_stages)
    whole = all(type(number) is int and number > 0 for number in numbers) and type(config.tma) is bool
    if not whole or any(number & (number - 1) for number in numbers[:3]):
        raise ValueError(f"{place}: {config} has a number that cannot be; blocks and warps are powers of two")
    if min(numbers[:2]) < SMALLEST_BLOCK or config.num_warps > 32:
        raise ValueError(f"{place}: {config} has blocks below {SMALLEST_BLOCK}, or more than 32 warps")


def write(file: Path, tables: dict[Gpu, Tuned]) -> None:
    """Replaces the file as a whole: whoever reads it, at any moment, finds all of the old or all of the new.

    Raises:
        OSError: it cannot be written; the old one stays.
    """
    stored = [
        {
            "gpu": gpu.name, "capability": list(gpu.capability), "triton": gpu.triton, "finished": tuned.finished,
            "environment": tuned.environment,
            "entries": [place._asdict() | {"config": _as_dict(config)} for place, config in tuned.entries.items()],
            "measured": tuned.measured,
        }
        for gpu, tuned in tables.items()
    ]  # fmt: skip
    files.replace(file, json.dumps({"format": FORMAT, "tables": stored}, indent=1) + "\n")


def _as_dict(config: LaunchConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name != "source"}


@functools.cache
def tuned_here(device_index: int) -> dict[Place, LaunchConfig]:
    """The user's entries for the GPU of that number; read once in a process. Empty where nothing was tuned.

    Warns where a table is there, and none of it is for this GPU and this version of Triton.

    Raises:
        RuntimeError: the table cannot be used, or `LABUTILS_LAUNCH_TABLE` names a file that is not there.
    """
    file = path()
    if file is None:
        return {}
    try:
        tables = read(file)
    except FileNotFoundError as error:
        if os.environ.get(VARIABLE):
            raise RuntimeError(
                f"{VARIABLE} names {file}, which is not there: unset it, or write that file with "
                "`python -m labutils tune`."
            ) from error
        return {}
    gpu = Gpu.here(device_index)
    if gpu not in tables:
        others = "; ".join(map(str, tables)) or "nothing"
        warnings.warn(
            f"the launch configurations in {file} are not used: this is {gpu}, and they were timed on {others}. The "
            "shipped ones are used. `python -m labutils tune` times those of this GPU.",
            stacklevel=2,
        )
        return {}
    return tables[gpu].entries


def in_force(place: Place, capability: tuple[int, int], device_index: int | None) -> LaunchConfig:
    """The user's entry, or else the shipped one. `device_index` None: of no GPU that is here, so the shipped one.

    Raises:
        RuntimeError: there is no entry, or the user's table cannot be used.
    """
    tuned = None if device_index is None else tuned_here(device_index).get(place)
    return shipped(place, capability) if tuned is None else tuned
