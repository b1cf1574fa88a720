"""GPT-2 on the lab's attention: registered with transformers, made without a download; chunked loss.

transformers calls an attention function by its name (`attn_implementation`), and a second function of the same name
prepares the mask. Both have to be registered: with the first alone, padding masks are dropped without a word.
`GPT2Config(use_flash_attn=True)` is accepted, stored and ignored; the name is what counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from labutils.attention.interface import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from labutils.gpt2.data import document_borders, document_positions

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import GPT2LMHeadModel

_IGNORED = -100  # the target that PyTorch's cross-entropy leaves out

GPT2_SIZES: dict[str, tuple[int, int, int]] = {
    "124M": (12, 12, 768),
    "355M": (24, 16, 1024),
    "774M": (36, 20, 1280),
    "1558M": (48, 25, 1600),
    "tiny": (2, 2, 128),
    "nano": (2, 2, 32),
}
"""Layers, heads and width. The first four are Radford et al. 2019, table 2, with the parameter counts that are in use
today; the last two are small enough for two CPU cores and for Triton's interpreter."""


def register_attention(name: str = "labutils") -> str:
    """Make the lab's FlashAttention available to transformers as `attn_implementation=name`.

    Registers the attention function and its mask function. Doing it twice changes nothing.

    Args:
        name: the name to register. transformers takes any name with "flash" in it for the flash-attn package and
            prepares other inputs for it, so that such a name is refused, as are the names it uses itself.

    Returns:
        `name`, to be passed on: `from_pretrained(..., attn_implementation=register_attention())`.

    Raises:
        ValueError: a name that transformers gives a meaning of its own.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    ours = AttentionInterface._global_mapping.get(name) is attention_forward
    taken = name in ("eager", *AttentionInterface._global_mapping) and not ours
    if taken or "flash" in name or "/" in name:
        raise ValueError(
            f"{name!r} means something else to transformers: choose a name without 'flash' or '/' that is "
            "not one of its own, such as 'labutils'"
        )
    AttentionInterface.register(name, attention_forward)
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
    """The mask side of the registration: what transformers asks for once per forward pass.

    The kernel makes the causal mask itself, so all that is left to say is which keys are padding.

    Args:
        batch_size: B.
        q_length: N_q.
        kv_length: N_k, the length of the keys that attention will get (for a static cache, all its slots).
        q_offset: position of the first query among the keys (tokens that the cache holds already).
        kv_offset: position of the first key; not 0 in caches of a sliding window.
        mask_function: what transformers' mask is made of; causal and bidirectional ones can be expressed.
        attention_mask: bool (B, keys seen so far), True = a token, False = padding; None = no padding.
        device: where the mask is wanted.
        kwargs: what other implementations use (`dtype`, `config`, ...).

    Returns:
        None where every key is visible, else a bool (B, N) with N <= N_k: later keys are not there yet.

    Raises:
        NotImplementedError: a mask the kernel cannot express: packed sequences given by `position_ids` that start again
            within a row, sliding or chunked windows, mask functions of one's own.
        ValueError: `attention_mask` does not reach up to the last query.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if mask_function not in (None, causal_mask_function, bidirectional_mask_function) or kv_offset != 0:
        raise NotImplementedError(
            "the lab's attention knows causal, bidirectional and padding masks alone, and another is asked "
            "for: position_ids that start again within a row (packed sequences), a sliding or chunked "
            "window, or a mask function of your own. Use attn_implementation='sdpa' there"
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

    A few queries against many keys, as in generation, go to the decoding kernel. The visible tokens of a batch with
    padding are packed, and run as sequences of different lengths.

    Args:
        module: the attention layer; `module.is_causal` holds where `is_causal` is None (GPT-2 passes None).
        query: (B, H, N_q, D), a strided view of GPT-2's fused projection; no copy is made.
        key: (B, H_kv, N_k, D).
        value: (B, H_kv, N_k, D).
        attention_mask: None, or the bool (B, N) of `padding_mask`.
        scaling: softmax scale; None is 1/sqrt(D).
        dropout: probability of leaving a weight out; transformers passes 0 to a model that is not training.
        is_causal: overrides `module.is_causal`. Causal masks are aligned bottom right: the last query is the last
            key's, which is what a KV cache needs.
        kwargs: further arguments of other models; those that change the result are refused. `cu_seq_lens_q`,
            `cu_seq_lens_k`, `max_length_q` and `max_length_k` keep packed documents apart.

    Returns:
        ((B, N_q, H, D), None): padded queries give 0. There are no attention weights to return.

    Raises:
        NotImplementedError: `output_attentions=True`, a mask of another kind, a window, softcap, sinks or a position
            bias.
    """
    for unsupported in ("sliding_window", "softcap", "s_aux", "position_bias", "head_mask"):
        if kwargs.get(unsupported) is not None:
            raise NotImplementedError(
                f"the lab's attention has no {unsupported}: use attn_implementation='eager' for this model"
            )
    if kwargs.get("output_attentions") or _weights_are_collected():
        raise NotImplementedError(
            "output_attentions=True asks for the N x N weights, which FlashAttention never has. Use "
            "attn_implementation='eager' to look at them"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal

    # (B, H, N, D) -> (B, N, H, D), views
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if attention_mask is not None:
        if attention_mask.ndim != 2 or attention_mask.dtype != torch.bool:
            raise NotImplementedError(
                "the lab's attention takes a padding mask (B, N) alone, and got a mask of shape "
                f"{tuple(attention_mask.shape)} and dtype {attention_mask.dtype}: pass the 2-D attention_mask to "
                "the model, or use attn_implementation='sdpa'"
            )
        seen = attention_mask.shape[1]
        k, v = k[:, :seen], v[:, :seen]  # the slots of a static cache that are still empty
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
        if kwargs.get("cu_seq_lens_q") is not None:  # what transformers calls the borders of packed documents
            return _attention_within_documents(q, k, v, dropout, scaling, causal, kwargs), None
        return flash_attn_func(q, k, v, dropout, scaling, causal), None
    return _padded_attention(q, k, v, attention_mask, dropout, scaling, causal), None


def _left_padding(mask: torch.Tensor) -> torch.Tensor | None:
    """int32 (B,): how many keys are padding, if all of them stand at the left; else None. mask: bool (B, N_k)."""
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
    # Causal: query i stands at key i + N_k - N_q, and is padding where that key is. Taking the padding out of both
    # keeps their order and their last positions, hence the bottom-right alignment, wherever it stood.
    rows = mask[:, n_k - n_q :] if causal else torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)

    def starts(visible: torch.Tensor) -> torch.Tensor:  # cu_seqlens: int32 (B + 1,)
        return torch.nn.functional.pad(visible.sum(1).cumsum(0), (1, 0)).int()

    part: Any = flash_attn_varlen_func(
        q[rows], k[mask], v[mask], starts(rows), starts(mask), n_q, n_k, dropout, scaling, causal
    )
    return torch.zeros_like(q, memory_format=torch.contiguous_format).index_put((rows,), part.to(q.dtype))


def _weights_are_collected() -> bool:
    """Whether this forward pass runs with output_attentions=True.

    transformers keeps that from the attention functions and collects what they return; None, which is all that we could
    return, would end as an empty tuple. Its collector says what the caller asked for.
    """
    from transformers.utils.output_capturing import _active_collector

    collected = _active_collector.get()
    return collected is not None and ("attentions" in collected or "cross_attentions" in collected)


def gpt2(
    size: str = "124M",
    *,
    n_positions: int = 1024,
    vocab_size: int = 50257,
    attention: str = "labutils",
    **overrides: Any,
) -> GPT2LMHeadModel:
    """A GPT-2 with random weights, made from its config: nothing is downloaded.

    Weights come from torch's global generator: call `torch.manual_seed` before, and models that differ in `attention`
    alone have equal weights. The model is on the CPU, in float32, in training mode.

    Args:
        size: a key of `GPT2_SIZES`: "124M", "355M", "774M", "1558M"; "tiny" (2 layers, width 128) and "nano" (2 layers,
            width 32) for a CPU.
        n_positions: longest sequence, N.
        vocab_size: entries of the tokenizer.
        attention: "labutils" (our kernels), "sdpa", "eager" (standard attention), or what is registered.
        overrides: further `GPT2Config` fields. Dropout (`attn_pdrop`, `resid_pdrop`, `embd_pdrop`) is 0 where it is not
            given, since comparisons of losses and gradients need it.

    Raises:
        ValueError: an unknown size, or an `attention` that transformers does not know.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    if size not in GPT2_SIZES:
        raise ValueError(f"size must be one of {', '.join(GPT2_SIZES)}; got {size!r}")
    layers, heads, width = GPT2_SIZES[size]
    fields = {
        "n_layer": layers,
        "n_head": heads,
        "n_embd": width,
        "n_positions": n_positions,
        "vocab_size": vocab_size,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "lab_size": size,  # the name of this model in tables
    }
    if vocab_size != 50257:  # GPT-2's end-of-text, 50256, belongs to its own vocabulary
        fields |= {"bos_token_id": None, "eos_token_id": None}
    config = GPT2Config(**(fields | overrides))
    if attention == "labutils":
        register_attention(attention)
    config._attn_implementation = attention
    return _with_loss(GPT2LMHeadModel(config))


def load_gpt2(name: str | Path = "gpt2", *, attention: str = "labutils", **overrides: Any) -> GPT2LMHeadModel:
    """GPT-2 with its trained weights, from the Hugging Face hub, its cache on this machine, or a folder.

    Args:
        name: "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", or a folder that `save_pretrained` wrote.
        attention: as in `gpt2`.
        overrides: config fields to change. Attention dropout is 0 where it is not given; the other dropouts stay as
            trained (0.1, at work in training mode only).

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: the weights are neither in a folder, nor in the cache, nor can the hub be reached.
            (transformers tries the hub for half a minute; HF_HUB_OFFLINE=1 in the environment spares that.)
    """
    from transformers import GPT2LMHeadModel

    if attention == "labutils":
        register_attention(attention)
    overrides = {"attn_pdrop": 0.0} | overrides
    try:
        model = GPT2LMHeadModel.from_pretrained(name, attn_implementation=attention, **overrides)
    except OSError as error:
        raise FileNotFoundError(
            f"{str(name)!r} is not a folder with a saved model, and neither the Hugging Face cache of this "
            f"machine nor the hub gave it ({str(error).splitlines()[0]}). Connect to the internet once (the "
            "files stay in the cache), name a folder, or use labutils.gpt2.models.gpt2(), the same but untrained"
        ) from error
    return _with_loss(model)


HUB_NAMES = {"124M": "gpt2", "355M": "gpt2-medium", "774M": "gpt2-large", "1558M": "gpt2-xl"}
"""What the Hugging Face hub calls the sizes of GPT-2."""


def gpt2_trained_or_not(
    size: str = "124M", *, otherwise: str | None = None, attention: str = "labutils", seconds: float = 3.0
) -> tuple[GPT2LMHeadModel, str]:
    """GPT-2 with its trained weights where this machine has them or can get them, else with random ones.

    The cache of this machine is asked first, then the hub, from which 124M are 0.5 GB. HF_HUB_OFFLINE=1 in the
    environment forbids the hub.

    Args:
        size: a key of `HUB_NAMES`.
        otherwise: the size of the model with random weights, a key of `GPT2_SIZES`; `size` where not given.
        attention: as in `gpt2`.
        seconds: how long to wait for the hub's first answer.

    Returns:
        The model, on the CPU, in evaluation mode, and a sentence that says which weights it has and why.

    Raises:
        ValueError: a size that the hub does not have.
    """
    if size not in HUB_NAMES:
        raise ValueError(f"size must be one of {', '.join(HUB_NAMES)}; got {size!r}")
    name = HUB_NAMES[size]
    try:
        return load_gpt2(name, attention=attention, local_files_only=True), f"{name}: trained weights, from the cache"
    except FileNotFoundError:
        reason = _why_no_hub(name, seconds)
    why = f"not in this machine's cache, and the hub was not reached ({reason})"
    if reason is None:
        try:
            return load_gpt2(name, attention=attention), f"{name}: trained weights, from the hub"
        except FileNotFoundError as error:  # a connection that is lost, a disk that is full
            why = f"not to be had from the hub, which answered ({str(error.__cause__ or error).splitlines()[0]})"
    made = otherwise or size
    return gpt2(made, attention=attention).eval(), f"{name} is {why}: random weights, from the configuration of {made}"


def _why_no_hub(name: str, seconds: float) -> str | None:
    """None where the hub answers for this model, else why it does not."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=seconds)
    except Exception as error:  # whatever the network, a proxy or the hub says: there are no weights
        return type(error).__name__
    return None


def _with_loss(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    # transformers guesses the loss from the class's name, fails with GPT-2's, and takes this one, warning us.
    model.loss_type = "ForCausalLM"
    return model


def language_model_loss(
    model: GPT2LMHeadModel,
    tokens: torch.Tensor,
    *,
    chunked_loss: int | None = None,
    end_of_text: int | None = None,
) -> torch.Tensor:
    """Mean cross-entropy, in nats, of each token given those before it.

    The logits are the largest tensor in the training of a small model on a long sequence: N x vocabulary, in float32,
    several copies at a time. With `chunked_loss` they exist for that many positions at once, and are computed again in
    the backward: the same loss and gradients up to rounding, for one more product with the output matrix.

    Args:
        model: a GPT-2 language model.
        tokens: int64 (B, N), input and target at once; position i predicts token i + 1.
        chunked_loss: positions per chunk, counted over the batch, or None for the model's own loss.
        end_of_text: the token that ends a document in packed sequences. Where it is given, documents are kept apart:
            attention stays within them, positions begin at 0 in each, and no document's first token is predicted from
            the one before. Our attention gets the borders ("varlen"); others a mask of N x N bits.

    Returns:
        float32 scalar, the mean over B * (N - 1) predictions, less those across borders.

    Raises:
        ValueError: N < 2, N above the model's `n_positions` (rotary positions have no such limit), or
            `chunked_loss` < 1.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(f"tokens must be (B, N), N of 2 or more, so that one is predicted; got {tuple(tokens.shape)}")
    rotary = getattr(model.config, "lab_rope_base", None) is not None
    if not rotary and tokens.shape[1] > model.config.n_positions:
        raise ValueError(
            f"tokens must be (B, N) with N from 2 to the model's n_positions={model.config.n_positions}, got "
            f"{tuple(tokens.shape)}: make the model with a larger n_positions, or pass shorter sequences"
        )
    if chunked_loss is not None and chunked_loss < 1:
        raise ValueError(f"chunked_loss is a number of positions, at least 1; got {chunked_loss}")
    apart = {} if end_of_text is None else kept_apart(model, tokens, end_of_text)
    target = tokens[:, 1:]
    if end_of_text is not None:
        target = target.masked_fill(tokens[:, :-1] == end_of_text, _IGNORED)
    if chunked_loss is None:
        labels = torch.cat([tokens[:, :1], target], dim=1)  # the model shifts them itself, and drops the first
        return model(tokens, labels=labels, use_cache=False, **apart).loss
    hidden = model.transformer(tokens, use_cache=False, **apart).last_hidden_state
    hidden = hidden[:, :-1].flatten(0, 1)  # (B, N, C) -> (B·(N-1), C)
    target = target.flatten()
    total = hidden.new_zeros((), dtype=torch.float32)
    # split, not slices: the backward of each slice would write a gradient as large as `hidden`
    for part, wanted in zip(hidden.split(chunked_loss), target.split(chunked_loss), strict=True):
        total = total + checkpoint(_chunk_loss, model.lm_head, part, wanted, use_reentrant=False)
    return total / (len(target) if end_of_text is None else (target != _IGNORED).sum())


def kept_apart(model: GPT2LMHeadModel, tokens: torch.Tensor, end_of_text: int) -> dict[str, Any]:
    """What the model is given beside packed tokens, so that their documents do not see each other.

    Args:
        model: a GPT-2 of `gpt2`, which is asked for its attention alone.
        tokens: int64 (B, N), rows of `labutils.gpt2.data.pack`.
        end_of_text: the token that ends a document.

    Returns:
        Keyword arguments for the model: `position_ids`, int64 (B, N), from 0 in each document; for our attention the
        borders as well, `cu_seq_lens_q` and `cu_seq_lens_k`, int32 (documents + 1,), over the B * N tokens.

    Raises:
        ValueError: tokens that are not (B, N).
    """
    positions = document_positions(tokens, end_of_text)
    if model.config._attn_implementation != "labutils":
        return {"position_ids": positions}  # transformers makes a mask of positions that begin again
    borders = document_borders(tokens, end_of_text)
    longest = int(borders.diff().max())
    return {
        "position_ids": positions,
        # Nothing is padded; where this is given, transformers makes no mask of the positions.
        "attention_mask": torch.ones_like(tokens, dtype=torch.bool),
        "cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip


def _chunk_loss(lm_head: torch.nn.Module, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The sum of the losses of some positions, in float32; hidden: (n, C), target: int64 (n,)."""
    return F.cross_entropy(lm_head(hidden).float(), target, reduction="sum")
