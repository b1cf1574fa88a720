"""Which implementation to take for a shape, a dtype and a GPU, and why: rules, each with its reason.

The rules are read off the stored measurements of one GPU (H200) and from what each implementation can do at all; a test
holds them against those measurements. What a rule says of a GPU that nobody measured is said so in the reasons.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd
import torch

FEATURES = ("window", "alibi", "softcap", "varlen", "paged", "dropout", "score_mod")
"""What a call may need beyond a plain or causal mask."""

# implementation -> features that it has. SDPA takes any additive mask, but then as a matrix of N x N numbers.
_CAN = {
    "sdpa_cudnn": {"dropout"},
    "sdpa_flash": {"dropout"},
    "sdpa_efficient": {"dropout"},
    "flash_attn": {"window", "alibi", "softcap", "varlen", "paged", "dropout"},
    "triton_v2": {"window", "alibi", "softcap", "varlen", "paged", "dropout"},
    "flex": {"window", "alibi", "softcap", "varlen", "paged", "score_mod"},
    "naive": {"window", "alibi", "softcap", "dropout", "score_mod"},
}

SHORT = 256
"""Tokens up to which the N x N matrix is small enough that simplicity may decide."""


@dataclass(frozen=True)
class Advice:
    """What to take.

    Attributes:
        impl: a name of `benchmark.IMPLEMENTATIONS`.
        reasons: sentences, the one that decides first.
        otherwise: what to take where `impl` is not at hand, best first.
        call: how to get it.
    """

    impl: str
    reasons: tuple[str, ...]
    otherwise: tuple[str, ...]

    @property
    def call(self) -> str:
        """How to call it."""
        return _CALLS[self.impl]

    def __str__(self) -> str:
        lines = [f"{self.impl}: {self.call}", *(f"  - {reason}" for reason in self.reasons)]
        if self.otherwise:
            lines.append(f"  - where it is not at hand: {', '.join(self.otherwise)}")
        return "\n".join(lines)


_SDPA = "with torch.nn.attention.sdpa_kernel(SDPBackend.{}): scaled_dot_product_attention(...)"
_CALLS = {
    "sdpa_cudnn": _SDPA.format("CUDNN_ATTENTION"),
    "sdpa_flash": _SDPA.format("FLASH_ATTENTION"),
    "sdpa_efficient": _SDPA.format("EFFICIENT_ATTENTION"),
    "flash_attn": "flash_attn.flash_attn_func(...)",
    "triton_v2": "labutils.attention.interface.flash_attn_func(...)",
    "flex": "torch.compile(flex_attention)(...)",
    "naive": "softmax(q @ k.T * scale) @ v, as in labutils.attention.reference.naive_attention",
}


def recommend(
    *,
    seqlen: int,
    head_dim: int,
    dtype: torch.dtype | str = torch.bfloat16,
    capability: tuple[int, int] | None = None,
    causal: bool = False,
    batch: int = 1,
    heads: int = 16,
    backward: bool = False,
    features: Iterable[str] = (),
    available: Iterable[str] | None = None,
) -> Advice:
    """Which implementation to take, with reasons.

    Args:
        seqlen, head_dim, batch, heads: N, D, B, H.
        dtype: of q, k and v; torch's, or its name.
        capability: of the GPU, as (9, 0); None for a CPU.
        causal: whether the mask is on. It changes no advice: on the H200 one order is good for both.
        backward: whether gradients are needed. Only what cannot give them is left out.
        features: of `FEATURES`, what the call needs.
        available: implementations to choose from; all where not given.

    Raises:
        ValueError: an unknown feature or dtype, a size below 1, or nothing available can do it; the message says what
            failed.
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
    offered = list(_CAN) if available is None else [name for name in _CAN if name in set(available)]
    asked = (dtype, head_dim, capability, features, backward)
    excluded = {name: reason for name in _CAN if (reason := _cannot(name, *asked))}
    able = [name for name in offered if name not in excluded]
    if not able:
        why = "; ".join(f"{name}: {excluded.get(name, 'not offered')}" for name in _CAN)
        raise ValueError(f"nothing that is available can do this. {why}.")
    fastest_first = _order(dtype, capability)
    order = [name for name in fastest_first if name in able]
    impl = order[0]
    reasons = [_why(impl, dtype, capability, features)]
    matrix = batch * heads * seqlen * seqlen * dtype.itemsize / 2**30
    if impl == "naive" and seqlen > SHORT:
        reasons.append(f"it writes S and P, {matrix:.2f} GiB each: look whether they fit")
    elif matrix >= 1:
        reasons.append(f"naive attention would write S and P, {matrix:,.1f} GiB each, and read them again")
    left_out = [name for name in fastest_first if name in excluded]
    for name in left_out[: left_out.index("naive") if "naive" in left_out else None]:
        reasons.append(f"not {name}: {excluded[name]}")
    if capability is not None and capability != (9, 0):
        reasons.append("measured on an H200 alone: on this GPU let `python -m labutils bench` decide")
    return Advice(impl, tuple(reasons), tuple(order[1:3]))


def _cannot(
    name: str,
    dtype: torch.dtype,
    head_dim: int,
    capability: tuple[int, int] | None,
    features: set[str],
    backward: bool,
) -> str | None:
    """Why an implementation cannot do it, or None."""
    if lacking := features - _CAN[name]:
        return f"it has no {', '.join(sorted(lacking))}"
    if backward and "paged" in features and name in ("flash_attn", "triton_v2"):
        return "no gradient goes through a paged cache"
    if capability is None and name == "sdpa_flash" and "dropout" in features:
        return "on a CPU it has no dropout"
    if capability is None:
        return None if name in ("naive", "sdpa_flash") else "it needs a GPU"
    if name in ("sdpa_flash", "flash_attn", "sdpa_cudnn") and capability < (8, 0):
        return "it needs compute capability 8.0 or higher"
    if name in ("sdpa_flash", "flash_attn", "sdpa_cudnn") and dtype not in (torch.float16, torch.bfloat16):
        return "it takes float16 and bfloat16 alone"
    if dtype == torch.bfloat16 and capability < (8, 0):
        return "this GPU has no bfloat16"
    if name == "sdpa_cudnn" and head_dim > 128:
        return "above D = 128 it depends on the version of cuDNN whether it runs"
    if name not in ("naive", "sdpa_efficient") and head_dim > 256:
        return "its heads go up to D = 256"
    if name == "sdpa_cudnn" and head_dim % 8:  # the flash backend pads
        return "D must be a multiple of 8"
    return None


def _order(dtype: torch.dtype, capability: tuple[int, int] | None) -> list[str]:
    """All implementations, what is expected to be fastest first."""
    if capability is None:
        return ["sdpa_flash", "naive", "sdpa_cudnn", "triton_v2", "flash_attn", "flex", "sdpa_efficient"]
    if dtype == torch.float32 or capability < (8, 0):  # no tensor cores for Triton's float32 and Turing products
        return ["sdpa_efficient", "naive", "triton_v2", "flex", "flash_attn", "sdpa_flash", "sdpa_cudnn"]
    if capability >= (9, 0):
        return ["sdpa_cudnn", "triton_v2", "flex", "flash_attn", "sdpa_flash", "sdpa_efficient", "naive"]
    return ["flash_attn", "sdpa_flash", "sdpa_cudnn", "flex", "triton_v2", "sdpa_efficient", "naive"]


def _why(impl: str, dtype: torch.dtype, capability: tuple[int, int] | None, features: set[str]) -> str:
    if features:
        return f"of those that have {', '.join(sorted(features))}, the one expected to be fastest"
    if capability is None and impl == "sdpa_flash":
        return "on a CPU, SDPA's flash kernel is the one that does not write the N x N matrix"
    if capability is None:
        return "of what is offered, the one that runs without a GPU"
    if dtype == torch.float32 and impl == "sdpa_efficient":
        return "in float32, Triton's products run on the plain units; SDPA's memory-efficient kernel is made for it"
    if capability < (8, 0):
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


def judged(stored: pd.DataFrame, capability: tuple[int, int]) -> pd.DataFrame:
    """How good the advice is: for each shape and pass of stored measurements, what is recommended, against the fastest.

    Args:
        stored: a table such as attention.csv. capability: of the GPU that measured it.

    Returns:
        pass, dtype, head_dim, causal, batch, heads, seqlen, `recommended`, `fastest`, and `ratio`, the time of the one
        by that of the other (infinite where the recommended one did not run).
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
