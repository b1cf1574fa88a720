"""Bytes that kernels move to and from global memory: modelled from the algorithms, and counted in Triton's interpreter.

`io_bytes` models and `counted_traffic` counts. The two agree to the byte, for the forward passes of FlashAttention-1
and 2 and for both kernels of the backward pass. A process that compiles its kernels counts in a child process, which
interprets them.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, overload

import pandas as pd
import torch

from labutils.analysis.interpreting import interpreting_python
from labutils.benchmark import dtype_name, watch_interpreter
from labutils.machine import runtime

Bytes = dict[str, dict[str, int]]
"""Bytes per tensor: {"q": {"load": 1024, "store": 0}, ...}."""

TILED = ("v1", "v2", "dq", "dkdv")
"""The tiled kernels, which can be modelled and counted: both forward passes, and the two of the backward pass."""


# ------------------------------------------------------------------------------------------------------------
# The IO model
# ------------------------------------------------------------------------------------------------------------


def _blocks(n: int, block: int) -> list[tuple[int, int]]:
    return [(start, min(start + block, n)) for start in range(0, n, block)]


@overload
def io_bytes(
    impl: str, *, batch: int, heads: int, seqlen: int, head_dim: int, block_m: int | None = ...,
    block_n: int | None = ..., dtype_bytes: int = ..., causal: bool = ..., seqlen_k: int | None = ...,
    per_tensor: Literal[True] = ...,
) -> Bytes: ...  # fmt: skip


@overload
def io_bytes(
    impl: str, *, batch: int, heads: int, seqlen: int, head_dim: int, block_m: int | None = ...,
    block_n: int | None = ..., dtype_bytes: int = ..., causal: bool = ..., seqlen_k: int | None = ...,
    per_tensor: Literal[False],
) -> int: ...  # fmt: skip


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
    """Bytes that a pass loads from and stores to global memory (HBM), by the algorithm's own loops.

    Args:
        impl: "naive": standard attention, which writes S, reads it, writes P and reads that (FlashAttention,
            Algorithm 0; a mask saves it nothing). "v1": K/V blocks outside; each inner step reads and writes O
            (float32), l and m (Algorithm 1). "v2": Q blocks outside; everything else stays on chip (FlashAttention-2,
            Algorithm 1). "dq" and "dkdv": the two kernels of labutils' backward pass of v2. A program of the first has
            a block of Q, O and dO and streams K and V. It also writes L log2 e and Δ, a float32 each for a row. A
            program of the second has a block of K and V, and streams Q, dO and these two.
        batch, heads, seqlen, head_dim, seqlen_k: B, H, N_q, D and N_k (None for N_q).
        block_m, block_n: rows of a block of Q and of K/V; needed for all but "naive".
        dtype_bytes: size of an element of q, k, v (and of S and P in "naive").
        causal: all but "naive" leave out the tiles that are fully masked. Other tiles are loaded whole.
        per_tensor: bytes by tensor, {"q": {"load": ..., "store": ...}, ...}; False: their sum.

    Every load counts, also if a cache could serve it: these are the bytes that the kernel asks for. Bytes that PyTorch
    moves around the kernel (zeroing O, l and m for v1, casting v1's O) do not count.

    Raises:
        ValueError: unknown `impl`, or block sizes missing.

    Source: arXiv 2205.14135 (Algorithms 0 and 1) and arXiv 2307.08691 (Algorithms 1 and 2).
    """
    n_q, n_k = seqlen, seqlen if seqlen_k is None else seqlen_k
    if impl == "naive":
        row, scores = head_dim * dtype_bytes, n_q * n_k * dtype_bytes
        loads = {"q": n_q * row, "k": n_k * row, "v": n_k * row, "s": scores, "p": scores}
        stores = {"s": scores, "p": scores, "o": n_q * row}
    elif impl in TILED:
        if block_m is None or block_n is None:
            raise ValueError(f"io_bytes({impl!r}) needs block_m and block_n.")
        loads, stores = _tiled_io(impl, n_q, n_k, head_dim, block_m, block_n, dtype_bytes, causal)
    else:
        raise ValueError(f"impl={impl!r} has no IO model: 'naive', {', '.join(map(repr, TILED))}.")
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

    tiles = [(q, k) for q in q_blocks for k in k_blocks if visible(q, k)]
    # Rows of Q, and of K, that are loaded in all if each tile loads its own
    q_rows = sum(q[1] - q[0] for q, _ in tiles)
    k_rows = sum(k[1] - k[0] for _, k in tiles)
    if impl == "v1":  # K and V once; Q, O, l and m once for each tile
        loads = {"q": q_rows * row, "k": n_k * row, "v": n_k * row}
        state = {"o": q_rows * row_fp32, "l": q_rows * one_fp32, "m": q_rows * one_fp32}
        return loads | state, state
    if impl == "v2":  # Q once; K and V once for each tile
        loads = {"q": n_q * row, "k": k_rows * row, "v": k_rows * row}
        return loads, {"o": n_q * row, "lse": n_q * one_fp32}
    if impl == "dq":
        loads = {"q": n_q * row, "k": k_rows * row, "v": k_rows * row, "o": n_q * row, "do": n_q * row}
        loads["lse"] = n_q * one_fp32
        return loads, {"lse2": n_q * one_fp32, "delta": n_q * one_fp32, "dq": n_q * row}
    # dK and dV: each tile loads a whole block of L log2 e and Δ, also past the end of the sequence
    per_row = len(tiles) * block_m * one_fp32
    loads = {"q": q_rows * row, "k": n_k * row, "v": n_k * row, "do": q_rows * row, "lse2": per_row, "delta": per_row}
    return loads, {"dk": n_k * row, "dv": n_k * row}


def total_bytes(per_tensor: Bytes) -> int:
    """The sum over tensors, loads and stores."""
    return sum(sum(kinds.values()) for kinds in per_tensor.values())


def compulsory_bytes(*, batch: int, heads: int, seqlen: int, head_dim: int, dtype_bytes: int = 2) -> int:
    """The bytes that exact attention cannot avoid: q, k and v read once, o written once, each (B, N, H, D).

    Args:
        batch, heads, seqlen, head_dim: B, H, N and D.
        dtype_bytes: size of one number.
    """
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
        """Whether an element of the tensor begins here. Views of one storage may overlap without sharing an element."""
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
    # a dimension of one element, or an expanded one (stride 0), adds no address
    steps = [(stride * element, n) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1 and stride]
    last = sum(step * (n - 1) for step, n in steps)
    return _Extent(name, first, first + last + element, tuple(sorted(steps, reverse=True)))


class Traffic:
    """Bytes that kernels loaded and stored, by kernel and tensor. `count_traffic` fills it."""

    def __init__(self) -> None:
        self.bytes: Counter[tuple[str, str, str]] = Counter()
        """(kernel, tensor, "load" or "store") -> bytes."""

    def per_tensor(self, kernel: str | None = None) -> Bytes:
        """{"q": {"load": ..., "store": ...}, ...} of one kernel, or of all together if it is None."""
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


class _Accesses:
    """Finds the tensor of each access of a launch, and adds its bytes to the traffic."""

    def __init__(self, traffic: Traffic, check_bounds: bool) -> None:
        self.traffic, self.check_bounds = traffic, check_bounds
        self.kernel = ""
        self.extents: list[_Extent] = []

    def before_launch(self, executor: Any, args: tuple, kwargs: dict) -> None:
        """Remembers the kernel's name and the addresses of its tensors."""
        self.kernel = executor.fn.__name__
        self.extents.clear()
        for name, value in [*zip(executor.arg_names, args, strict=False), *kwargs.items()]:
            value = getattr(value, "base", None) if hasattr(value, "block_shape") else value  # a tensor descriptor
            if isinstance(value, torch.Tensor):
                self.extents.append(_extent(name.removesuffix("_ptr").lower(), value))

    def add(self, kinds: tuple[str, ...], pointers: Any, mask: Any) -> None:
        """Counts one access by a program: as "load", as "store" or as both.

        Raises:
            IndexError: bounds are checked, and the access is outside every tensor.
        """
        import numpy as np
        from triton.runtime.interpreter import interpreter_builder

        addresses = np.asarray(pointers.data)
        if mask is not None:
            addresses = addresses[np.broadcast_to(np.asarray(mask.data, dtype=bool), addresses.shape)]
        if addresses.size == 0:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        first, end = int(addresses.min()), int(addresses.max()) + size
        within = [e for e in self.extents if e.first <= first and end <= e.end]
        if len(within) > 1:  # views of one storage, such as those of a fused QKV
            within = [e for e in within if e.holds(int(addresses.flat[0]))]
        name = "|".join(dict.fromkeys(e.name for e in within))  # one tensor given twice: "k|v"
        if not name:
            if self.check_bounds:
                program = tuple(interpreter_builder.grid_idx)
                raise IndexError(
                    f"{self.kernel}, program {program}: a {' and '.join(kinds)} of {addresses.size} elements "
                    f"touches addresses {_outside(addresses, size, self.extents)}. Is a mask missing?"
                )
            name = "?"
        for kind in kinds:
            self.traffic.bytes[self.kernel, name, kind] += addresses.size * size


@contextmanager
def count_traffic(check_bounds: bool = True) -> Iterator[Traffic]:
    """Counts the global-memory bytes of every Triton kernel launched in the block, per tensor.

        with count_traffic() as traffic:
            kernel[grid](q, k, v, ...)
        traffic.per_tensor()["k"]["load"]

    Tensors have the names of the kernel's parameters in lower case, without a trailing `_ptr`. Masked lanes do not
    count. An atomic counts as a load and a store.

    Args:
        check_bounds: whether to raise IndexError, with kernel and program, if a lane that is not masked is outside
            every tensor of the launch. On a GPU such an access goes wrong silently, or ends the process.

    Raises:
        RuntimeError: this process compiles its kernels, so nothing can be counted (see `counted_traffic`).
        IndexError: see `check_bounds`.
    """
    if not runtime.interpreted:
        raise RuntimeError(
            "traffic is counted in Triton's interpreter, and this process compiles its kernels for the GPU: "
            "use counted_traffic(), which counts in a process of its own, or start with LABUTILS_DEVICE=cpu."
        )
    import triton.runtime.interpreter as interpreter

    traffic = Traffic()
    accesses = _Accesses(traffic, check_bounds)
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

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            mask = None
            if mask_at is not None:
                mask = args[mask_at] if len(args) > mask_at else kwargs.get("mask")
            accesses.add(kinds, args[at], mask)
            return plain[name](self, *args, **kwargs)

        return method

    for name in hooks:
        setattr(builder, name, hooked(name))
    try:
        with watch_interpreter(accesses.before_launch):
            yield traffic
    except interpreter.InterpreterError as error:
        if isinstance(error.__cause__, IndexError):
            raise error.__cause__ from None
        raise
    finally:
        for name, method in plain.items():
            setattr(builder, name, method)


def _outside(addresses: Any, size: int, extents: list[_Extent]) -> str:
    """Describes by how much an access misses the nearest tensor."""
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
    """Runs a kernel of labutils in the interpreter and returns the bytes that it loaded and stored, per tensor.

    If this process compiles its kernels, the kernel runs in a child process. Counting takes about 5 ms for each tile of
    block_m x block_n scores. Starting the child takes a few seconds.

    Args:
        kernel: "v1", "v2", "dq" or "dkdv", as for `io_bytes`. For "dkdv" both kernels of the backward pass run, since
            the second reads what the first writes.
        batch, heads, seqlen, head_dim, seqlen_k: B, H, N_q, D and N_k (None for N_q).
        block_m, block_n: block sizes of the launch.
        dtype: of q, k and v.
        causal: as for `io_bytes`.

    Raises:
        ValueError: an unknown kernel.
        RuntimeError: the child process failed; the message has its last lines.
    """
    if kernel not in TILED:
        raise ValueError(f"kernel={kernel!r} is not known: one of {', '.join(map(repr, TILED))}.")
    shape: dict[str, Any] = {
        "kernel": kernel, "batch": batch, "heads": heads, "seqlen": seqlen, "head_dim": head_dim,
        "block_m": block_m, "block_n": block_n, "causal": causal,
        "seqlen_k": seqlen if seqlen_k is None else seqlen_k,
    }  # fmt: skip
    if runtime.interpreted:
        return _count_here(dtype=dtype, **shape)
    program = ["-c", _CHILD, json.dumps({"dtype": dtype_name(dtype), **shape})]
    child = subprocess.run(**interpreting_python(program), capture_output=True)
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
    from labutils.attention.kernels import flash_v1, flash_v2
    from labutils.attention.kernels.launch_config import LaunchConfig
    from labutils.attention.kernels.options import Options

    if kernel in ("dq", "dkdv"):
        backward = _counted_backward(batch, heads, seqlen, seqlen_k, head_dim, block_m, block_n, dtype, causal)
        return backward.per_tensor(f"_{kernel}_kernel")
    q, k, v = (torch.zeros(batch, n, heads, head_dim, dtype=dtype) for n in (seqlen, seqlen_k, seqlen_k))
    scale, config = head_dim**-0.5, LaunchConfig(block_m, block_n)
    with count_traffic() as traffic:
        if kernel == "v1":
            flash_v1.forward(q, k, v, scale, causal, config)
        else:
            flash_v2.forward(q, k, v, Options(scale, window_right=0 if causal else None), config)
    return traffic.per_tensor()


@functools.lru_cache(maxsize=8)  # both kernels of a backward pass are usually asked for, one after the other
def _counted_backward(
    batch: int,
    heads: int,
    seqlen: int,
    seqlen_k: int,
    head_dim: int,
    block_m: int,
    block_n: int,
    dtype: torch.dtype,
    causal: bool,
) -> Traffic:
    """The traffic of both kernels of the backward pass."""
    from labutils.attention.kernels import flash_v2_backward
    from labutils.attention.kernels.launch_config import LaunchConfig
    from labutils.attention.kernels.options import Options

    q, out, dout = (torch.zeros(batch, seqlen, heads, head_dim, dtype=dtype) for _ in range(3))
    k, v = (torch.zeros(batch, seqlen_k, heads, head_dim, dtype=dtype) for _ in range(2))
    lse = torch.zeros(batch, heads, seqlen)
    options = Options(head_dim**-0.5, window_right=0 if causal else None)
    config = LaunchConfig(block_m, block_n)
    with count_traffic() as traffic:
        flash_v2_backward.backward(dout, q, k, v, out, lse, options, {"dq": config, "dkdv": config})
    return traffic


_CHILD = "from labutils.analysis import traffic; traffic._main()"


def _main() -> None:
    """The child process: counts the kernel that its argument names, and prints the bytes."""
    shape = json.loads(sys.argv[1])
    print(json.dumps(_count_here(**shape | {"dtype": getattr(torch, shape["dtype"])})))
