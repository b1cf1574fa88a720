"""Compares the IO model with the counters of a GPU: where the bytes of attention go, and what gaps in a copy cost.

Nsight Compute reads the counters (`tools/ncu.py`). It needs rights that a notebook does not have, so their tables are
stored under labutils/results.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
import torch
import triton
import triton.language as tl

from labutils.benchmark import SCHEMAS, Unsupported, time_call
from labutils.machine import runtime

SECTOR = 32
"""Bytes of a sector, the smallest piece that L2 hands over."""

STRIDES = (1, 2, 4, 8, 16, 32)


# ------------------------------------------------------------------------------------------------------------
# Attention
# ------------------------------------------------------------------------------------------------------------


def explained(traffic: pd.DataFrame) -> pd.DataFrame:
    """Where the model's bytes go: ratios of measured bytes to modelled ones.

    Args:
        traffic: the stored table "traffic".

    Returns:
        A row for each row of `traffic`, with `impl`, `seqlen` and:

        - `SM / model`: bytes that came into L1 and shared memory, plus bytes stored, by those of the IO model. It is 1
          if the SMs move what the model says.
        - `L2 / SM`: bytes that L2 was asked to read, by those that arrived. It is below 1 if one answer served several
          SMs.
        - `DRAM reads / once`, `DRAM writes / once`: by the bytes of `moved_once`.
        - `comes back (MiB)`: the bytes of `comes_back`.

        A ratio to the model is NaN if the block sizes are not known.
    """
    once = [moved_once(row) for row in traffic.to_dict("records")]
    return pd.DataFrame(
        {
            "impl": traffic["impl"],
            "seqlen": traffic["seqlen"],
            "SM / model": (traffic["l1_filled_bytes"] + traffic["l2_write_bytes"]) / traffic["model_bytes"],
            "L2 / SM": traffic["l2_read_bytes"] / traffic["l1_filled_bytes"],
            "DRAM reads / once": traffic["dram_read_bytes"] / [reads for reads, _ in once],
            "DRAM writes / once": traffic["dram_write_bytes"] / [writes for _, writes in once],
            "comes back (MiB)": [comes_back(row) / 2**20 for row in traffic.to_dict("records")],
        }
    )


def moved_once(row: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes that a call reads, and bytes that it writes, if each of its kernels moves each of its tensors once.

    Naive attention is six kernels: two that lay out K and V, a product, the scale, the softmax, a product. v1 also
    reads O, l and m, which PyTorch has filled.

    Args:
        row: of the stored table "traffic", without a mask.
    """
    heads, rows = row["batch"] * row["heads"], row["seqlen"]
    size = getattr(torch, row["dtype"]).itemsize
    slim, matrix, one = heads * rows * row["head_dim"] * size, heads * rows * rows * size, heads * rows * 4
    state = heads * rows * row["head_dim"] * 4 + 2 * one  # v1's O, l and m, in float32
    return {
        "naive": (3 * matrix + 5 * slim, 3 * matrix + 3 * slim),
        "sdpa_flash": (3 * slim, slim + one),
        "triton_v1": (3 * slim + state, state),
        "triton_v2": (3 * slim, slim + one),
        "triton_v2_dq": (5 * slim + one, slim + 2 * one),
        "triton_v2_dkdv": (4 * slim + 2 * one, 2 * slim),
    }[row["impl"]]


def comes_back(row: Mapping[str, Any]) -> int:
    """Bytes that a call needs again and again, or hands from kernel to kernel, of all heads together.

    They are S in naive attention, and Q, O, l and m in v1, which come back for each block of K and V. In kernels with a
    block of Q they are K and V. In the dK/dV kernel, with a block of K and V, they are Q, dO and two numbers a row.

    Args:
        row: as for `moved_once`.
    """
    heads, rows = row["batch"] * row["heads"], row["seqlen"]
    size, d = getattr(torch, row["dtype"]).itemsize, row["head_dim"]
    return {
        "naive": heads * rows * rows * size,
        "triton_v1": heads * rows * (d * (size + 4) + 8),
        "triton_v2_dkdv": heads * rows * (2 * d * size + 8),
    }.get(row["impl"], heads * rows * 2 * d * size)


# ------------------------------------------------------------------------------------------------------------
# Copies with gaps
# ------------------------------------------------------------------------------------------------------------


def sectors_touched(stride: int, elements: int = 1024, itemsize: int = 4) -> int:
    """In how many sectors `elements` numbers of `itemsize` bytes lie if neighbours are `stride` numbers apart."""
    return len({i * stride * itemsize // SECTOR for i in range(elements)})


def planned_coalescing(strides: Iterable[int] = STRIDES, elements: int = 2**22) -> pd.DataFrame:
    """The bytes that a float32 copy with gaps should read and write.

    Args:
        strides: numbers from one element to the next.
        elements: how many are copied, a multiple of 1,024.

    Returns:
        The table "coalescing" with `useful_bytes`, and `model_bytes` in whole sectors. Measured columns are NaN.
    """
    rows = [
        {
            "stride": s,
            "elements": elements,
            "useful_bytes": 2 * 4 * elements,
            "model_bytes": 2 * SECTOR * sectors_touched(s) * (elements // 1024),
        }
        for s in strides
    ]
    return pd.DataFrame(rows, columns=list(SCHEMAS["coalescing"]))


@triton.jit
def copy_with_gaps(x_ptr, y_ptr, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Copies BLOCK numbers in each program; neighbours are STRIDE numbers apart."""
    offs = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)) * STRIDE
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


def time_copies(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `planned_coalescing` with `ms` and `useful_gb_per_s` of each copy on this GPU.

    Raises:
        Unsupported: there is no GPU.
    """
    if runtime.device.type != "cuda":
        raise Unsupported("copies are timed on a GPU: in the interpreter a time means nothing.")
    times = []
    for row in table.itertuples():
        x = torch.zeros(row.elements * row.stride, device=runtime.device)
        y, copy = torch.empty_like(x), copy_with_gaps[(row.elements // 1024,)]
        call = functools.partial(copy, x, y, STRIDE=row.stride, BLOCK=1024)
        times.append(time_call(call, seconds=0.1).median_ms)
    return table.assign(ms=times, useful_gb_per_s=table["useful_bytes"] / pd.Series(times, index=table.index) / 1e6)
