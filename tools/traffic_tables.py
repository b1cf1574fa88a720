"""The tables of notebook 04 that hold what a GPU's counters saw: traffic.csv, launches.csv and coalescing.csv.

`measure_traffic` measures attention under ncu, for a table that has the IO model and the counted bytes as well.
`measure_coalescing` measures copies with gaps between the elements. Both run this file as a program under ncu.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import ncu
from labutils.analysis.counters import copy_with_gaps
from labutils.analysis.profiling import short_operation
from labutils.analysis.traffic import compulsory_bytes, counted_traffic, io_bytes, total_bytes
from labutils.benchmark import IMPLEMENTATIONS, SCHEMAS, dtype_name
from labutils.machine import runtime

LENGTHS = (1024, 2048, 4096, 8192)
# impl in the table -> pass, the IO model's name of the kernel, ncu's name of it (None: all that the call launches)
CASES = {
    "naive": ("fwd", "naive", None),
    "sdpa_flash": ("fwd", None, None),
    "triton_v1": ("fwd", "v1", "_forward_kernel"),
    "triton_v2": ("fwd", "v2", "_forward_kernel"),
    "triton_v2_dq": ("bwd", "dq", "_dq_kernel"),
    "triton_v2_dkdv": ("bwd", "dkdv", "_dkdv_kernel"),
}
_TABLE_ENTRY = {"v1": "v1", "v2": "forward", "dq": "dq", "dkdv": "dkdv"}


# ------------------------------------------------------------------------------------------------------------
# Traffic of attention
# ------------------------------------------------------------------------------------------------------------


def planned_traffic(
    impls: Iterable[str] = tuple(CASES),
    seqlens: Iterable[int] = LENGTHS,
    *,
    batch: int = 1,
    heads: int = 16,
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    causal: bool = False,
    blocks: Mapping[str, tuple[int, int]] | None = None,
) -> pd.DataFrame:
    """The rows of traffic.csv before anything is measured: shapes, block sizes, the IO model's and compulsory bytes.

    Args:
        impls: keys of `CASES`. seqlens: N.
        batch, heads, head_dim, dtype, causal: B, H, D and so on, the same for all rows.
        blocks: (block_m, block_n) by the IO model's kernel; None for those of this machine's launch table.

    Returns:
        A table with the columns of `SCHEMAS["traffic"]`. Counted and measured columns are NaN.

    Raises:
        ValueError: an unknown implementation.
    """
    from labutils.attention.kernels.launch import pick_config

    impls = list(impls)
    unknown = [name for name in impls if name not in CASES]
    if unknown:
        raise ValueError(f"impls={unknown}: choose from {', '.join(CASES)}.")
    rows = []
    for n in seqlens:
        shape = {"batch": batch, "heads": heads, "seqlen": n, "head_dim": head_dim}
        for impl in impls:
            which, kernel, _ = CASES[impl]
            row: dict[str, Any] = shape | {"impl": impl, "pass": which, "dtype": dtype_name(dtype), "causal": causal}
            if kernel in _TABLE_ENTRY:
                if blocks is None:
                    config = pick_config(_TABLE_ENTRY[kernel], head_dim, dtype, causal, runtime.device, longest=n)
                    row |= {"block_m": config.block_m, "block_n": config.block_n}
                else:
                    row |= dict(zip(("block_m", "block_n"), blocks[kernel], strict=True))
            if kernel is not None:
                sizes = {name: row[name] for name in ("block_m", "block_n") if name in row}
                row["model_bytes"] = io_bytes(
                    kernel, **shape, **sizes, dtype_bytes=dtype.itemsize, causal=causal, per_tensor=False
                )
            if which == "fwd":
                row["compulsory_bytes"] = compulsory_bytes(**shape, dtype_bytes=dtype.itemsize)
            rows.append(row)
    return pd.DataFrame(rows, columns=list(SCHEMAS["traffic"]))


def with_counts(table: pd.DataFrame, up_to: int = 2048, done: Callable[[int], None] = lambda n: None) -> pd.DataFrame:
    """The table with `counted_bytes` filled in for our kernels, up to a sequence length; needs no GPU.

    One head is counted and multiplied, since the kernels do the same for each head. A tile takes 5 ms, so N = 8,192
    takes a minute or two a kernel.

    Args:
        table: of `planned_traffic`, or stored.
        up_to: the longest N that is counted.
        done: told 1 after each row.
    """
    table = table.copy()
    for place, row in table.iterrows():
        kernel = CASES[row["impl"]][1]
        if kernel in _TABLE_ENTRY and row["seqlen"] <= up_to and pd.isna(row["counted_bytes"]):
            counted = counted_traffic(
                kernel, seqlen=int(row["seqlen"]), head_dim=int(row["head_dim"]), block_m=int(row["block_m"]),
                block_n=int(row["block_n"]), dtype=getattr(torch, row["dtype"]), causal=bool(row["causal"]),
            )  # fmt: skip
            table.loc[place, "counted_bytes"] = row["batch"] * row["heads"] * total_bytes(counted)
        done(1)
    return table


def measure_traffic(table: pd.DataFrame, *, keep: Path | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measures the rows of a planned table with ncu on this machine.

    Args:
        table: of `planned_traffic`.
        keep: a file to which ncu's text is copied.

    Returns:
        Two tables. The first has the same rows with `measured_bytes` (read from and written to DRAM, together), both
        parts of it, the bytes that the SMs asked of L2, the bytes that L1 received, and sectors per request. Rows of
        `sdpa_flash` and `naive` are sums over all kernels of a call. Other rows are of the one kernel that the IO model
        describes. The second table is that of `by_launch`.

    Raises:
        RuntimeError: see `ncu.run_under_ncu`.
    """
    calls, cases = _cases(table)
    found = ncu.run_under_ncu(_program("attention", cases), keep=keep)
    if len(found) != len(cases):
        raise RuntimeError(f"{len(cases)} cases ran under ncu, and it marked {len(found)}.")
    return with_measured(table, calls, cases, found), by_launch(cases, found)


def _cases(table: pd.DataFrame) -> tuple[pd.DataFrame, list[dict]]:
    """For each row of a planned table the call that it belongs to, and the list of different calls."""
    keys = ["pass", "dtype", "causal", "batch", "heads", "seqlen", "head_dim"]
    called = table["impl"].str.replace(r"_(dq|dkdv)$", "", regex=True).rename("call")
    calls = pd.concat([called, table[keys]], axis=1)
    return calls, json.loads(calls.drop_duplicates().to_json(orient="records"))


def with_measured(
    table: pd.DataFrame, calls: pd.DataFrame, cases: list[dict], found: list[pd.DataFrame]
) -> pd.DataFrame:
    """The table with the measurements of each case, in the columns of its schema.

    Args:
        table: of `planned_traffic`. calls: the call of each of its rows.
        cases: each call once, as `_run_attention` takes them. found: the launches of each case.
    """
    by_call = {tuple(case.values()): launches for case, launches in zip(cases, found, strict=True)}
    table = table.copy()
    for place, call in zip(table.index, calls.itertuples(index=False, name=None), strict=True):
        values = ncu.summed(by_call[call], CASES[table.loc[place, "impl"]][2])
        values["measured_bytes"] = values["dram_read_bytes"] + values["dram_write_bytes"]
        for name in set(values) & set(table.columns):
            table.loc[place, name] = values[name]
    return table


def by_launch(cases: list[dict], found: list[pd.DataFrame]) -> pd.DataFrame:
    """A row for each launch, in order, with the columns of `SCHEMAS["launches"]`.

    It shows the kernels that PyTorch adds to ours, and the single operations of naive attention.

    Args:
        cases: as `_run_attention` takes them. found: the launches of each case.
    """
    rows = []
    for case, launches in zip(cases, found, strict=True):
        for name, launch in launches.groupby("launch", sort=False):
            shape = {key: case[key] for key in ("pass", "dtype", "causal", "batch", "heads", "seqlen", "head_dim")}
            kernel = short_operation(launch["kernel"].iloc[0])
            rows.append({"impl": case["call"]} | shape | {"launch": name, "kernel": kernel} | ncu.summed(launch))
    return pd.DataFrame(rows, columns=list(SCHEMAS["launches"]))


# ------------------------------------------------------------------------------------------------------------
# Copies with gaps
# ------------------------------------------------------------------------------------------------------------


def measure_coalescing(table: pd.DataFrame, *, keep: Path | None = None) -> pd.DataFrame:
    """The table with bytes and sectors per request that ncu measured on this machine.

    Args:
        table: of `counters.planned_coalescing`.
        keep: a file to which ncu's text is copied.

    Raises:
        RuntimeError: see `ncu.run_under_ncu`.
    """
    elements = int(table["elements"].iloc[0])
    found = ncu.run_under_ncu(_program("copies", [int(s) for s in table["stride"]], elements), keep=keep)
    if len(found) != len(table):
        raise RuntimeError(f"{len(table)} copies ran under ncu, and it marked {len(found)}.")
    table = table.copy()
    for place, launches in zip(table.index, found, strict=True):
        for name, value in ncu.summed(launches, copy_with_gaps.fn.__name__).items():
            if name in table.columns:
                table.loc[place, name] = value
    return table


# ------------------------------------------------------------------------------------------------------------
# In the measured program
# ------------------------------------------------------------------------------------------------------------


def _run_attention(cases: list[dict]) -> None:
    for case in cases:
        shape = (case["batch"], case["seqlen"], case["heads"], case["head_dim"])
        dtype = getattr(torch, case["dtype"])
        q, k, v, dout = (torch.randn(shape, device=runtime.device, dtype=dtype) for _ in range(4))
        attention = IMPLEMENTATIONS[case["call"]]
        if case["pass"] == "fwd":
            with torch.no_grad():
                ncu.profiled(functools.partial(attention, q, k, v, causal=case["causal"]))
        else:
            leaves = [t.requires_grad_() for t in (q, k, v)]
            out = attention(*leaves, causal=case["causal"])
            ncu.profiled(functools.partial(torch.autograd.grad, out, leaves, dout, retain_graph=True))


def _run_copies(strides: list[int], elements: int) -> None:
    for stride in strides:
        x = torch.zeros(elements * stride, device=runtime.device)
        y = torch.empty_like(x)
        ncu.profiled(functools.partial(copy_with_gaps[(elements // 1024,)], x, y, STRIDE=stride, BLOCK=1024))


PROGRAMS: dict[str, Callable[..., None]] = {"attention": _run_attention, "copies": _run_copies}
"""What this file does as a program."""


def _program(name: str, *arguments: Any) -> list[str]:
    """The command line that runs one of `PROGRAMS`. The arguments must have types of JSON."""
    return [sys.executable, str(Path(__file__).resolve()), name, json.dumps(arguments)]


if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](*json.loads(sys.argv[2]))
