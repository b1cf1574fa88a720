"""The lab's attention under the names by which transformers calls it: "labutils" and "labutils_v1".

transformers calls an attention function by its name (`attn_implementation`). A second function of the same name
prepares the mask. Both must be registered: with the first only, transformers drops padding masks without a warning.
`GPT2Config(use_flash_attn=True)` is accepted, stored and ignored: only the name counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from labutils.attention.interface import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from labutils.attention.kernels import flash_v1, flash_v2_backward
from labutils.attention.kernels.options import Options

if TYPE_CHECKING:
    from collections.abc import Callable


# ------------------------------------------------------------------------------------------------------------
# "labutils": FlashAttention-2, with padding, packed documents and a KV cache
# ------------------------------------------------------------------------------------------------------------


def register_attention(name: str = "labutils") -> str:
    """Makes the lab's FlashAttention available to transformers as `attn_implementation=name`.

    Registers the attention function and its mask function. A second call changes nothing.

    Args:
        name: the name to register. transformers takes any name with "flash" in it for the flash-attn package and
            prepares other inputs for it, so such a name is refused. So are the names that transformers uses itself.

    Returns:
        `name`, to be passed on: `from_pretrained(..., attn_implementation=register_attention())`.

    Raises:
        ValueError: the name has another meaning in transformers.
    """
    from transformers import AttentionInterface

    ours = AttentionInterface._global_mapping.get(name) is attention_forward
    taken = name in ("eager", *AttentionInterface._global_mapping) and not ours
    if taken or "flash" in name or "/" in name:
        raise ValueError(
            f"{name!r} means something else to transformers: choose a name without 'flash' or '/' that transformers "
            "does not use, such as 'labutils'"
        )
    return _register(name, attention_forward)


def _register(name: str, attention: Callable) -> str:
    """Registers an attention function, and `padding_mask` as its mask function; returns the name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, padding_mask)
    return name


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask function of the registration; transformers calls it once in each forward pass.

    The kernel makes the causal mask itself. So this mask only says which keys are padding.

    Args:
        batch_size: B.
        q_length: N_q.
        kv_length: N_k, the length of the keys that attention will get (for a static cache, all its slots).
        q_offset: position of the first query among the keys, which is the number of tokens in the cache.
        kv_offset: position of the first key; not 0 in caches of a sliding window.
        mask_function: the rule from which transformers would make its mask; causal and bidirectional are supported.
        attention_mask: bool (B, keys seen so far), True = a token, False = padding; None = no padding.
        device: where to put the mask.
        kwargs: arguments for other implementations (`dtype`, `config`, ...).

    Returns:
        None if every key is visible, else a bool (B, N) with N <= N_k: the cache has no keys after N yet.

    Raises:
        NotImplementedError: a mask that the kernel cannot express: packed sequences given by `position_ids` that
            restart within a row, sliding or chunked windows, mask functions of your own.
        ValueError: `attention_mask` does not reach up to the last query.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if mask_function not in (None, causal_mask_function, bidirectional_mask_function) or kv_offset != 0:
        raise NotImplementedError(
            "the lab's attention supports only causal, bidirectional and padding masks. This call needs another mask: "
            "position_ids that restart within a row (packed sequences), a sliding or chunked window, or a mask "
            "function of your own. Use attn_implementation='sdpa' for it"
        )
    if mask_function is bidirectional_mask_function:
        seen = kv_length
    else:
        seen = int(q_offset) + q_length  # less than N_k in a static cache, whose last slots are still empty
    if attention_mask is not None:
        if attention_mask.shape != (batch_size, seen):
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)}, but {batch_size} sequences of {seen} keys "
                "(those in the cache and those of this call) need one entry each"
            )
        if not attention_mask.all():
            return attention_mask.bool()
    if seen == kv_length:
        return None
    return torch.ones(batch_size, seen, dtype=torch.bool, device=device)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`labutils.flash_attn_func` behind the signature that transformers calls.

    A few queries against many keys, as in generation, go to the decoding kernel. In a batch with padding, the visible
    tokens are packed and run as sequences of different lengths.

    Args:
        module: the attention layer. Its `is_causal` counts if the argument `is_causal` is None, as it is in GPT-2.
        query: (B, H, N_q, D), a strided view of GPT-2's fused projection; no copy is made.
        key: (B, H_kv, N_k, D).
        value: (B, H_kv, N_k, D).
        attention_mask: None, or the bool (B, N) of `padding_mask`.
        scaling: softmax scale; None is 1/sqrt(D).
        dropout: probability of dropping a weight; transformers passes 0 to a model that is not training.
        is_causal: overrides `module.is_causal`. Causal masks are aligned bottom right: the last query has the position
            of the last key, as a KV cache needs it.
        kwargs: arguments for other models. An argument that would change the result is refused. `cu_seq_lens_q`,
            `cu_seq_lens_k`, `max_length_q` and `max_length_k` keep packed documents apart.

    Returns:
        ((B, N_q, H, D), None): padded queries give 0. There are no attention weights to return.

    Raises:
        NotImplementedError: `output_attentions=True`, a mask that is not a padding mask, a window, softcap, sinks or a
            position bias.
    """
    for unsupported in ("sliding_window", "softcap", "s_aux", "position_bias", "head_mask"):
        if kwargs.get(unsupported) is not None:
            raise NotImplementedError(
                f"the lab's attention has no {unsupported}: use attn_implementation='eager' for this model"
            )
    if kwargs.get("output_attentions") or _weights_are_collected():
        raise NotImplementedError(
            "output_attentions=True asks for the N x N weights, which FlashAttention never stores. Use "
            "attn_implementation='eager' to look at them"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal

    # (B, H, N, D) -> (B, N, H, D), views
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if attention_mask is not None:
        if attention_mask.ndim != 2 or attention_mask.dtype != torch.bool:
            raise NotImplementedError(
                "the lab's attention takes only a padding mask (B, N), and got a mask of shape "
                f"{tuple(attention_mask.shape)} and dtype {attention_mask.dtype}: pass the 2-D attention_mask to "
                "the model, or use attn_implementation='sdpa'"
            )
        seen = attention_mask.shape[1]
        k, v = k[:, :seen], v[:, :seen]  # drops the slots of a static cache that are still empty
        if attention_mask.all():
            attention_mask = None
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if q.shape[1] < k.shape[1] and not trains and dropout == 0.0:
        leftpad = None if attention_mask is None else _left_padding(attention_mask)
        if attention_mask is None or leftpad is not None:
            return flash_attn_with_kvcache(
                q, k, v, cache_seqlens=k.shape[1], cache_leftpad=leftpad, softmax_scale=scaling, causal=causal
            ), None
    if attention_mask is None:
        if kwargs.get("cu_seq_lens_q") is not None:  # transformers' name for the borders of packed documents
            return _attention_within_documents(q, k, v, dropout, scaling, causal, kwargs), None
        return flash_attn_func(q, k, v, dropout, scaling, causal), None
    return _padded_attention(q, k, v, attention_mask, dropout, scaling, causal), None


def _left_padding(mask: torch.Tensor) -> torch.Tensor | None:
    """int32 (B,): the number of padded keys, if all of them stand at the left; else None. mask: bool (B, N_k)."""
    hidden = (~mask).sum(1)
    at_the_left = torch.arange(mask.shape[1], device=mask.device) < hidden[:, None]
    return hidden.int() if torch.equal(at_the_left, ~mask) else None


def _attention_within_documents(q, k, v, dropout, scaling, causal, borders):
    """Attention that stays within a document; q, k, v: (B, N, H, D), the borders count over the B * N tokens."""
    q_rows, k_rows, v_rows = (t.flatten(0, 1) for t in (q, k, v))  # (B, N, H, D) -> (B·N, H, D)
    out: Any = flash_attn_varlen_func(
        q_rows, k_rows, v_rows,
        borders["cu_seq_lens_q"], borders["cu_seq_lens_k"], borders["max_length_q"], borders["max_length_k"],
        dropout, scaling, causal,
    )  # fmt: skip
    return out.view(q.shape)


def _padded_attention(q, k, v, mask, dropout, scaling, causal):
    """Attention among the visible tokens of each sequence; q: (B, N_q, H, D), k, v: (B, N_k, H_kv, D)."""
    n_q, n_k = q.shape[1], k.shape[1]
    # Causal: query i belongs to key i + N_k - N_q, and is padding if that key is. Without the padding, queries and keys
    # keep their order and their last positions, and so their bottom-right alignment, wherever the padding stood.
    rows = mask[:, n_k - n_q :] if causal else torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)

    def starts(visible: torch.Tensor) -> torch.Tensor:  # cu_seqlens: int32 (B + 1,)
        return torch.nn.functional.pad(visible.sum(1).cumsum(0), (1, 0)).int()

    part: Any = flash_attn_varlen_func(
        q[rows], k[mask], v[mask], starts(rows), starts(mask), n_q, n_k, dropout, scaling, causal
    )
    return torch.zeros_like(q, memory_format=torch.contiguous_format).index_put((rows,), part.to(q.dtype))


def _weights_are_collected() -> bool:
    """Whether this forward pass runs with output_attentions=True.

    transformers does not tell the attention functions. It collects the weights that they return. We could only return
    None, and the caller would get an empty tuple. So we ask the collector what the caller wants.
    """
    from transformers.utils.output_capturing import _active_collector

    collected = _active_collector.get()
    return collected is not None and ("attentions" in collected or "cross_attentions" in collected)


# ------------------------------------------------------------------------------------------------------------
# "labutils_v1": FlashAttention-1's forward kernel, for measurements
# ------------------------------------------------------------------------------------------------------------


def register_first_version() -> str:
    """Makes FlashAttention-1's forward kernel available to transformers as "labutils_v1", only for measurements.

    It uses the backward pass of `labutils.flash_attn_func`. Padding and dropout raise NotImplementedError.

    Returns:
        The name, for `attn_implementation`.
    """
    return _register("labutils_v1", _first_version)


def _first_version(module, query, key, value, attention_mask, *, scaling=None, dropout=0.0, is_causal=None, **kwargs):
    if attention_mask is not None or dropout:
        raise NotImplementedError("labutils_v1 is for measurements: no padding, no dropout. Use 'labutils'")
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    causal = module.is_causal if is_causal is None else is_causal
    return _FirstVersion.apply(q, k, v, scaling or q.shape[-1] ** -0.5, bool(causal)), None


class _FirstVersion(torch.autograd.Function):
    """FlashAttention-1 forward. The backward is `flash_v2_backward`, which takes the log-sum-exp of any forward."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, softmax_scale: float, causal: bool) -> Any:
        out, lse = flash_v1.forward(q, k, v, softmax_scale, causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = Options(softmax_scale, window_right=0 if causal else None)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Any) -> tuple:
        q, k, v, out, lse = ctx.saved_tensors
        return *flash_v2_backward.backward(dout, q, k, v, out, lse, ctx.options), None, None
