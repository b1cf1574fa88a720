"""Measures one point of a sweep: one implementation at one shape. A failure is a result, too."""

from __future__ import annotations

import gc
import math
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from labutils.attention import reference
from labutils.attention.backends import Attention, Unsupported
from labutils.benchmark.timing import INTERPRETED, overhead_bound, peak_memory_mib, time_call, watch_interpreter
from labutils.machine import runtime

INTERPRETER_TILES = 64  # the interpreter may compute this many tiles of 128 x 128 scores for an error: about a second
INTERPRETER_BACKWARD = 4  # forward and backward together take as long there as this many forward passes
ORACLE_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}  # float64 scores that the oracle holds at a time

KEY = ("impl", "pass", "dtype", "head_dim", "causal", "batch", "heads", "seqlen")
"""The columns that identify a row of a table of measurements: the fields of `Point`."""
NOT_REACHED = {"status": "unsupported", "reason": "not reached before the sweep was interrupted"}
"""The row of a point that an interrupted sweep did not reach."""


class Point(NamedTuple):
    """Identifies a row of attention.csv: the columns `KEY`, in their order there."""

    impl: str
    which: str
    """The column `pass`: "fwd" or "bwd". Python keeps its name for itself."""
    dtype: str
    head_dim: int
    causal: bool
    batch: int
    heads: int
    seqlen: int

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Point:
        """The point of a row of a table."""
        values = (record[name] for name in KEY)
        return cls(*(value.item() if hasattr(value, "item") else value for value in values))

    def as_dict(self) -> dict[str, Any]:
        """Column -> value."""
        return dict(zip(KEY, self, strict=True))

    def inputs(self) -> tuple:
        """dtype, D, mask, B, H and N: the same for all points that share q, k and v."""
        return tuple(self[2:])

    def but_size(self, which: str | None = None) -> tuple:
        """All but batch and length: the same for points that differ only in these two."""
        return (self.impl, which or self.which, self.dtype, self.head_dim, self.causal, self.heads)


class Oracle:
    """Exact output and gradients of one set of inputs, for all implementations. Computed when first asked for.

    k and v may have fewer heads than q and dout. The oracle works through heads and blocks of rows, so that no N x N
    matrix in float64 ever exists. It gives up after `seconds`.
    """

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, *, causal: bool, seconds: float
    ):
        self.inputs, self.dout, self.causal, self.seconds = (q, k, v), dout, causal, seconds
        self.gave_up = seconds <= 0
        self._kept: dict[str, tuple[torch.Tensor, ...] | None] = {}

    def get(self, which: str) -> tuple[torch.Tensor, ...] | None:
        """(out,) for "fwd", (dq, dk, dv) for "bwd", in float64; None if it takes too long or too much memory."""
        if which not in self._kept:
            try:
                self._kept[which] = None if self.gave_up else self._compute(backward=which == "bwd")
            except RuntimeError as error:  # float64 takes more memory than the implementations
                if not is_out_of_memory(error):
                    raise
                self._kept[which] = None
        return self._kept[which]

    def _compute(self, backward: bool) -> tuple[torch.Tensor, ...] | None:
        q, k, v = self.inputs
        batch, n, heads, _ = q.shape
        rows = max(1, ORACLE_BYTES[q.device.type] // (8 * batch * n))
        result = tuple(
            torch.zeros(t.shape, dtype=torch.float64, device=t.device) for t in ((q, k, v) if backward else (q,))
        )
        began = None
        group = heads // k.shape[2]
        for head in range(heads):
            one, shared = slice(head, head + 1), slice(head // group, head // group + 1)
            for start in range(0, n, rows):
                stop = min(start + rows, n)
                # With the mask aligned to the bottom right, rows up to `stop` against keys up to `stop` are
                # causal too.
                keys = slice(0, stop if self.causal else n)
                part = [t.detach().double().requires_grad_(backward) for t in
                        (q[:, start:stop, one], k[:, keys, shared], v[:, keys, shared])]  # fmt: skip
                with torch.set_grad_enabled(backward):
                    out = reference.exact_attention(*part, causal=self.causal)
                if backward:
                    gradients = torch.autograd.grad(out, part, self.dout[:, start:stop, one].double())
                    places = ((slice(start, stop), one), (keys, shared), (keys, shared))
                    for total, (at, h), gradient in zip(result, places, gradients, strict=True):
                        total[:, at, h] += gradient
                else:
                    result[0][:, start:stop, one] = out
                if q.device.type == "cuda":
                    torch.cuda.synchronize()
                if began is None:  # the clock starts after the first block, which also loads libraries
                    began = time.perf_counter()
                if time.perf_counter() - began > self.seconds:
                    self.gave_up = True
                    return None
        return result


def _max_error(results: Sequence[torch.Tensor], exact: Sequence[torch.Tensor] | None) -> float:
    """max |result - exact| over all tensors; inf if a result is not a number; NaN without an oracle."""
    if exact is None:
        return math.nan
    errors = [(r.detach().double() - e).abs().max().item() for r, e in zip(results, exact, strict=True)]
    return math.inf if any(map(math.isnan, errors)) else max(errors)


class _Call:
    """One implementation on one set of inputs, forward or backward."""

    def __init__(
        self,
        attention: Attention,
        which: str,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dout: torch.Tensor,
        *,
        causal: bool,
    ):
        self.attention, self.which, self.causal = attention, which, causal
        self.inputs, self.dout = (q, k, v), dout
        self.leaves = [t.detach().requires_grad_() for t in (q, k, v)]

    def forward(self) -> torch.Tensor:
        with torch.no_grad():
            return self.attention(*self.inputs, causal=self.causal, softmax_scale=None)

    def whole(self) -> Sequence[torch.Tensor]:
        """The results of the pass: out, or the three gradients after a forward pass."""
        if self.which == "fwd":
            return (self.forward(),)
        out = self.attention(*self.leaves, causal=self.causal, softmax_scale=None)
        if not out.requires_grad:
            raise Unsupported("it has no backward pass")
        return torch.autograd.grad(out, self.leaves, self.dout)

    def timed(self) -> Callable[[], Any]:
        """The function to time: the forward, or only the backward, again and again through the graph of one forward."""
        if self.which == "fwd":
            return self.forward
        out = self.attention(*self.leaves, causal=self.causal, softmax_scale=None)
        return lambda: torch.autograd.grad(out, self.leaves, self.dout, retain_graph=True)


def _measure(call: _Call, oracle: Oracle | None, seconds: float, warm_up: float | None) -> dict:
    """Measures one round of a point. The first round has an oracle, and also measures error and memory.

    Raises what the implementation raises.
    """
    if oracle is None:
        timing = time_call(call.timed(), seconds=seconds, warm_up=warm_up)
        return {"ms": timing.median_ms, "spread_ms": timing.spread_ms, "status": "ok", "reason": ""}

    batch, n, heads, _ = call.inputs[0].shape
    tiles = batch * heads * math.ceil(n / 128) ** 2 * (1 if call.which == "fwd" else INTERPRETER_BACKWARD)
    interpreted = False

    def before_launch(*_: Any) -> None:
        nonlocal interpreted
        interpreted = True
        if tiles > INTERPRETER_TILES:
            raise Unsupported(INTERPRETED)

    # The first call is the probe: it compiles, and shows whether the implementation can run at all.
    with watch_interpreter(before_launch):
        results = call.whole()
    error = _max_error(results, oracle.get(call.which))
    del results
    if interpreted:
        return {"status": "unsupported", "reason": INTERPRETED, "max_error": error}

    peak = peak_memory_mib(call.whole)
    timed = call.timed()
    timing = time_call(timed, seconds=seconds, warm_up=warm_up)
    return {
        "ms": timing.median_ms,
        "spread_ms": timing.spread_ms,
        "peak_mib": peak,
        "max_error": error,
        "status": "ok",
        "reason": "",
        "overhead_bound": overhead_bound(timed, timing.median_ms),
    }


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    # PyTorch's CPU allocator raises a bare RuntimeError
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


class DeviceLost(RuntimeError):
    """The GPU computes nothing more in this process. The message is what the GPU reported.

    `row` is the row of the point that was being measured; None if there was no such point.
    """

    def __init__(self, message: str, row: dict | None = None):
        super().__init__(message)
        self.row = row


def device_error() -> str | None:
    """The error that the GPU reports when the host waits for it; None if there is none, and on a CPU.

    After an illegal access, or after an assertion that failed on the device, every later call in the process returns
    the same error (https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html). After a launch that was
    refused, waiting succeeds.
    """
    if runtime.device.type != "cuda":
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:  # torch.AcceleratorError is one
        return _one_line(error)
    return None


def _one_line(error: BaseException, warned: Iterable[warnings.WarningMessage] = ()) -> str:
    parts = [str(error), *(str(w.message) for w in warned)]
    text = re.sub(r" \(Triggered internally at [^)]*\)", "", " ".join(" ".join(parts).split()))  # a path of PyTorch's
    name = "" if isinstance(error, Unsupported) else f"{type(error).__name__}: "
    return name + (text if len(text) <= 400 else text[:397] + "...")


def attempt(
    attention: Attention,
    which: str,
    tensors: Sequence[torch.Tensor],
    causal: bool,
    oracle: Oracle | None,
    *,
    seconds: float,
    warm_up: float | None = None,
) -> dict:
    """Measures one round of a point. A failure becomes a row, too.

    Args:
        attention: the implementation.
        which: "fwd" or "bwd".
        tensors: q, k, v and the gradient of the output, (B, N, H, D); k and v may have fewer heads.
        causal: lower-triangular mask.
        oracle: exact results for these tensors, in the first round; None in later rounds, which only time.
        seconds, warm_up: of the repeats, and before them, as for `time_call`.

    Returns:
        `status` and `reason`, and those of ms, spread_ms, peak_mib, max_error and overhead_bound that were measured.

    Raises:
        DeviceLost: after this failure the GPU computes nothing more in this process.
    """
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")  # warnings of SDPA give the reason why a backend refused
        try:
            row = _measure(_Call(attention, which, *tensors, causal=causal), oracle, seconds, warm_up)
        except Exception as error:
            status = "oom" if is_out_of_memory(error) else "unsupported"
            row = {"status": status, "reason": _one_line(error, warned if status == "unsupported" else ())}
    if row["status"] == "ok":
        for warning in warned:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    else:
        gc.collect()  # the exception is gone here, so its frames no longer hold the tensors
        lost = device_error()
        if lost is not None:
            raise DeviceLost(lost, {"status": "unsupported", "reason": row["reason"]})
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
    return row
