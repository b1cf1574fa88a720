"""The user's own launch table: how it is read and written, and whether it or the shipped table serves a call.

`python -m labutils tune` times candidates on this machine's GPU, and keeps the winners in a file outside of this
repository: `LABUTILS_LAUNCH_TABLE` if it is set, else `labutils/launch_table.json` under `XDG_STATE_HOME`
(see `files.state_folder`). Its entries replace the shipped ones, but only on the GPU and with the version of
Triton that they were timed with. `LABUTILS_LAUNCH_TABLE=none` means the shipped entries only.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import triton

from labutils.attention.kernels import launch_table
from labutils.attention.kernels.launch_config import (
    DTYPE_CLASSES,
    HEAD_DIMS,
    KERNELS,
    ONE_FOR_BOTH_MASKS,
    SMALLEST_BLOCK,
    LaunchConfig,
    Place,
)
from labutils.machine import chips, files


class TunedFor(NamedTuple):
    """What entries were timed with and are used with: the GPU's name and compute capability, and Triton's version."""

    name: str
    capability: tuple[int, int]
    triton: str

    @staticmethod
    def here(device_index: int = 0) -> TunedFor:
        """GPU number `device_index` of this machine, with the installed Triton."""
        name, capability = torch.cuda.get_device_name(device_index), torch.cuda.get_device_capability(device_index)
        return TunedFor(name, capability, triton.__version__)

    def __str__(self) -> str:
        return f"{self.name} ({chips.dotted(self.capability)}), triton {self.triton}"


VARIABLE = "LABUTILS_LAUNCH_TABLE"
_REMEDY = "Remove the table with `python -m labutils tune --reset`, then measure again with `python -m labutils tune`"
_FOREIGN = f"It was not written by `python -m labutils tune`: name another file with {VARIABLE}, or move it away"
_BEGINNING = '{"format":'  # of a table's text, without its spaces


def path() -> Path | None:
    """Where the user's table is; None if `LABUTILS_LAUNCH_TABLE=none` turns it off.

    Raises:
        RuntimeError: the variable begins with `~`, and the home folder is not known.
    """
    chosen = os.environ.get(VARIABLE)
    if not chosen:
        return files.state_folder() / "launch_table.json"
    try:
        return None if chosen == "none" else files.expanded(chosen, VARIABLE)
    except ValueError as error:
        raise RuntimeError(str(error)) from error


@dataclass
class Tuned:
    """What `python -m labutils tune` found on one GPU.

    Attributes:
        entries: the winners by place. environment: what they were timed with.
        measured: a row for each candidate that was tried.
        finished: False after an interrupt, until `--resume` has measured the rest.
    """

    entries: dict[Place, LaunchConfig] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    measured: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False


def read(file: Path) -> dict[TunedFor, Tuned]:
    """Everything in a user's table, by GPU.

    Raises:
        FileNotFoundError: the file does not exist.
        RuntimeError: it cannot be read, or does not hold such a table; the message says what to do.
    """
    try:
        return _parse(json.loads(file.read_text(encoding="utf-8")), file)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
        remedy = _FOREIGN if state(file) == "foreign" else _REMEDY
        raise RuntimeError(
            f"{file} is no table of launch configurations that can be used ({what}). {remedy}."
        ) from error


def state(file: Path) -> Literal["ours", "damaged", "foreign"]:
    """What a file is, for a program that may remove only tables.

    Returns:
        "ours": a table, even if this version cannot use all of it. "damaged": nothing, or the beginning of a table.
        "foreign": anything else, also a file that cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8")
        stored = json.loads(text)
    except (OSError, UnicodeDecodeError):
        return "foreign"
    except (ValueError, RecursionError):
        start = "".join(text[:100].split())[: len(_BEGINNING)]
        return "damaged" if _BEGINNING.startswith(start) else "foreign"
    ours = isinstance(stored, dict) and "format" in stored and isinstance(stored.get("tables"), list)
    return "ours" if ours else "foreign"


def _parse(stored: Any, file: Path) -> dict[TunedFor, Tuned]:
    if stored["format"] != FORMAT:
        raise ValueError(f"its format is {stored['format']!r}, and this version of labutils reads {FORMAT}")
    found = {}
    for table in stored["tables"]:
        major, minor = table["capability"]
        gpu = TunedFor(str(table["gpu"]), (int(major), int(minor)), str(table["triton"]))
        entries = {}
        for entry in table["entries"]:
            place = Place(entry["kernel"], entry["head_dim"], entry["causal"], entry["dtype"])
            _check_place(place)
            config = LaunchConfig(**entry["config"], source=str(file))
            _check_config(place, config)
            entries[place] = config
        measured = [dict(row) for row in table["measured"]]
        found[gpu] = Tuned(entries, dict(table["environment"]), measured, table["finished"] is True)
    return found


FORMAT = 1


def _check_place(place: Place) -> None:
    masks = (None,) if place.kernel in ONE_FOR_BOTH_MASKS else (False, True)
    if (
        place.kernel not in KERNELS
        or place.head_dim not in HEAD_DIMS
        or place.dtype not in DTYPE_CLASSES
        or not any(place.causal is mask for mask in masks)
    ):
        raise ValueError(f"{tuple(place)} is not a place of a launch table")


def _check_config(place: Place, config: LaunchConfig) -> None:
    numbers = (config.block_m, config.block_n, config.num_warps, config.num_stages)
    whole = all(type(number) is int and number > 0 for number in numbers) and type(config.tma) is bool
    if not whole or any(number & (number - 1) for number in numbers[:3]):
        raise ValueError(f"{place}: {config} is not possible: all numbers are above 0, blocks and warps powers of two")
    if min(numbers[:2]) < SMALLEST_BLOCK or config.num_warps > 32:
        raise ValueError(f"{place}: {config} has blocks below {SMALLEST_BLOCK}, or more than 32 warps")


def write(file: Path, tables: dict[TunedFor, Tuned]) -> None:
    """Replaces the file as a whole: a reader finds the old table or the new one, never a mixture.

    Raises:
        OSError: the file cannot be written; the old one stays.
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
    """The user's entries for GPU number `device_index`, read once in a process; empty if there are none.

    Warns if there is a table, but nothing in it is for this GPU and this version of Triton.

    Raises:
        RuntimeError: the table cannot be used, or `LABUTILS_LAUNCH_TABLE` names a file that does not exist.
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
    except RuntimeError as error:
        if isinstance(error.__cause__, OSError) and not os.environ.get(VARIABLE):
            return {}  # nobody has named a table: a home that cannot be read must not end every call
        raise
    gpu = TunedFor.here(device_index)
    if gpu not in tables:
        others = "; ".join(map(str, tables)) or "nothing"
        warnings.warn(
            f"the launch configurations in {file} are not used: this is {gpu}, and they were timed on {others}. The "
            "shipped ones are used. `python -m labutils tune` times candidates on this GPU.",
            stacklevel=2,
        )
        return {}
    return tables[gpu].entries


def in_force(place: Place, capability: tuple[int, int], device_index: int | None) -> LaunchConfig:
    """The user's entry if there is one, else the shipped one. For a GPU that is not here, `device_index` is None.

    Raises:
        RuntimeError: no table has an entry, or the user's table cannot be used.
    """
    tuned = None if device_index is None else tuned_here(device_index).get(place)
    return launch_table.shipped(place, capability) if tuned is None else tuned
