"""A table of what launches need on several GPUs: registers, spills, shared memory, occupancy.

`labutils.attention.tuning.compiled` compiles without those GPUs. This module says which launches are worth knowing, and
makes the table. Compiling takes many minutes, so the table is stored (`stored_table`) with the version of Triton that
made it. A test compiles a few rows again and compares.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import pandas as pd
import torch

from labutils.benchmark import SCHEMAS, dtype_name, reference_results
from labutils.machine import chips

if TYPE_CHECKING:
    from labutils.attention.kernels.launch_config import LaunchConfig

STORED_AS = "compiled"
"""The folder under labutils/results that holds the table. It is not a GPU's: the table comes from a compiler."""

CAPABILITIES = (chips.TURING, chips.AMPERE, chips.AMPERE_RTX, chips.ADA, chips.HOPPER, chips.BLACKWELL)
"""The GPUs that the stored table is for."""

HEAD_DIMS = (64, 128, 256)
GRID_BLOCKS = (32, 64, 128)
GRID_WARPS = (4, 8)
GRID_STAGES = 2

COLUMNS = list(SCHEMAS["resources"])


@dataclass(frozen=True)
class Launch:
    """One launch to be compiled.

    Attributes:
        origin: "table" for an entry of the launch table; "grid" for block sizes of the map that notebook 04 draws.
        program: a key of `compiled.PROGRAMS`. head_dim: D. capability: of the GPU, as (8, 9).
        causal: whether the mask is on. config: None: from the launch table.
    """

    origin: str
    program: str
    head_dim: int
    capability: chips.Capability
    causal: bool = True
    config: LaunchConfig | None = None


def gpu_name(capability: chips.Capability | str) -> str:
    """The first GPU that `chips.GPUS` names for a compute capability, given as (8, 9) or "8.9"."""
    if isinstance(capability, str):
        capability = chips.undotted(capability)
    return chips.GPUS[capability].names.split(",")[0]


def launches_of_the_table(capabilities: Iterable[chips.Capability] = CAPABILITIES) -> list[Launch]:
    """The entries of the launch table for 16-bit inputs: v1, forward, backward and decode, causal and full.

    v1 has no entry above D = 128, its largest head dimension.

    Args:
        capabilities: compute capabilities, as (8, 9).
    """
    return [
        Launch("table", program, d, capability, causal)
        for capability in capabilities
        for program in ("v1", "forward", "backward", "decode")
        for d in HEAD_DIMS
        if not (program == "v1" and d > 128)
        for causal in (False, True)
    ]


def launches_of_the_grid(capabilities: Iterable[chips.Capability] = CAPABILITIES) -> list[Launch]:
    """Forward kernels with all pairs of `GRID_BLOCKS`, and with `GRID_WARPS`, at D = 64 and 128.

    From 9.0 on they load through tensor descriptors, as the entries of the launch table do.

    Args:
        capabilities: compute capabilities, as (8, 9).
    """
    from labutils.attention.kernels.launch_config import LaunchConfig

    return [
        Launch("grid", "forward", d, c, False, LaunchConfig(m, n, warps, GRID_STAGES, c >= chips.TMA))
        for c in capabilities
        for d, m, n, warps in product((64, 128), GRID_BLOCKS, GRID_BLOCKS, GRID_WARPS)
    ]


def compile_launches(
    launches: Iterable[Launch], *, processes: int = 1, done: Callable[[int], None] = lambda n: None
) -> pd.DataFrame:
    """Compiles launches in float16, completely, and says what each needs.

    Args:
        launches: of the two functions above, or your own.
        processes: how many compile at once; each takes a CPU core and half a GiB.
        done: called with the number of launches that have been compiled since its last call.

    Returns:
        One row for each kernel launched (a backward pass launches two), with `COLUMNS`: `capability` as text ("8.9"),
        `shared_bytes` of a block, `registers` and `spilled_bytes` of a thread, `fits` (whether the GPU can launch it),
        `blocks_per_sm` and `occupancy` (0 if it does not fit), `triton`, the version of Triton.

    Raises:
        RuntimeError: see `compiled.resources_of`.
    """
    rows = []
    for part in _parts(list(launches), 4 * processes):
        rows += _compile(part, processes)
        done(len(part))
    return pd.DataFrame(rows, columns=COLUMNS)


def _parts(items: list, size: int) -> Iterator[list]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _compile(launches: list[Launch], processes: int) -> list[dict]:
    import triton

    from labutils.attention.tuning import candidates, compiled

    kernels = {name: kernel for kernel, name in candidates.COMPILED_NAMES.items()}  # what the launch table calls them
    requests = [
        compiled.Request(x.program, x.head_dim, torch.float16, x.capability, x.causal, config=x.config)
        for x in launches
    ]
    answers = compiled.resources_of(requests, binaries=True, processes=processes)
    rows = []
    for launch, found in zip(launches, answers, strict=True):
        for cost in found:
            if cost.kernel.endswith("_merge_kernel"):  # the end of decoding, which has no block sizes
                continue
            rows.append(
                {
                    "origin": launch.origin,
                    "kernel": kernels.get(cost.kernel, cost.kernel),
                    "capability": chips.dotted(cost.capability),
                    "head_dim": launch.head_dim,
                    "dtype": dtype_name(torch.float16),
                    "causal": launch.causal,
                    "block_m": cost.constants["BLOCK_M"],
                    "block_n": cost.constants["BLOCK_N"],
                    "num_warps": cost.num_warps,
                    "num_stages": cost.num_stages,
                    "tma": bool(cost.constants.get("TMA", False)),
                    "shared_bytes": cost.shared_bytes,
                    "tensor_columns": cost.tensor_columns,
                    "registers": cost.registers,
                    "spilled_bytes": cost.spilled_bytes,
                    "fits": cost.fits,
                    "blocks_per_sm": cost.blocks_per_sm,
                    "occupancy": cost.occupancy,
                    "triton": triton.__version__,
                }
            )
    return rows


def compared(table: pd.DataFrame, one: str = "8.0", other: str = "8.9") -> pd.DataFrame:
    """The grid's launches on two GPUs, side by side: which fit, and how many programs and warps an SM holds.

    Args:
        table: of `stored_table`. one, other: compute capabilities; by default those of the A100 and the RTX 4090.

    Returns:
        head_dim, block_m, block_n, num_warps, shared_kib (on the first GPU), and for each GPU `fits`, `programs` and
        `occupancy`, named "fits 8.0" and so on.
    """
    keys = ["head_dim", "block_m", "block_n", "num_warps"]
    grid = table[table["origin"] == "grid"].rename(columns={"blocks_per_sm": "programs"})
    columns = ["fits", "programs", "occupancy"]
    sides = [
        grid[grid["capability"] == c].set_index(keys)[[*columns, "shared_bytes"]].add_suffix(f" {c}")
        for c in (one, other)
    ]
    both = sides[0].join(sides[1], how="inner").reset_index()
    both.insert(4, "shared_kib", both.pop(f"shared_bytes {one}") / 1024)
    return both.drop(columns=f"shared_bytes {other}")


def stored_table() -> pd.DataFrame:
    """The stored table of all launches, with `COLUMNS`; `.attrs["environment"]` names the versions that compiled it."""
    return reference_results(STORED_AS, "resources", dtype=None).astype({"capability": str})


# ------------------------------------------------------------------------------------------------------------
# Programs on multiprocessors
# ------------------------------------------------------------------------------------------------------------


def makespan(work: Iterable[float], slots: int) -> float:
    """When the last program of a launch ends, if each starts as soon as one of `slots` places is free.

    Args:
        work: the time of each program, in the order in which they start, in any unit.
        slots: how many programs run at a time: those of one multiprocessor times the multiprocessors.

    Raises:
        ValueError: `slots` is below 1.
    """
    if slots < 1:
        raise ValueError(f"slots={slots}: a program needs a place to run.")
    ends = [0.0] * slots
    for takes in work:
        heapq.heapreplace(ends, ends[0] + takes)
    return max(ends)
