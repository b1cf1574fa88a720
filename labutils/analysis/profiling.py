"""What torch.profiler says, as a table: where the time of a function goes, operation by operation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import nan
from typing import Any

import pandas as pd
import torch

from labutils import runtime
from labutils.benchmark import torch_profiler

# The profiler records its own requests for memory among the operations.
_PROFILERS_OWN = ("Activity Buffer Request",)


def profile(fn: Callable[[], Any], *, repeats: int = 3, top: int | None = 10) -> pd.DataFrame:
    """What torch.profiler says of `fn()`, as a table: where its time goes, operation by operation.

    Args:
        fn: called `repeats` times, after one call that is not recorded.
        repeats: calls to average over.
        top: rows to return, longest first; None for all.

    Returns:
        `op`, `calls` (per call of fn), `self_ms` (per call of fn, without what the operation calls in turn;
        time on the GPU where there is one, else on the CPU), `share` of the total and `gflops` (per call of
        fn; NaN where the
        profiler does not count, which is everything but matmuls and a few elementwise operations: attention
            kernels
        show none). On a GPU, kernels launched outside a PyTorch operation, as Triton's are, stand under their
        own name. `.attrs`: "total_ms", "machine", "device" ("CPU" or "GPU").
    """
    on_gpu = runtime.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    fn()
    with torch_profiler(
        activities=[activity.CPU, activity.CUDA] if on_gpu else [activity.CPU], with_flops=True
    ) as profiler:
        for _ in range(repeats):
            fn()
        if on_gpu:
            torch.cuda.synchronize()

    cpu = torch.autograd.DeviceType.CPU
    rows: list[dict] = []
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if event.device_type == cpu and microseconds > 0 and event.key not in _PROFILERS_OWN:
            rows.append({"op": event.key, "calls": event.count, "us": microseconds, "flops": event.flops or nan})
    if on_gpu:
        rows += _kernels_without_operation(profiler)
    table = pd.DataFrame(rows, columns=["op", "calls", "us", "flops"]).sort_values("us", ascending=False)
    total_us = table["us"].sum()
    result = pd.DataFrame(
        {
            "op": table["op"],
            "calls": table["calls"] / repeats,
            "self_ms": table["us"] / repeats / 1e3,
            "share": table["us"] / total_us,
            "gflops": table["flops"] / repeats / 1e9,
        }
    ).reset_index(drop=True)
    result = result if top is None else result.head(top)
    result.attrs.update(
        total_ms=float(total_us) / repeats / 1e3, machine=runtime.machine, device="GPU" if on_gpu else "CPU"
    )
    return result


def _kernels_without_operation(profiler: Any) -> list[dict]:
    """GPU kernels that no PyTorch operation launched: their time is in no operation's account."""
    cpu = torch.autograd.DeviceType.CPU
    spent: Counter[str] = Counter()  # microseconds by kernel, less those that an operation accounts for
    calls: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == cpu:
            for kernel in event.kernels:
                spent[kernel.name] -= kernel.duration
                calls[kernel.name] -= 1
        else:
            spent[event.name] += event.self_device_time_total
            calls[event.name] += 1
    for name in _PROFILERS_OWN:
        calls.pop(name, None)
    return [{"op": name, "calls": n, "us": spent[name], "flops": nan} for name, n in calls.items() if n > 0]
