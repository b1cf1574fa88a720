"""Measures attention at one shape and at variants of it, such as another head dimension, dtype or number of heads."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from labutils.attention.backends import Attention, chosen
from labutils.benchmark.points import Oracle, attempt, is_out_of_memory
from labutils.benchmark.timing import attention_flops, dtype_name
from labutils.machine import runtime

SHAPE = ("batch", "heads", "kv_heads", "seqlen", "head_dim", "dtype", "causal")


def vary(
    impls: Iterable[str] | Mapping[str, Attention],
    base: Mapping[str, Any],
    variants: Mapping[str, Mapping[str, Any]],
    *,
    passes: Sequence[str] = ("fwd", "bwd"),
    seconds_per_point: float = 0.1,
    warm_up: float | None = None,
    error_seconds: float = 1.0,
    progress: bool = True,
) -> pd.DataFrame:
    """Time, peak memory and error of implementations at one shape and at variants of it, on this machine.

    Args:
        impls: as for `sweep`.
        base: a value for each of `SHAPE`: batch B, heads H, kv_heads H_kv (of K and V; divides H), seqlen N, head_dim
            D, dtype, causal.
        variants: name -> the values that differ from `base`.
        passes: "fwd", "bwd" or both.
        seconds_per_point, error_seconds, progress: as for `sweep`.
        warm_up: seconds before the repeats of a point, as for `time_call`.

    Returns:
        A row for each variant, pass and implementation: variant, impl, pass, `SHAPE`, ms, tflops, peak_mib, max_error,
        overhead_bound, status and reason, as in `sweep`'s table. `.attrs`: "machine".

    Raises:
        ValueError: a shape lacks a value, has an unknown one or a size below 1, or kv_heads does not divide its heads.
    """
    functions = chosen(impls)
    shapes = {name: dict(base) | dict(changes) for name, changes in variants.items()}
    for name, shape in shapes.items():
        if set(shape) != set(SHAPE):
            raise ValueError(f"the variant {name!r} needs {', '.join(SHAPE)}; it has {', '.join(shape)}.")
        for size in ("batch", "heads", "kv_heads", "seqlen", "head_dim"):
            if shape[size] < 1:
                raise ValueError(f"the variant {name!r} has {size}={shape[size]}: it must be 1 or more.")
        if shape["heads"] % shape["kv_heads"]:
            raise ValueError(f"the variant {name!r} has {shape['heads']} heads, no multiple of {shape['kv_heads']}.")
    rows = []
    with tqdm(
        total=len(shapes) * len(functions) * len(passes), file=sys.stdout, disable=not progress, mininterval=0.5
    ) as bar:
        for name, shape in shapes.items():
            batch, heads, kv_heads, n, d, dtype, causal = (shape[key] for key in SHAPE)
            try:
                tensors = [_draw(i, (batch, n, h, d), dtype) for i, h in enumerate((heads, kv_heads, kv_heads, heads))]
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                tensors = None
            oracle = None if tensors is None else Oracle(*tensors, causal=causal, seconds=error_seconds)
            for which in passes:
                flops = attention_flops(
                    batch=batch, heads=heads, seqlen_q=n, head_dim=d, causal=causal, backward=which == "bwd"
                )
                for impl, function in functions.items():
                    bar.set_description_str(f"{name} {impl} {which}")
                    found: dict[str, Any]
                    if tensors is None:
                        found = {"status": "oom", "reason": "not tried: the inputs alone do not fit"}
                    else:
                        found = attempt(
                            function, which, tensors, causal, oracle, seconds=seconds_per_point, warm_up=warm_up
                        )
                    tflops = flops / found["ms"] / 1e9 if "ms" in found else None
                    row = {"variant": name, "impl": impl, "pass": which, **shape, "tflops": tflops, **found}
                    rows.append(row | {"dtype": dtype_name(dtype)})
                    bar.update()
    measured = ["ms", "tflops", "peak_mib", "max_error", "overhead_bound", "status", "reason"]
    table = pd.DataFrame(rows, columns=["variant", "impl", "pass", *SHAPE, *measured])
    table.attrs["machine"] = runtime.machine
    return table


def _draw(number: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator(device=runtime.device).manual_seed(number)
    return torch.randn(shape, generator=generator, device=runtime.device, dtype=dtype)
