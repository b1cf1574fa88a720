"""Which backend to take for a shape, a dtype and a GPU, and why: rules, each with its reason.

`attention.backends` says what each backend can do. The order of speed comes from the stored measurements of one GPU
(H200), and a test compares it with them. For a GPU that nobody measured, the reasons say so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd
import torch

from labutils.attention.backends import BACKENDS, FEATURES, Backend
from labutils.machine import chips

SHORT = 256
"""Up to this N the N x N matrix is small enough that simplicity may decide."""


@dataclass(frozen=True)
class Advice:
    """A recommended backend.

    Attributes:
        impl: the name of a backend, a key of `BACKENDS`.
        reasons: sentences; the first one decides.
        otherwise: what to take if `impl` is not at hand, best first.
    """

    impl: str
    reasons: tuple[str, ...]
    otherwise: tuple[str, ...]

    @property
    def call(self) -> str:
        """How to call it."""
        return BACKENDS[self.impl].call

    def __str__(self) -> str:
        lines = [f"{self.impl}: {self.call}", *(f"  - {reason}" for reason in self.reasons)]
        if self.otherwise:
            lines.append(f"  - where it is not at hand: {', '.join(self.otherwise)}")
        return "\n".join(lines)


def recommend(
    *,
    seqlen: int,
    head_dim: int,
    dtype: torch.dtype | str = torch.bfloat16,
    capability: chips.Capability | None = None,
    causal: bool = False,
    batch: int = 1,
    heads: int = 16,
    backward: bool = False,
    features: Iterable[str] = (),
    available: Iterable[str] | None = None,
) -> Advice:
    """Which backend to take, with reasons.

    Args:
        seqlen, head_dim, batch, heads: N, D, B, H.
        dtype: of q, k and v; torch's, or its name.
        capability: of the GPU, as (9, 0); None for a CPU.
        causal: whether the mask is on. It changes no advice: on the H200 one order is good for both.
        backward: whether gradients are needed. Only backends without gradients are left out.
        features: of `backends.FEATURES`, those that the call needs.
        available: names of the backends to choose from; None: all.

    Raises:
        ValueError: an unknown feature or dtype, a size below 1, or no available backend can do it; the message says
            what failed.
    """
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype={dtype!r} is none of torch's: give torch.bfloat16, or its name.")
    features = set(features)
    if unknown := features - set(FEATURES):
        raise ValueError(f"features={sorted(unknown)}: choose from {', '.join(FEATURES)}.")
    for name, size in {"seqlen": seqlen, "head_dim": head_dim, "batch": batch, "heads": heads}.items():
        if size < 1:
            raise ValueError(f"{name}={size}: it must be 1 or more.")
    advised = {backend.name: backend for backend in BACKENDS.values() if backend.advised}
    offered = set(advised if available is None else available)
    asked = (dtype, head_dim, capability, features, backward)
    excluded = {name: reason for name, backend in advised.items() if (reason := _cannot(backend, *asked))}
    able = [name for name in advised if name in offered and name not in excluded]
    if not able:
        why = "; ".join(f"{name}: {excluded.get(name, 'not offered')}" for name in advised)
        raise ValueError(f"nothing that is available can do this. {why}.")
    ranked = [name for name in _order(dtype, capability) if name in advised]
    fastest_first = [*ranked, *(name for name in advised if name not in ranked)]
    order = [name for name in fastest_first if name in able]
    impl = order[0]
    reasons = [_why(impl, dtype, capability, features) if impl in ranked else _NOT_RANKED]
    matrix = batch * heads * seqlen * seqlen * dtype.itemsize / 2**30
    if impl == "naive" and seqlen > SHORT:
        reasons.append(f"it writes S and P, {matrix:.2f} GiB each: look whether they fit")
    elif matrix >= 1:
        reasons.append(f"naive attention would write S and P, {matrix:,.1f} GiB each, and read them again")
    left_out = [name for name in fastest_first if name in excluded]
    for name in left_out[: left_out.index("naive") if "naive" in left_out else None]:
        reasons.append(f"not {name}: {excluded[name]}")
    if capability is not None and capability != chips.HOPPER:
        reasons.append("measured on an H200 alone: on this GPU let `python -m labutils bench` decide")
    return Advice(impl, tuple(reasons), tuple(order[1:3]))


def _cannot(
    backend: Backend,
    dtype: torch.dtype,
    head_dim: int,
    capability: chips.Capability | None,
    features: set[str],
    backward: bool,
) -> str | None:
    """Why a backend cannot do it; None if it can."""
    if lacking := features - backend.can:
        return f"it has no {', '.join(sorted(lacking))}"
    if backward and not backend.backward:
        return "it has no backward pass"
    if backward and "paged" in features & backend.forward_only:
        return "no gradient goes through a paged cache"
    if backward and (lacking := features & backend.forward_only):
        return f"no gradient goes through its {', '.join(sorted(lacking))}"
    if capability is None and (lacking := features & backend.lacks_on_cpu):
        return f"on a CPU it has no {', '.join(sorted(lacking))}"
    if capability is None:
        return None if backend.on_cpu == "compiled" else "it needs a GPU"
    lowest = backend.lowest_capability
    if lowest is not None and capability < lowest:
        return f"it needs compute capability {chips.dotted(lowest)} or higher"
    if str(dtype).removeprefix("torch.") not in backend.dtypes:
        return f"it takes {' and '.join(backend.dtypes)} only"
    if dtype == torch.bfloat16 and capability < chips.BFLOAT16:
        return "this GPU has no bfloat16"
    if backend.largest_head_dim is not None and head_dim > backend.largest_head_dim:
        return backend.head_dim_note or f"its heads go up to D = {backend.largest_head_dim}"
    if head_dim % backend.head_dim_multiple:
        return f"D must be a multiple of {backend.head_dim_multiple}"
    return None


_NOT_RANKED = "the rules do not know how fast it is, and nothing else that is offered can do this"


def _order(dtype: torch.dtype, capability: chips.Capability | None) -> list[str]:
    """The backends whose speed the rules know, the one that is expected to be fastest first."""
    if capability is None:
        return ["sdpa_flash", "naive", "sdpa_cudnn", "triton_v2", "flash_attn", "flex", "sdpa_efficient"]
    if dtype == torch.float32 or capability < chips.TENSOR_CORES:  # Triton multiplies on the plain units
        return ["sdpa_efficient", "naive", "triton_v2", "flex", "flash_attn", "sdpa_flash", "sdpa_cudnn"]
    if capability >= chips.HOPPER:
        return ["sdpa_cudnn", "triton_v2", "flex", "flash_attn", "sdpa_flash", "sdpa_efficient", "naive"]
    return ["flash_attn", "sdpa_flash", "sdpa_cudnn", "flex", "triton_v2", "sdpa_efficient", "naive"]


def _why(impl: str, dtype: torch.dtype, capability: chips.Capability | None, features: set[str]) -> str:
    if features:
        return f"of those that have {', '.join(sorted(features))}, the one expected to be fastest"
    if capability is None and impl == "sdpa_flash":
        return "on a CPU, SDPA's flash kernel is the one that does not write the N x N matrix"
    if capability is None:
        return "of what is offered, the one that runs without a GPU"
    if dtype == torch.float32 and impl == "sdpa_efficient":
        return "in float32, Triton's products run on the plain units; SDPA's memory-efficient kernel is made for it"
    if capability < chips.TENSOR_CORES:
        return "before Ampere, flash-attn does not run and Triton emits no tensor-core instruction"
    if impl == "sdpa_cudnn":
        return "of those measured on an H200 the fastest, or close to it, at nearly all shapes"
    return "of what can do this, the one expected to be fastest on this generation of GPUs"


PITFALLS = pd.DataFrame(
    [
        (
            "an explicit `attn_mask` for a causal mask",
            "the flash backend refuses it: `sdpa_efficient` or math stands in the profile",
            "`is_causal=True`, or a window by flash-attn or FlexAttention",
        ),
        (
            "float32 inputs",
            "no flash kernel in the profile: SDPA takes the memory-efficient one, or math",
            "autocast, or bfloat16 weights",
        ),
        (
            "no backend pinned",
            "the same line is fast on one machine and slow on another",
            "`sdpa_kernel(...)` around it, which raises and says why",
        ),
        (
            "`GPT2Config(use_flash_attn=True)`",
            "nothing changes: it is stored and ignored",
            "`attn_implementation=...`",
        ),
        (
            "causal, and N_q is not N_k",
            "wrong numbers beside a KV cache: SDPA aligns the mask to the top left",
            "flash-attn's interface, which aligns to the bottom right",
        ),
        (
            "timing without warm-up or synchronisation",
            "the first call takes seconds, or every call a few microseconds",
            "`benchmark.time_call`",
        ),
        (
            "many small calls",
            "GPU time per call far below wall time",
            "a CUDA graph, `torch.compile`, larger batches",
        ),
        (
            "a new length in each call",
            "FlexAttention or torch.compile compiles anew",
            "pad to a few lengths, or `dynamic=True`",
        ),
        (
            "batch 1, few heads, one query",
            "most multiprocessors idle, in decoding above all",
            "a kernel that splits the keys",
        ),
    ],
    columns=["pitfall", "symptom", "remedy"],
)
"""What goes wrong, how it shows, what helps."""


def against_fastest(stored: pd.DataFrame, capability: chips.Capability) -> pd.DataFrame:
    """How good the advice is: the recommended backend against the fastest, for each shape and pass that was measured.

    Args:
        stored: a table such as attention.csv. capability: of the GPU that measured it.

    Returns:
        pass, dtype, head_dim, causal, batch, heads, seqlen, `recommended`, `fastest`, and `ratio`, the time of the
        recommended backend by the time of the fastest (infinite if the recommended backend did not run).
    """
    keys = ["pass", "dtype", "head_dim", "causal", "batch", "heads", "seqlen"]
    rows = []
    for key, group in stored.groupby(keys, sort=False):
        shape = dict(zip(keys, key, strict=True))
        which = shape.pop("pass")
        ms = group[group["status"] == "ok"].set_index("impl")["ms"]
        if ms.empty:
            continue
        advice = recommend(**shape, capability=capability, backward=which == "bwd")
        ratio = ms.get(advice.impl, float("inf")) / ms.min()
        rows.append([*key, advice.impl, ms.idxmin(), ratio])
    return pd.DataFrame(rows, columns=[*keys, "recommended", "fastest", "ratio"])
