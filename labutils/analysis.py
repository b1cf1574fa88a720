"""Explains times: bytes moved (modelled and counted), the ceilings of this machine, roofline, profiles.

The IO model (`io_bytes`) says what an algorithm must load and store; `count_traffic` counts, in Triton's
interpreter, what a kernel really loads and stores, and the two agree to the byte. Run as a program, this
module counts one kernel in a process of its own, which is how `counted_traffic` works on a machine whose
kernels are compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from labutils import runtime
from labutils.benchmark import RESULTS, attention_flops, dtype_name, time_call, torch_profiler, watch_interpreter

__all__ = [
    "Ceilings",
    "Traffic",
    "attention_flops",
    "compulsory_bytes",
    "count_traffic",
    "counted_traffic",
    "io_bytes",
    "measure_ceilings",
    "profile",
    "roofline_points",
    "stored_ceilings",
    "total_bytes",
]

Bytes = dict[str, dict[str, int]]
"""Bytes per tensor: {"q": {"load": 1024, "store": 0}, ...}."""


# ------------------------------------------------------------------------------------------------------------
# The IO model
# ------------------------------------------------------------------------------------------------------------


def _blocks(n: int, block: int) -> list[tuple[int, int]]:
    return [(start, min(start + block, n)) for start in range(0, n, block)]


def io_bytes(
    impl: str,
    *,
    batch: int,
    heads: int,
    seqlen: int,
    head_dim: int,
    block_m: int | None = None,
    block_n: int | None = None,
    dtype_bytes: int = 2,
    causal: bool = False,
    seqlen_k: int | None = None,
    per_tensor: bool = True,
) -> Bytes | int:
    """Bytes that a forward pass loads from and stores to global memory (HBM), by the algorithm's own loops.

    Args:
        impl: "naive": standard attention, which writes S, reads it, writes P and reads that (FlashAttention,
            Algorithm 0; a mask saves it nothing). "v1": K/V blocks outside, O (float32), l and m read and
            written in each inner step (Algorithm 1). "v2": Q blocks outside, everything else stays on chip
            (FlashAttention-2, Algorithm 1).
        batch, heads, seqlen, head_dim, seqlen_k: B, H, N_q, D and N_k (N_q where not given).
        block_m, block_n: rows of a block of Q and of K/V; needed for v1 and v2.
        dtype_bytes: size of an element of q, k, v (and of S and P in "naive").
        causal: v1 and v2 leave out the tiles that are masked as a whole; what they load is loaded whole.
        per_tensor: bytes by tensor, {"q": {"load": ..., "store": ...}, ...}; False: their sum.

    Every load counts, whether or not a cache could serve it: this is what the kernel asks for. Bytes that
    PyTorch moves around the kernel (zeroing O, l and m for v1, casting v1's O) are not in it.

    Raises:
        ValueError: unknown `impl`, or block sizes missing.

    Source: arXiv 2205.14135 (Algorithms 0 and 1) and arXiv 2307.08691 (Algorithm 1).
    """
    n_q, n_k = seqlen, seqlen if seqlen_k is None else seqlen_k
    if impl == "naive":
        row, scores = head_dim * dtype_bytes, n_q * n_k * dtype_bytes
        loads = {"q": n_q * row, "k": n_k * row, "v": n_k * row, "s": scores, "p": scores}
        stores = {"s": scores, "p": scores, "o": n_q * row}
    elif impl in ("v1", "v2"):
        if block_m is None or block_n is None:
            raise ValueError(f"io_bytes({impl!r}) needs block_m and block_n.")
        loads, stores = _tiled_io(impl, n_q, n_k, head_dim, block_m, block_n, dtype_bytes, causal)
    else:
        raise ValueError(f"impl={impl!r} has no IO model: 'naive', 'v1' or 'v2'.")
    result: Bytes = {
        name: {"load": batch * heads * loads.get(name, 0), "store": batch * heads * stores.get(name, 0)}
        for name in dict.fromkeys([*loads, *stores])
    }
    return result if per_tensor else total_bytes(result)


def _tiled_io(
    impl: str, n_q: int, n_k: int, head_dim: int, block_m: int, block_n: int, dtype_bytes: int, causal: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Loads and stores per tensor of one head."""
    row, row_fp32, one_fp32 = head_dim * dtype_bytes, head_dim * 4, 4
    q_blocks, k_blocks = _blocks(n_q, block_m), _blocks(n_k, block_n)

    def visible(rows: tuple[int, int], keys: tuple[int, int]) -> bool:
        return not causal or keys[0] <= rows[1] - 1 + n_k - n_q  # its last row sees its first key

    # How many rows of Q (keys of K) are loaded in all, counted once for each visible tile
    q_rows = sum(q[1] - q[0] for k in k_blocks for q in q_blocks if visible(q, k))
    if impl == "v1":  # K and V once; Q, O, l and m once for each tile
        kv_rows = n_k
        loads = {"q": q_rows * row, "k": kv_rows * row, "v": kv_rows * row}
        state = {"o": q_rows * row_fp32, "l": q_rows * one_fp32, "m": q_rows * one_fp32}
        return loads | state, state
    kv_rows = sum(k[1] - k[0] for q in q_blocks for k in k_blocks if visible(q, k))
    loads = {"q": n_q * row, "k": kv_rows * row, "v": kv_rows * row}
    return loads, {"o": n_q * row, "lse": n_q * one_fp32}


def total_bytes(per_tensor: Bytes) -> int:
    """Sum over tensors, loads and stores."""
    return sum(sum(kinds.values()) for kinds in per_tensor.values())


def compulsory_bytes(*, batch: int, heads: int, seqlen: int, head_dim: int, dtype_bytes: int = 2) -> int:
    """What no exact attention can avoid: q, k and v read once, o written once."""
    return 4 * batch * heads * seqlen * head_dim * dtype_bytes


# ------------------------------------------------------------------------------------------------------------
# Counting in the interpreter
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Extent:
    """The addresses that a tensor argument of a kernel may touch."""

    name: str
    first: int
    end: int
    steps: tuple[tuple[int, int], ...]
    """(bytes from one element to the next, number of elements) of each dimension, widest first."""

    def holds(self, address: int) -> bool:
        """Whether an element begins at this address: views of one storage overlap, and yet share no element."""
        rest = address - self.first
        for step, size in self.steps:
            index, rest = divmod(rest, step)
            if index >= size:
                return False
        return rest == 0


def _extent(name: str, tensor: torch.Tensor) -> _Extent:
    first, element = tensor.data_ptr(), tensor.element_size()
    if tensor.numel() == 0:
        return _Extent(name, first, first, ())
    # a dimension of one element, or one that is expanded (stride 0), leads to no other address
    steps = [(stride * element, n) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1 and stride]
    last = sum(step * (n - 1) for step, n in steps)
    return _Extent(name, first, first + last + element, tuple(sorted(steps, reverse=True)))


class Traffic:
    """Bytes that kernels loaded and stored, by kernel and tensor; filled by `count_traffic`."""

    def __init__(self) -> None:
        self.bytes: Counter[tuple[str, str, str]] = Counter()
        """(kernel, tensor, "load" or "store") -> bytes."""

    def per_tensor(self, kernel: str | None = None) -> Bytes:
        """{"q": {"load": ..., "store": ...}, ...}, of one kernel or of all together."""
        result: Bytes = {}
        for (of, tensor, kind), n in self.bytes.items():
            if kernel in (None, of):
                entry = result.setdefault(tensor, {"load": 0, "store": 0})
                entry[kind] += n
        return result

    @property
    def total(self) -> int:
        """All bytes, loads and stores."""
        return sum(self.bytes.values())

    def table(self) -> pd.DataFrame:
        """One row for each kernel and tensor: kernel, tensor, load_bytes, store_bytes."""
        keys = dict.fromkeys((kernel, tensor) for kernel, tensor, _ in self.bytes)
        return pd.DataFrame(
            [(*key, self.bytes[*key, "load"], self.bytes[*key, "store"]) for key in keys],
            columns=["kernel", "tensor", "load_bytes", "store_bytes"],
        )


@contextmanager
def count_traffic(check_bounds: bool = True) -> Iterator[Traffic]:
    """Counts the global-memory bytes of every Triton kernel launched in the block, per tensor.

        with count_traffic() as traffic:
            kernel[grid](q, k, v, ...)
        traffic.per_tensor()["k"]["load"]

    Tensors carry the names of the kernel's parameters without a trailing `_ptr`, in lower case. Lanes that a
    mask switches off are not counted. An atomic counts as a load and a store.

    Args:
        check_bounds: raise IndexError, with kernel and program, where a lane that is not masked lies outside
            every tensor of the launch. On a GPU such an access goes wrong in silence, or ends the process.

    Raises:
        RuntimeError: kernels are compiled in this process, so there is nothing to count (see
            `counted_traffic`).
        IndexError: see `check_bounds`.
    """
    if not runtime.interpreted:
        raise RuntimeError(
            "traffic is counted in Triton's interpreter, and this process compiles its kernels for the GPU: "
            "use counted_traffic(), which counts in a process of its own, or start with LABUTILS_DEVICE=cpu."
        )
    import numpy as np
    import triton.runtime.interpreter as interpreter

    traffic = Traffic()
    kernel = ""
    extents: list[_Extent] = []

    def before_launch(executor: Any, args: tuple, kwargs: dict) -> None:
        nonlocal kernel
        kernel = executor.fn.__name__
        extents.clear()
        for name, value in [*zip(executor.arg_names, args, strict=False), *kwargs.items()]:
            value = getattr(value, "base", None) if hasattr(value, "block_shape") else value  # a tensor descriptor
            if isinstance(value, torch.Tensor):
                extents.append(_extent(name.removesuffix("_ptr").lower(), value))

    def add(kinds: tuple[str, ...], pointers: Any, mask: Any) -> None:
        addresses = np.asarray(pointers.data)
        if mask is not None:
            addresses = addresses[np.broadcast_to(np.asarray(mask.data, dtype=bool), addresses.shape)]
        if addresses.size == 0:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        first, end = int(addresses.min()), int(addresses.max()) + size
        within = [e for e in extents if e.first <= first and end <= e.end]
        if len(within) > 1:  # views of one storage, such as those of a fused QKV
            within = [e for e in within if e.holds(int(addresses.flat[0]))]
        name = "|".join(dict.fromkeys(e.name for e in within))  # one tensor given twice: "k|v"
        if not name:
            if check_bounds:
                program = tuple(interpreter.interpreter_builder.grid_idx)
                raise IndexError(
                    f"{kernel}, program {program}: a {' and '.join(kinds)} of {addresses.size} elements "
                    f"touches addresses {_outside(addresses, size, extents)}. Is a mask missing?"
                )
            name = "?"
        for kind in kinds:
            traffic.bytes[kernel, name, kind] += addresses.size * size

    builder = interpreter.InterpreterBuilder
    # Plain loads and stores, and those through tensor descriptors, end in the masked ones.
    hooks: dict[str, tuple[tuple[str, ...], int, int | None]] = {  # method -> kinds, position of pointers and of mask
        "create_masked_load": (("load",), 0, 1),
        "create_masked_store": (("store",), 0, 2),
        "create_atomic_rmw": (("load", "store"), 1, 3),
        "create_atomic_cas": (("load", "store"), 0, None),
    }
    plain = {name: getattr(builder, name) for name in hooks}

    def hooked(name: str) -> Callable:
        kinds, at, mask_at = hooks[name]

        def method(self, *args, **kwargs):
            mask = None
            if mask_at is not None:
                mask = args[mask_at] if len(args) > mask_at else kwargs.get("mask")
            add(kinds, args[at], mask)
            return plain[name](self, *args, **kwargs)

        return method

    for name in hooks:
        setattr(builder, name, hooked(name))
    try:
        with watch_interpreter(before_launch):
            yield traffic
    except interpreter.InterpreterError as error:
        if isinstance(error.__cause__, IndexError):
            raise error.__cause__ from None
        raise
    finally:
        for name, method in plain.items():
            setattr(builder, name, method)


def _outside(addresses: Any, size: int, extents: list[_Extent]) -> str:
    """Says by how much an access misses the tensor that it comes nearest to."""
    if not extents:
        return "though the kernel was given no tensor"
    first, end = int(addresses.min()), int(addresses.max()) + size
    nearest = min(extents, key=lambda e: max(e.first - first, end - e.end))
    before, after = max(0, nearest.first - first), max(0, end - nearest.end)
    sides = [f"{before} bytes before the start"] * (before > 0) + [f"{after} bytes after the end"] * (after > 0)
    return f"up to {' and '.join(sides)} of `{nearest.name}`" if sides else f"between those of `{nearest.name}`"


def counted_traffic(
    kernel: str,
    *,
    batch: int = 1,
    heads: int = 1,
    seqlen: int,
    head_dim: int = 64,
    block_m: int = 64,
    block_n: int = 64,
    dtype: torch.dtype = torch.float16,
    causal: bool = False,
    seqlen_k: int | None = None,
) -> Bytes:
    """Runs labutils' own forward kernel in the interpreter and returns the bytes it loaded and stored, per
    tensor.

    Args:
        kernel: "v1" or "v2".
        batch, heads, seqlen, head_dim, seqlen_k: B, H, N_q, D and N_k (N_q where not given).
        block_m, block_n: block sizes of the launch.
        dtype: of q, k and v.
        causal: see `io_bytes`.

    In this process where kernels are interpreted anyway, else in a child process that has the interpreter
    switched on. Takes about 5 ms for each tile of block_m x block_n scores, and a few seconds to start the
    child.

    Raises:
        ValueError: an unknown kernel.
        RuntimeError: the child process failed; its last lines are in the message.
    """
    if kernel not in ("v1", "v2"):
        raise ValueError(f"kernel={kernel!r} is not known: 'v1' or 'v2'.")
    shape = {
        "kernel": kernel, "batch": batch, "heads": heads, "seqlen": seqlen, "head_dim": head_dim,
        "block_m": block_m, "block_n": block_n, "causal": causal,
        "seqlen_k": seqlen if seqlen_k is None else seqlen_k,
    }  # fmt: skip
    if runtime.interpreted:
        return _count_here(dtype=dtype, **shape)
    package_root = str(Path(__file__).resolve().parent.parent)
    search_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    child = subprocess.run(
        [sys.executable, "-m", "labutils.analysis", json.dumps({"dtype": dtype_name(dtype), **shape})],
        env=os.environ | {"LABUTILS_DEVICE": "cpu", "PYTHONPATH": search_path},
        capture_output=True,
        text=True,
    )
    if child.returncode != 0:
        raise RuntimeError(f"counting in a child process failed:\n{child.stderr.strip()[-2000:]}")
    return json.loads(child.stdout.splitlines()[-1])


def _count_here(
    *,
    kernel: str,
    dtype: torch.dtype,
    batch: int,
    heads: int,
    seqlen: int,
    seqlen_k: int,
    head_dim: int,
    block_m: int,
    block_n: int,
    causal: bool,
) -> Bytes:
    from labutils.kernels import flash_v1, flash_v2
    from labutils.kernels.launch import LaunchConfig

    q, k, v = (torch.zeros(batch, n, heads, head_dim, dtype=dtype) for n in (seqlen, seqlen_k, seqlen_k))
    scale, config = head_dim**-0.5, LaunchConfig(block_m, block_n)
    with count_traffic() as traffic:
        if kernel == "v1":
            flash_v1.forward(q, k, v, scale, causal, config)
        else:
            flash_v2.forward(q, k, v, flash_v2.Options(scale, (None, 0 if causal else None)), config)
    return traffic.per_tensor()


# ------------------------------------------------------------------------------------------------------------
# Roofline
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """What this machine can do at most, as measured on it."""

    tflops: float
    """TFLOP/s of a large matmul in `dtype`."""
    gb_per_s: float
    """GB/s (10^9 bytes) of a large copy, reads and writes counted."""
    dtype: str
    machine: str

    @property
    def ridge(self) -> float:
        """FLOP/byte at which the two ceilings meet: below it memory is the bound, above it arithmetic."""
        return 1e3 * self.tflops / self.gb_per_s

    def roof(self, intensity: float) -> float:
        """TFLOP/s attainable at an arithmetic intensity in FLOP/byte."""
        return min(self.tflops, 1e-3 * self.gb_per_s * intensity)


def measure_ceilings(*, dtype: torch.dtype | None = None, seconds: float = 0.5) -> Ceilings:
    """Measures this machine's two ceilings: a square matmul, and a copy too large for the caches.

    Args:
        dtype: of the matmul; `runtime.dtype` where not given.
        seconds: spent on each of the two.
    """
    dtype = runtime.dtype if dtype is None else dtype
    n = runtime.choose(cpu=1024, gpu=4096, large_gpu=8192)
    a, b = (torch.randn(n, n, device=runtime.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    matmul = time_call(lambda: torch.mm(a, b, out=out), seconds=seconds)
    size = runtime.choose(cpu=128, gpu=256, large_gpu=2048) * 2**20
    source = torch.zeros(size, dtype=torch.uint8, device=runtime.device)
    target = torch.empty_like(source).zero_()  # touched once, so that the timed copy does not wait for page faults
    copy = time_call(lambda: target.copy_(source), seconds=seconds)
    return Ceilings(
        tflops=2 * n**3 / matmul.median_ms / 1e9,
        gb_per_s=2 * size / copy.median_ms / 1e6,
        dtype=dtype_name(dtype),
        machine=runtime.machine,
    )


def stored_ceilings(gpu: str = "nvidia_h200") -> Ceilings:
    """The ceilings of a named GPU, as `measure_ceilings` found them there.

    Raises:
        FileNotFoundError: none are stored for this GPU.
    """
    path = RESULTS / gpu / "ceilings.json"
    if not path.exists():
        raise FileNotFoundError(f"no ceilings of {gpu!r} are stored: measure_ceilings() measures this machine's.")
    return Ceilings(**json.loads(path.read_text(encoding="utf-8")))


_IO_MODEL_OF = {"naive": "naive", "sdpa_math": "naive", "triton_v1": "v1", "tiled_v1": "v1"}  # the others: v2


def roofline_points(df: pd.DataFrame, ceilings: Ceilings, *, block_m: int = 128, block_n: int = 128) -> pd.DataFrame:
    """Where each measured forward pass stands under the roofline.

    Args:
        df: a table of `benchmark.sweep`; rows with pass "fwd" and status "ok" are used.
        ceilings: of the machine that measured it.
        block_m, block_n: the blocks assumed in the IO model of the tiled implementations.

    Returns:
        impl, seqlen, causal, tflops, flops, model_bytes, intensity (FLOP/byte by the IO model),
        intensity_compulsory (with every tensor moved once: what a cache that serves all repeated loads would
        make of it), roof_tflops (the roof at `intensity`), share (of that roof) and bound ("memory" or
        "compute"). A share above 1 says that a cache served loads which the model sends to memory.
    """
    rows = []
    for row in df[(df["pass"] == "fwd") & (df["status"] == "ok")].itertuples():
        shape = {"batch": row.batch, "heads": row.heads, "seqlen": row.seqlen, "head_dim": row.head_dim}
        size = getattr(torch, row.dtype).itemsize
        model = _IO_MODEL_OF.get(row.impl, "v2")
        moved = io_bytes(
            model,
            **shape,
            block_m=block_m,
            block_n=block_n,
            dtype_bytes=size,
            causal=row.causal,
            per_tensor=False,
        )
        flops = attention_flops(
            batch=row.batch, heads=row.heads, seqlen_q=row.seqlen, head_dim=row.head_dim, causal=row.causal
        )
        intensity, roof = flops / moved, ceilings.roof(flops / moved)
        rows.append(
            {
                "impl": row.impl,
                "seqlen": row.seqlen,
                "causal": row.causal,
                "tflops": row.tflops,
                "flops": flops,
                "model_bytes": moved,
                "intensity": intensity,
                "intensity_compulsory": flops / compulsory_bytes(**shape, dtype_bytes=size),
                "roof_tflops": roof,
                "share": row.tflops / roof,
                "bound": "memory" if intensity < ceilings.ridge else "compute",
            }
        )
    columns = [
        "impl", "seqlen", "causal", "tflops", "flops", "model_bytes", "intensity", "intensity_compulsory",
        "roof_tflops", "share", "bound",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


# ------------------------------------------------------------------------------------------------------------
# Profiling
# ------------------------------------------------------------------------------------------------------------


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


def _main() -> None:
    shape = json.loads(sys.argv[1])
    print(json.dumps(_count_here(**shape | {"dtype": getattr(torch, shape["dtype"])})))


if __name__ == "__main__":
    _main()
