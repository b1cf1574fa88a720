"""The lab's attention under the names by which transformers calls it: "labutils" and "labutils_v1".

transformers calls an attention function by its name (`attn_implementation`). A second function of the same name
prepares the mask. Both must be registered: with the first only, transformers drops padding masks without a warning.
`GPT2Config(use_flash_attn=True)` is accepted, stored and ignored: only the name counts.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention.flex_attention import BlockMask

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
    _OURS.add(name)
    _check_models_when_made()
    return name


_OURS: set[str] = set()
"""The names under which attention functions of the lab are registered."""


def _check_models_when_made() -> None:
    """Refuses our names for models with attention code of their own, as transformers refuses "sdpa" for them.

    transformers asks each new model (and each model inside it) whether it supports the name. For a registered name the
    answer is always yes, and transformers has no place to register another answer. So we wrap the question.
    """
    from transformers import PreTrainedModel

    ask = PreTrainedModel.get_correct_attn_implementation
    if getattr(ask, "asks_the_lab", False):
        return

    @functools.wraps(ask)
    def ask_and_check(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        if requested_attention in _OURS and _has_attention_of_its_own(type(self)):
            raise ValueError(
                f"{type(self).__name__} does not support attn_implementation={requested_attention!r}: its attention "
                "layers have code of their own and never call a registered attention function. Use "
                "attn_implementation='eager' for this model"
            )
        return ask(self, requested_attention, *args, **kwargs)

    ask_and_check.asks_the_lab = True  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = ask_and_check


@functools.cache
def _source(model_class: type) -> str:
    """The source of the file in which a class was written; "" if it cannot be read."""
    try:
        return inspect.getsource(sys.modules[model_class.__module__])
    except (KeyError, OSError, TypeError):
        return ""


def _has_attention_of_its_own(model_class: type) -> bool:
    """Whether transformers finds attention layers, but no call of registered functions, in the model's source file.

    The file of a base class counts too: a subclass in a program of yours has the attention of its base class. A class
    whose source cannot be read passes. Its masks then find out: see `PaddingMask`.
    """
    for base in model_class.__mro__:
        can_set = getattr(base, "_can_set_attn_implementation", None)
        if can_set is None or base.__name__ == "PreTrainedModel":
            continue
        # False can also mean an unreadable file. transformers stores the answer only if it has read the file.
        if not can_set() and getattr(base, "_can_set_attn_implementation_cached_value", None) is False:
            return True
        tables = re.findall(r"(\w+)\[(?:self\.)?config\._attn_implementation\]", _source(base))
        if not all(table.startswith("ALL_") for table in tables):
            return True  # looks up its layers' class in a table of its own, and would end in a KeyError
    return False


_NOT_OUR_CALLER = (
    "this model was made with an attention implementation of the lab, but uses the attention mask itself instead of "
    "passing it to the registered attention function. The lab's mask only says which keys are padding, so the result "
    "would be wrong. Use attn_implementation='sdpa' or 'eager' for this model"
)


class PaddingMask(BlockMask):
    """What `padding_mask` returns: the visible keys and the rule of a mask, without the mask.

    Only our attention functions can read it. A model that adds it to its scores, slices it or asks for its dtype gets a
    NotImplementedError instead of a wrong result. It is a `BlockMask` only because transformers passes a `BlockMask`
    through unread, as it does for flex_attention.

    Attributes:
        causal: whether a query sees only keys up to its own position.
        keep: bool (B, seen), True = a token, False = padding; None if every key is visible.
        seen: the number of keys that exist. Slots of a static cache behind them are empty.
    """

    def __init__(self, shape: tuple[int, int, int, int], causal: bool, seen: int, keep: torch.Tensor | None) -> None:
        self._shape = shape
        self.causal = causal
        self.seen = seen
        self.keep = keep
        self.checked: Any = None  # the position_ids that this forward pass has checked already

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, 1, N_q, N_k) of the mask that it stands for."""
        return self._shape

    @property
    def ndim(self) -> int:
        """4."""
        return len(self._shape)

    def to(self, device: Any = None, *args: Any, **kwargs: Any) -> PaddingMask:
        """The same mask on another device; the dtype stays bool."""
        keep, to = self.keep, kwargs.get("device", device)
        if keep is not None and isinstance(to, (str, int, torch.device)):
            keep = keep.to(to)
        return PaddingMask(self._shape, self.causal, self.seen, keep)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(_NOT_OUR_CALLER)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # Python and PyTorch look for these in every object
            raise AttributeError(name)
        raise NotImplementedError(f"{_NOT_OUR_CALLER} (it asked for the mask's {name!r})")

    def _refuse(self, *args: Any) -> Any:
        raise NotImplementedError(_NOT_OUR_CALLER)

    __getitem__ = __len__ = __iter__ = __bool__ = __invert__ = __neg__ = __eq__ = __ne__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __and__ = __rand__ = _refuse
    __or__ = __ror__ = __lt__ = __le__ = __gt__ = __ge__ = numel = sparsity = to_dense = to_string = _refuse
    as_tuple = _refuse
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"PaddingMask(shape={self._shape}, causal={self.causal}, seen={self.seen}, keep={self.keep})"

    __str__ = __repr__


_RESTARTS = (
    "position_ids that restart or jump within a row mean packed sequences. The lab's attention keeps them apart only "
    "by their borders: pass cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k with an attention_mask of ones "
    "(labutils.gpt2.loss.kept_apart makes them), or use attn_implementation='sdpa' without a cache"
)


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
) -> PaddingMask:
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
        device: where transformers would put its mask.
        kwargs: arguments for other implementations (`dtype`, `config`, ...).

    Returns:
        The rule and the visible keys, for our attention functions only.

    Raises:
        NotImplementedError: a mask that the kernel cannot express: packed sequences given by `position_ids` that
            restart within a row, sliding or chunked windows, mask functions of your own. A compiled model looks for
            such restarts while it runs: RuntimeError on a CPU, a failed assertion on a GPU.
        ValueError: `attention_mask` does not reach up to the last query.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    causal = mask_function is not bidirectional_mask_function
    if (
        torch.compiler.is_compiling()
        and attention_mask is None
        and kv_offset == 0
        and kwargs.get("local_size") is None
        and not kwargs.get("use_vmap")
        and mask_function is not None
        and mask_function.__qualname__ == "and_masks.<locals>.and_mask"  # Dynamo knows no getattr of a function
    ):
        # While it compiles, transformers cannot see whether position_ids restart, and builds the mask of packed
        # sequences in any case. It is causal if each token sees the one before, and none sees the one after.
        i = torch.arange(1, q_length, device=device)[None]  # (1, N-1)
        row = torch.arange(batch_size, device=device)[:, None]  # (B, 1)
        before, after = mask_function(row, 0, i, i - 1), mask_function(row, 0, i - 1, i)
        torch._assert_async((before & ~after).all(), _RESTARTS)
        mask_function = causal_mask_function
    if mask_function not in (None, causal_mask_function, bidirectional_mask_function) or kv_offset != 0:
        raise NotImplementedError(
            "the lab's attention supports only causal, bidirectional and padding masks. This call needs another mask: "
            "position_ids that restart within a row (packed sequences), a sliding or chunked window, or a mask "
            "function of your own. Use attn_implementation='sdpa' for it"
        )
    # less than N_k in a static cache, whose last slots are still empty
    seen = int(q_offset) + q_length if causal else kv_length
    keep = None
    if attention_mask is not None:
        if attention_mask.shape != (batch_size, seen):
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)}, but {batch_size} sequences of {seen} keys "
                "(those in the cache and those of this call) need one entry each"
            )
        if not attention_mask.all():
            keep = attention_mask.bool()
    return PaddingMask((batch_size, 1, q_length, kv_length), causal, seen, keep)


_BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""transformers' names for the borders of packed documents, which come together."""

_HARMLESS = frozenset(
    {
        *_BORDERS, "position_ids", "output_attentions",  # read below
        "output_hidden_states", "output_router_logits", "return_dict", "use_cache",  # what the model returns
        "num_items_in_batch",  # for the loss
        "deterministic",  # how flash-attn adds up gradients; ours are always added in the same order
    }
)  # fmt: skip
"""Keywords that models of transformers pass to attention functions, and that do not change the result."""


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: PaddingMask | torch.Tensor | None,
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
        module: the attention layer. Its `is_causal` counts if there is no mask of `padding_mask` and the argument
            `is_causal` is None.
        query: (B, H, N_q, D), a strided view of GPT-2's fused projection; no copy is made.
        key: (B, H_kv, N_k, D).
        value: (B, H_kv, N_k, D).
        attention_mask: the mask of `padding_mask`, whose rule counts, or None, or a bool (B, N) that is False for
            padding.
        scaling: softmax scale; None is 1/sqrt(D).
        dropout: probability of dropping a weight; transformers passes 0 to a model that is not training.
        is_causal: overrides `module.is_causal`. Causal masks are aligned bottom right: the last query has the position
            of the last key, as a KV cache needs it.
        kwargs: arguments for other models. A keyword that is not known to leave the result alone is refused, unless it
            is None or False. `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k` keep packed documents
            apart. `position_ids` that restart within a row are refused without them.

    Returns:
        ((B, N_q, H, D), None): padded queries give 0. There are no attention weights to return.

    Raises:
        NotImplementedError: `output_attentions=True`, a mask that is not a padding mask, an unknown keyword (a window,
            softcap, sinks, a position bias, ...), packed documents together with padding.
        ValueError: some of the four borders without the others, or a mask for another number of keys.
    """
    borders = _known(kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal

    # (B, H, N, D) -> (B, N, H, D), views
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    keep: torch.Tensor | None = None
    if isinstance(attention_mask, PaddingMask):
        causal, keep = attention_mask.causal, attention_mask.keep
        k, v = _existing(attention_mask, q, k, v)
    elif attention_mask is not None:
        if attention_mask.ndim != 2 or attention_mask.dtype != torch.bool:
            raise NotImplementedError(
                "the lab's attention takes only a padding mask (B, N), and got a mask of shape "
                f"{tuple(attention_mask.shape)} and dtype {attention_mask.dtype}: pass the 2-D attention_mask to "
                "the model, or use attn_implementation='sdpa'"
            )
        if attention_mask.shape != k.shape[:2]:
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)}, but the keys of {len(k)} sequences of {k.shape[1]} "
                "need one entry each"
            )
        keep = None if attention_mask.all() else attention_mask
    if borders is not None:
        if keep is not None:
            raise NotImplementedError(
                "cu_seq_lens_q and cu_seq_lens_k came together with an attention_mask that hides tokens. The lab's "
                "attention takes either: leave the padding out of the packed rows, or let it be a document of its own "
                "and pass an attention_mask of ones"
            )
        return _attention_within_documents(q, k, v, dropout, scaling, causal, borders), None
    if causal:
        _refuse_restarts(kwargs.get("position_ids"), q, keep, attention_mask)
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if q.shape[1] < k.shape[1] and not trains and dropout == 0.0:
        leftpad = None if keep is None else _left_padding(keep)
        if keep is None or leftpad is not None:
            return flash_attn_with_kvcache(
                q, k, v, cache_seqlens=k.shape[1], cache_leftpad=leftpad, softmax_scale=scaling, causal=causal
            ), None
    if keep is None:
        return flash_attn_func(q, k, v, dropout, scaling, causal), None
    return _padded_attention(q, k, v, keep, dropout, scaling, causal), None


def _known(kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The four borders of packed documents, or None. Refuses keywords that may change the result and are not known."""
    if kwargs.get("output_attentions") or _weights_are_collected():
        raise NotImplementedError(
            "output_attentions=True asks for the N x N weights, which FlashAttention never stores. Use "
            "attn_implementation='eager' to look at them"
        )
    unknown = sorted(
        name for name, value in kwargs.items() if name not in _HARMLESS and value is not None and value is not False
    )
    if unknown:
        raise NotImplementedError(
            f"the lab's attention has no {', '.join(unknown)}, and leaving it out could change the result: use "
            "attn_implementation='eager' for this model"
        )
    given = [name for name in _BORDERS if kwargs.get(name) is not None]
    if not given:
        return None
    if len(given) < len(_BORDERS):
        raise ValueError(
            f"packed documents need all of {', '.join(_BORDERS)}, and only {', '.join(given)} came: pass all four, or "
            "none"
        )
    return {name: kwargs[name] for name in _BORDERS}


def _existing(mask: PaddingMask, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[Any, Any]:
    """The keys and values without the empty slots of a static cache; q, k, v: (B, N, H, D)."""
    batch, _, n_q, n_k = mask.shape
    if k.shape[1] != n_k or (mask.causal and q.shape[1] != n_q) or (mask.keep is not None and len(q) != batch):
        raise ValueError(
            f"the model made a mask for {batch} sequences of {n_q} queries and {n_k} keys, and called attention with "
            f"{len(q)} sequences of {q.shape[1]} queries and {k.shape[1]} keys. The lab's attention cannot tell which "
            "keys the mask means: use attn_implementation='eager' for this model"
        )
    return (k, v) if mask.seen == n_k else (k[:, : mask.seen], v[:, : mask.seen])


def _refuse_restarts(positions: Any, q: torch.Tensor, keep: torch.Tensor | None, mask: Any) -> None:
    """Refuses `position_ids` that restart between two visible queries of a row; once in a forward pass.

    transformers separates such documents only without a cache and without an attention_mask, and then in the mask.
    """
    batch, n = q.shape[:2]
    if not isinstance(positions, torch.Tensor) or positions.ndim != 2 or positions.shape[1] != n or n == 1:
        return  # none, or positions in two or three dimensions
    if isinstance(positions, torch._subclasses.FakeTensor) and not torch.compiler.is_compiling():
        return  # a rehearsal: there are no values to read
    if isinstance(mask, PaddingMask):
        if mask.checked is positions:
            return
        mask.checked = positions
    follows = positions.diff(dim=1) == 1  # (1 or B, N-1)
    if keep is not None:
        visible = keep[:, keep.shape[1] - n :].to(positions.device)
        follows = follows | ~(visible[:, 1:] & visible[:, :-1])
    if torch.compiler.is_compiling() or (q.is_cuda and torch.cuda.is_current_stream_capturing()):
        torch._assert_async(follows.all(), _RESTARTS)  # waits for nothing
    elif not follows.all():
        raise NotImplementedError(_RESTARTS)


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
    borders = _known(kwargs)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    causal = module.is_causal if is_causal is None else is_causal
    if isinstance(attention_mask, PaddingMask) and attention_mask.keep is None:
        causal, mask, attention_mask = attention_mask.causal, attention_mask, None
        k, v = _existing(mask, q, k, v)
        if causal:
            _refuse_restarts(kwargs.get("position_ids"), q, None, mask)
    if attention_mask is not None or borders is not None or dropout:
        raise NotImplementedError(
            "labutils_v1 is for measurements: no padding, no packed documents, no dropout. Use 'labutils'"
        )
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
