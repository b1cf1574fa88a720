"""The implementations of attention that are compared, by name and with one signature."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from functools import cache, lru_cache, partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from labutils.attention import interface, reference

Attention = Callable[..., torch.Tensor]
"""f(q, k, v, *, causal, softmax_scale) -> out; q and out (B, N_q, H, D), k and v (B, N_k, H_kv, D)."""


class Unsupported(RuntimeError):
    """The implementation cannot do what was asked; the message says why."""


def _naive(q, k, v, *, causal=False, softmax_scale=None):
    return reference.naive_attention(q, k, v, causal=causal, softmax_scale=softmax_scale)


def _sdpa(backend: SDPBackend, q, k, v, *, causal=False, softmax_scale=None):
    if causal and q.shape[1] != k.shape[1]:
        raise Unsupported(
            "scaled_dot_product_attention(is_causal=True) aligns the mask to the top left, the others to the "
            "bottom right: compare at N_q = N_k."
        )
    # With one backend allowed PyTorch runs that one or raises; it does not choose another.
    with sdpa_kernel(backend):
        out = torch.nn.functional.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)),  # (B, N, H, D) -> (B, H, N, D), views
            is_causal=causal,
            scale=softmax_scale,
            enable_gqa=k.shape[2] != q.shape[2],
        )
    return out.transpose(1, 2)


def _flash_attn(q, k, v, *, causal=False, softmax_scale=None):
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise Unsupported(f"the flash-attn package cannot be imported: {error}") from error
    return flash_attn_func(q, k, v, softmax_scale=softmax_scale, causal=causal)


@cache
def _compiled_flex(signature: tuple) -> Callable[..., torch.Tensor]:
    """FlexAttention, compiled for one signature (shapes, dtype, ...) and kept."""
    import torch._functorch.config as functorch_config
    from torch.nn.attention.flex_attention import flex_attention

    # A donated buffer is overwritten by the backward pass, which could then run only once: timing runs it many times.
    # For good, not for this call: PyTorch asks again when the backward runs.
    functorch_config.donated_buffer = False

    def call(q, k, v, block_mask, scale):
        return flex_attention(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=k.shape[1] != q.shape[1])

    # torch.compile keeps its graphs with the code object, eight of them, and then refuses: a sweep has more
    # shapes than that, so each signature gets a code object of its own.
    call = types.FunctionType(call.__code__.replace(co_name="flex"), globals(), "flex", None, call.__closure__)
    return torch.compile(call, fullgraph=True, dynamic=False)


@lru_cache(maxsize=8)
def _flex_causal_mask(n_q: int, n_k: int, device: str):
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b, h, i, j):
        return j <= i + n_k - n_q

    return create_block_mask(visible, None, None, n_q, n_k, device=device)


def _flex(q, k, v, *, causal=False, softmax_scale=None):
    if q.device.type != "cuda":
        raise Unsupported("compiled FlexAttention is measured on a GPU: on a CPU it has no backward pass.")
    grad = torch.is_grad_enabled() and q.requires_grad
    mask = _flex_causal_mask(q.shape[1], k.shape[1], str(q.device)) if causal else None
    compiled = _compiled_flex((q.shape, k.shape, q.stride(), q.dtype, str(q.device), causal, grad, softmax_scale))
    out = compiled(*(t.transpose(1, 2) for t in (q, k, v)), mask, softmax_scale)
    return out.transpose(1, 2)


def _triton_v1(q, k, v, *, causal=False, softmax_scale=None):
    return interface.flash_attn_v1_func(q, k, v, softmax_scale=softmax_scale, causal=causal)


def _triton_v2(q, k, v, *, causal=False, softmax_scale=None):
    return interface.flash_attn_func(q, k, v, softmax_scale=softmax_scale, causal=causal)


def _tiled_v1(q, k, v, *, causal=False, softmax_scale=None):
    if torch.is_grad_enabled() and q.requires_grad:
        raise Unsupported("the loop of v1 overwrites O, l and m in each step, which autograd cannot go back through")
    return reference.tiled_attention_v1(q, k, v, causal=causal, softmax_scale=softmax_scale)


def _tiled_v2(q, k, v, *, causal=False, softmax_scale=None):
    return reference.tiled_attention_v2(q, k, v, causal=causal, softmax_scale=softmax_scale)


IMPLEMENTATIONS: dict[str, Attention] = {
    "naive": _naive,
    "sdpa_math": partial(_sdpa, SDPBackend.MATH),
    "sdpa_efficient": partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION),
    "sdpa_flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
    "flash_attn": _flash_attn,
    "flex": _flex,
    "triton_v1": _triton_v1,
    "triton_v2": _triton_v2,
    "tiled_v1": _tiled_v1,
    "tiled_v2": _tiled_v2,
}
"""Every implementation by name, with one signature: f(q, k, v, *, causal=False, softmax_scale=None) -> out.

Tensors are (B, N, H, D). One that cannot run raises and says why; none gives way to another. triton_v1 and
tiled_v1 have no backward pass; tiled_v1 and tiled_v2 are the PyTorch loops of `reference`.
"""


def chosen(impls: Iterable[str] | Mapping[str, Attention]) -> dict[str, Attention]:
    """Functions by name, from names or from such a mapping.

    Raises:
        ValueError: an unknown name, or none at all.
    """
    if isinstance(impls, Mapping):
        chosen = dict(impls)
    else:
        names = [impls] if isinstance(impls, str) else list(impls)
        unknown = [name for name in names if name not in IMPLEMENTATIONS]
        if unknown:
            raise ValueError(f"unknown implementation {unknown}: choose from {', '.join(IMPLEMENTATIONS)}.")
        chosen = {name: IMPLEMENTATIONS[name] for name in names}
    if not chosen:
        raise ValueError("no implementation to measure: name at least one.")
    return chosen
