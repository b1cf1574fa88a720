"""Small models of every architecture that transformers can build, and what our attention computes in them.

`outcome` compares a model with standard attention ("eager"): logits, a changed last token, padded rows, packed rows.
`python tests/all_models.py` does so for all architectures and prints a table. It takes about 15 minutes.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import signal
import sys
import traceback
import warnings

from labutils import runtime  # isort: skip  before transformers' models, which may import triton
import torch
from transformers.models.auto import modeling_auto

from labutils.gpt2 import attention

KINDS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
}
VOCAB, LARGEST = 96, 20_000_000

SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv"), 2),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size", "dim_ff"), 64),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "v_head_dim", "qk_nope_head_dim", "attention_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "top_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_target_positions"), 64),
    "vocab_size": VOCAB,
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "dropout"), 0.0),
}  # fmt: skip


@contextlib.contextmanager
def at_most(seconds):
    """Raises TimeoutError after some seconds."""

    def stop(*_):
        raise TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def shrunk(config_class, **others):
    """A configuration of the class whose sizes are small, those of its parts included."""
    plain, small = config_class(), SMALL | others
    fields = {}
    for name, value in small.items():
        with contextlib.suppress(Exception):
            if isinstance(getattr(plain, name), (int, float)):
                fields[name] = value
    layers = next(
        (getattr(plain, n) for n in ("num_hidden_layers", "n_layer", "num_layers") if hasattr(plain, n)), None
    )
    kinds = getattr(plain, "layer_types", None)
    if isinstance(kinds, list) and isinstance(layers, int):
        some = list(dict.fromkeys(kinds))[:3]  # one layer of each kind
        some = some if len(some) > 1 else some * 2
        fields["layer_types"] = some
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if name in fields:
                fields[name] = len(some)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        value = getattr(plain, name, None)
        if isinstance(value, (list, tuple)) or (isinstance(value, int) and value >= VOCAB):
            fields[name] = 1
    for name, part in getattr(plain, "sub_configs", {}).items():
        with contextlib.suppress(Exception):
            fields[name] = shrunk(type(getattr(plain, name)) if part.__name__ == "AutoConfig" else part, **others)
    try:
        return config_class(**fields)
    except Exception:
        config = copy.deepcopy(plain)
        for name, value in fields.items():
            with contextlib.suppress(AttributeError):  # a property that follows from other fields
                setattr(config, name, value)
        return config


ATTEMPTS = ({}, {"num_key_value_heads": 4}, {"head_dim": 32, "rotary_dim": 8, "num_key_value_heads": 4})
"""Sizes that some architectures need."""


def small_model(config_class, model_class, kind):
    """A small model with standard attention that can run, or the error of the first attempt."""
    errors = []
    for others in ATTEMPTS:
        try:
            model = built(shrunk(config_class, **others), model_class).to(runtime.device)
            with torch.no_grad():
                model(**on_device(next(cases(kind))[1]))
            return model
        except Exception as error:
            errors.append(error)
    raise errors[0]


def built(config, model_class):
    """The model with standard attention and lively weights, or an error."""
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise OverflowError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2 and "embed" not in name:
                p.normal_(0, 0.15)
    return model


def ours(model):
    """The same weights with our attention."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "labutils"
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    return other


def cases(kind):
    """(name, arguments, which logits count) for each comparison."""
    ids = torch.randint(3, VOCAB - 8, (2, 12), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 5) % (VOCAB - 8)
    everything = torch.ones_like(ids, dtype=torch.bool)
    left, right = everything.clone(), everything.clone()
    left[0, :4], right[0, 8:] = False, False
    if kind == "seq2seq":
        dec = {"decoder_input_ids": ids.flip(1)[:, :9]}
        all_rows = torch.ones(2, 9, dtype=torch.bool)
        yield "logits", {"input_ids": ids, **dec}, all_rows
        yield "changed", {"input_ids": ids, "decoder_input_ids": changed.flip(0)[:, -9:]}, all_rows
        yield "right", {"input_ids": ids, "attention_mask": right.long(), **dec}, all_rows
        yield "left", {"input_ids": ids, "attention_mask": left.long(), **dec}, all_rows
        return
    yield "logits", {"input_ids": ids}, everything
    yield "changed", {"input_ids": changed}, everything
    yield "right", {"input_ids": ids, "attention_mask": right.long()}, right
    yield "left", {"input_ids": ids, "attention_mask": left.long()}, left
    if kind == "causal":
        packed = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]] * 2)
        yield "packed", {"input_ids": ids, "position_ids": packed, "use_cache": False}, everything
        yield "packed, cache", {"input_ids": ids, "position_ids": packed}, everything
        ones = {"attention_mask": everything.long()}
        yield "packed, mask", {"input_ids": ids, "position_ids": packed, **ones}, everything


def on_device(arguments):
    """The arguments with their tensors on the lab's device."""
    return {k: v.to(runtime.device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def is_ours(error):
    """Whether the error was raised by a line of labutils, or by `dense` in its place."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return "labutils" in last.filename or last.name == "dense"


def outcome(model, kind, seconds=120):
    """For each case: "right", "refused: ...", or what is wrong; and how often our attention was called.

    Padded rows and packed rows are only compared if standard attention can compute them.
    """
    found, calls = {}, [0]
    try:
        lab = ours(model)
    except Exception as error:
        return {"made": f"refused: {error}" if is_ours(error) else f"ERROR {type(error).__name__}: {error}"}, 0
    real = attention._known

    def counted(kwargs):
        calls[0] += 1
        return real(kwargs)

    attention._known = counted
    try:
        with torch.no_grad(), at_most(seconds):
            for name, arguments, rows in cases(kind):
                arguments, rows = on_device(arguments), rows.to(runtime.device)
                try:
                    want = model(**arguments).logits[rows]
                except Exception as error:
                    found[name] = f"eager cannot: {type(error).__name__}"
                    continue
                try:
                    got = lab(**arguments).logits[rows]
                except Exception as error:
                    said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                    found[name] = f"refused: {said}" if is_ours(error) else f"ERROR {said}"
                    continue
                off = (got - want).abs().max().item() / max(want.abs().max().item(), 1e-6)
                found[name] = "right" if off < 2e-3 else f"WRONG by {off:.2g} of the largest logit"
    finally:
        attention._known = real
    return found, calls[0]


def dense(q, k, v, dropout=0.0, softmax_scale=None, causal=False, leftpad=None):
    """Attention as PyTorch computes it, in place of our kernels: the interpreter would take an hour for all models."""
    if q.shape[-1] != v.shape[-1] or q.shape[-1] != k.shape[-1]:
        raise ValueError("labutils: v has another head dimension")
    if q.shape[-1] > 256 or q.shape[2] % k.shape[2]:
        raise ValueError("labutils: head dimension or heads")
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    n, m = q.shape[2], k.shape[2]
    mask = torch.ones(len(q), 1, n, m, dtype=torch.bool)
    if causal:
        mask &= torch.ones(n, m, dtype=torch.bool).tril(m - n)
    if leftpad is not None:
        mask &= (torch.arange(m) >= leftpad[:, None])[:, None, None]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=softmax_scale)
    return out.transpose(1, 2)


def dense_varlen(q, k, v, starts_q, starts_k, longest_q, longest_k, dropout=0.0, softmax_scale=None, causal=False):
    """`dense`, for sequences of different lengths."""
    parts = []
    for i in range(len(starts_q) - 1):
        a, b = slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])
        parts.append(dense(q[a][None], k[b][None], v[b][None], dropout, softmax_scale, causal)[0])
    return torch.cat(parts)


def main(*names):
    """Prints the outcome of each architecture, or of those named by kind or configuration, and counts the outcomes."""
    attention.register_attention()
    if runtime.device.type == "cpu":
        attention.flash_attn_func = dense
        attention.flash_attn_varlen_func = dense_varlen
        attention.flash_attn_with_kvcache = lambda q, k, v, cache_seqlens, cache_leftpad, softmax_scale, causal: dense(
            q, k, v, 0.0, softmax_scale, causal, cache_leftpad
        )
    total = collections.Counter()
    for kind, mapping in KINDS.items():
        for config_class in mapping:
            name = config_class.__name__.removesuffix("Config")
            if names and name not in names and kind not in names:
                continue
            classes = mapping[config_class]
            model_class = classes[0] if isinstance(classes, tuple) else classes
            try:
                with at_most(60):
                    model = small_model(config_class, model_class, kind)
            except Exception as error:
                total[kind, "not built"] += 1
                print(f"{kind:8} {name:26} NOT BUILT {type(error).__name__}: {str(error)[:110]!r}", flush=True)
                continue
            try:
                found, calls = outcome(model, kind)
            except Exception as error:
                found, calls = {"all": f"ERROR {type(error).__name__}: {error}"}, 0
            worst = ("WRONG", "ERROR", "refused", "right")
            for case, result in found.items():
                total[kind, case, next((w for w in worst if result.startswith(w)), "eager cannot")] += 1
            said = "; ".join(f"{case}: {result[:170]}" for case, result in found.items())
            print(f"{kind:8} {name:26} calls {calls:3} {said}", flush=True)
    for key, count in sorted(total.items()):
        print(*key, count)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
