"""Times all block sizes, warps and stages of the forward kernel on this GPU, or reads the stored times of another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import Any

import pandas as pd
import torch

from labutils.benchmark import SCHEMAS, Unsupported, dtype_name, reference_results, time_call
from labutils.machine import chips, runtime

BLOCKS, WARPS, STAGES = (32, 64, 128), (4, 8), (2, 3)


def sweep_blocks(
    *,
    batch: int = 4,
    heads: int = 32,
    seqlen: int = 4096,
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    causal: bool = False,
    blocks: Iterable[int] = BLOCKS,
    warps: Iterable[int] = WARPS,
    stages: Iterable[int] = STAGES,
    seconds: float = 0.05,
    done: Callable[[int], None] = lambda n: None,
) -> pd.DataFrame:
    """Times the forward kernel of v2 with all combinations of block sizes, warps and stages, on this GPU.

    Args:
        batch, heads, seqlen, head_dim, dtype, causal: B, H, N, D and so on.
        blocks: sizes of a block of rows, and of a block of columns. All pairs are timed.
        warps, stages: as in `LaunchConfig`.
        seconds: of repeats for each combination.
        done: told 1 after each combination.

    Returns:
        A table with the columns of `SCHEMAS["blocks"]`. `ms` is NaN if `status` is "does not fit". From compute
        capability 9.0 on, the kernel reads tiles through tensor descriptors.

    Raises:
        Unsupported: there is no GPU.
    """
    from labutils.attention.kernels import flash_v2
    from labutils.attention.kernels.launch_config import LaunchConfig
    from labutils.attention.kernels.options import Options

    if runtime.capability is None:
        raise Unsupported("block sizes are timed on a GPU: in the interpreter a time means nothing.")
    generator = runtime.seed(0)
    shape = (batch, seqlen, heads, head_dim)
    q, k, v = (torch.randn(shape, generator=generator, device=runtime.device, dtype=dtype) for _ in range(3))
    options = Options(head_dim**-0.5, window_right=0 if causal else None)
    tma = runtime.capability >= chips.TMA
    rows = []
    sizes = tuple(blocks)
    for m, n, w, s in product(sizes, sizes, warps, stages):
        config = LaunchConfig(m, n, w, s, tma)
        ms, status = float("nan"), "ok"
        try:
            ms = time_call(partial(flash_v2.forward, q, k, v, options, config), seconds=seconds, warm_up=0.03).median_ms
        except RuntimeError as error:
            if "too small for" not in str(error):
                raise
            status = "does not fit"
        rows.append(["forward", head_dim, dtype_name(dtype), causal, batch, heads, seqlen, m, n, w, s, tma, ms, status])
        done(1)
    table = pd.DataFrame(rows, columns=list(SCHEMAS["blocks"]))
    table.attrs["machine"] = runtime.machine
    return table


def stored_blocks(gpu: str = "nvidia_h200") -> pd.DataFrame:
    """The stored table that `sweep_blocks` made on a GPU.

    Args:
        gpu: a folder under labutils/results.

    Raises:
        FileNotFoundError: none is stored; `python tools/study.py blocks` makes one.
    """
    return reference_results(gpu, "blocks", dtype=None)


def against_the_table(blocks: pd.DataFrame) -> pd.DataFrame:
    """The best launch of a sweep beside the entry of the shipped launch table for that GPU.

    Args:
        blocks: of `sweep_blocks` on this machine, or of `stored_blocks`, with the GPU's capability in `.attrs`.

    Returns:
        A row for each head dimension and mask: head_dim, causal, `best` and `shipped` ("64 × 128, 4 warps, 2 stages"),
        their milliseconds in this sweep, and `shipped / best`; NaN if the sweep lacks the shipped launch. `128 × 128 /
        best` is the least time with these large blocks by the least time of all.

    Raises:
        ValueError: the table does not name its GPU, and there is no GPU here.
    """
    from labutils.attention.kernels import launch_config, launch_table

    capability = _capability_of(blocks)
    rows = []
    for (d, causal), timed in blocks[blocks["status"] == "ok"].groupby(["head_dim", "causal"]):
        dtype = getattr(torch, timed["dtype"].iloc[0])
        config = launch_table.shipped(launch_config.Place.of("forward", int(d), causal, dtype), capability)
        best = timed.loc[timed["ms"].idxmin()]
        own = timed[
            (timed["block_m"] == config.block_m) & (timed["block_n"] == config.block_n)
            & (timed["num_warps"] == config.num_warps) & (timed["num_stages"] == config.num_stages)
        ]  # fmt: skip
        ms = own["ms"].min()
        large = timed[(timed["block_m"] == 128) & (timed["block_n"] == 128)]["ms"].min()
        rows.append([d, causal, _named(best), _named(config), best["ms"], ms, ms / best["ms"], large / best["ms"]])
    columns = ["head_dim", "causal", "best", "shipped", "best ms", "shipped ms", "shipped / best", "128 × 128 / best"]
    return pd.DataFrame(rows, columns=columns)


def _capability_of(blocks: pd.DataFrame) -> chips.Capability:
    """The compute capability of the GPU of a sweep: stored with the table, or this machine's."""
    stored = (blocks.attrs.get("environment") or {}).get("capability")
    if stored is not None:
        return chips.undotted(stored)
    if runtime.capability is None:
        raise ValueError("the table does not say which GPU it is of, and there is none here: take `stored_blocks`.")
    return runtime.capability


def _named(launch: Any) -> str:
    return f"{launch.block_m} × {launch.block_n}, {launch.num_warps} warps, {launch.num_stages} stages"
