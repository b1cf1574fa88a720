"""Rotary positions for GPT-2, and the loss by position: what a model knows of the order, and of what it read long ago.

`use_rope` turns a GPT-2 of `labutils.gpt2.models.gpt2` into one with rotary positions (RoPE, Su et al. 2021, arXiv
2104.09864): queries and keys turn with their position, so that a score depends on their distance alone, and there is
no table of positions to outgrow. It works below any attention implementation, since it turns the projection that all
of them are given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from labutils.machine import runtime

if TYPE_CHECKING:
    import pandas as pd
    from transformers import GPT2LMHeadModel

BASE = 10_000.0
"""The base of the frequencies in the paper, section 3.2.2."""


def rope_angles(positions: torch.Tensor, head_dim: int, base: float = BASE) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the angles p · base^(-2i/D), i < D/2.

    Args:
        positions: integers (..., N).
        head_dim: D, even.
        base: larger ones turn the last dimensions more slowly, for longer contexts.

    Returns:
        (cos, sin), float32 (..., N, D/2). The angles are computed in float64: at position 100,000 float32 would know
        the fastest of them to 0.004 only.

    Raises:
        ValueError: an odd `head_dim`, or a base that is not above 1.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"rotary positions turn pairs of dimensions: head_dim must be even, got {head_dim}")
    if not base > 1.0:
        raise ValueError(f"base must be greater than 1, got {base}: 10,000 is usual")
    pair = torch.arange(head_dim // 2, dtype=torch.float64, device=positions.device)
    angles = positions.double()[..., None] * base ** (-2 * pair / head_dim)  # θ_pi = p · b^(-2i/D)
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x turned by its positions; dimension i is paired with i + D/2 (flash-attn's `interleaved=False`).

    Args:
        x: (..., N, H, D), any floating dtype. The rotation is computed in float32.
        cos, sin: of `rope_angles`, (..., N, D/2).

    Returns:
        (..., N, H, D), in x's dtype.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if x.ndim < 3 or cos.shape != sin.shape or cos.shape[-2:] != (x.shape[-3], x.shape[-1] // 2):
        raise ValueError(
            f"x is (..., N, H, D) and cos and sin are (..., N, D/2); got {tuple(x.shape)}, {tuple(cos.shape)} and "
            f"{tuple(sin.shape)}"
        )
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (..., N, D/2) -> (..., N, 1, D/2), for all heads
    first, second = x.float().chunk(2, dim=-1)
    # x'_i = x_i cos θ - x_{i+D/2} sin θ,  x'_{i+D/2} = x_{i+D/2} cos θ + x_i sin θ
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def rope_by_complex_numbers(x: torch.Tensor, positions: torch.Tensor, base: float = BASE) -> torch.Tensor:
    """The same by one complex product, e^{iθ}(x_i + i·x_{i+D/2}), in float64: what `apply_rope` is checked against.

    Args:
        x: (..., N, H, D).
        positions: integers (N,).
        base: as for `rope_angles`.

    Returns:
        float64 (..., N, H, D).
    """
    depth = x.shape[-1]
    number = torch.complex(*x.double().chunk(2, dim=-1))  # (..., N, H, D/2)
    frequency = base ** (-torch.arange(0, depth, 2, dtype=torch.float64, device=x.device) / depth)
    turn = torch.polar(torch.ones_like(frequency).expand(len(positions), -1), positions.double()[:, None] * frequency)
    turned = number * turn[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


class _NoTable(torch.nn.Module):
    """Stands where GPT-2 looks up a vector for each position: it adds nothing."""

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), device=position_ids.device)


def use_rope(model: GPT2LMHeadModel, base: float = BASE) -> GPT2LMHeadModel:
    """Gives a GPT-2 rotary positions in place of its learned table; returns the model, which is changed.

    The positions are those that the model is called with (`position_ids`), 0 to N - 1 otherwise.

    Args:
        model: a GPT-2 of `labutils.gpt2.models.gpt2`, on any device.
        base: as for `rope_angles`.

    Raises:
        ValueError: the model has rotary positions already, an odd head dimension, or a base that is not above 1.
    """
    if getattr(model.config, "lab_rope_base", None) is not None:
        raise ValueError("this model has rotary positions already")
    heads = model.config.n_head
    rope_angles(torch.zeros(1), model.config.n_embd // heads, base)  # raises where it cannot work
    for block in model.transformer.h:
        place: dict[str, Any] = {}

        def note(module: Any, args: Any, kwargs: Any, place: dict[str, Any] = place) -> None:
            place["positions"] = kwargs.get("position_ids")

        def turn(module: Any, args: Any, qkv: Any, place: dict[str, Any] = place) -> Any:
            positions = place["positions"]
            if positions is None:
                positions = torch.arange(qkv.shape[1], device=qkv.device)[None]
            q, k, v = qkv.view(*qkv.shape[:2], 3, heads, -1).unbind(2)  # (B, N, 3·C) -> 3 × (B, N, H, D)
            cos, sin = rope_angles(positions, q.shape[-1], base)  # positions: (1, N) or (B, N)
            turned = (apply_rope(t, cos.expand(len(t), -1, -1), sin.expand(len(t), -1, -1)) for t in (q, k))
            return torch.cat([t.flatten(2) for t in (*turned, v)], dim=-1)

        block.attn.register_forward_pre_hook(note, with_kwargs=True)
        block.attn.c_attn.register_forward_hook(turn)
    model.transformer.wpe = _NoTable()
    model.config.lab_rope_base = base
    return model


# ------------------------------------------------------------------------------------------------------------
# Loss by position
# ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def token_losses(
    model: GPT2LMHeadModel, tokens: torch.Tensor, *, context: int | None = None, chunk: int = 2048
) -> torch.Tensor:
    """The loss of each token of each sequence, in nats: float32 (S, N - 1) on the CPU, entry i is token i + 1's.

    Args:
        model: a GPT-2 language model, on any device; it is left as it was.
        tokens: int64 (S, N).
        context: the longest context that a token may have. The sequence is read in windows of this many tokens, each
            of which begins in the middle of the one before: from the second on, a token has between half of it and
            all of it before it. None: the whole sequence.
        chunk: positions whose logits exist at a time.

    Raises:
        ValueError: `tokens` are not (S, N) with N of 2 or more, or `context` is odd or below 2.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(f"tokens must be (S, N), N of 2 or more, so that one is predicted; got {tuple(tokens.shape)}")
    length = tokens.shape[1]
    context = length if context is None or context >= length else context
    if context < 2 or (context < length and context % 2):
        raise ValueError(f"context must be an even number of tokens, got {context}")
    on_gpu = model.device.type == "cuda"
    was_training = model.training
    model.eval()
    result = torch.empty(len(tokens), length - 1)
    try:
        for row, sequence in zip(result, tokens, strict=True):
            known = 0  # tokens 1 to `known` have their loss
            for start in range(0, max(length - context // 2, 1), max(context // 2, 1)):
                window = sequence[start : start + context].to(model.device)
                with torch.autocast(model.device.type, dtype=runtime.dtype, enabled=on_gpu):
                    hidden = model.transformer(window[None], use_cache=False).last_hidden_state[0, :-1]
                    for i in range(0, len(hidden), chunk):
                        logits = model.lm_head(hidden[i : i + chunk]).float()
                        wanted = window[i + 1 : i + 1 + len(logits)]
                        losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none").cpu()
                        fresh = max(known - (start + i), 0)  # the part that the window before has seen with less
                        row[start + i + fresh : start + i + len(losses)] = losses[fresh:]
                known = min(start + context, length) - 1
                if known == length - 1:
                    break
    finally:
        model.train(was_training)
    return result


def by_position(losses: torch.Tensor, edges: Sequence[int]) -> pd.DataFrame:
    """Mean loss of the tokens between two positions, over sequences, with the standard error of that mean.

    Tokens of one text resemble each other, so a sequence counts as one observation: the error is the standard
    deviation of the sequences' means, divided by the root of their number.

    Args:
        losses: (S, N - 1) of `token_losses`, or a difference of two of them.
        edges: positions, ascending: n edges are n - 1 rows.

    Returns:
        Columns from, to (tokens from <= position < to), mean, error (nats per token), sequences.

    Raises:
        ValueError: fewer than two sequences, or edges that are not ascending within 1 to N.
    """
    import pandas as pd

    if len(losses) < 2:
        raise ValueError(f"an error bar needs two sequences or more, got {len(losses)}")
    if list(edges) != sorted(set(edges)) or len(edges) < 2 or edges[0] < 1 or edges[-1] > losses.shape[1] + 1:
        raise ValueError(f"edges must ascend from 1 or more to N = {losses.shape[1] + 1} or less, got {list(edges)}")
    rows = []
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        means = losses[:, begin - 1 : end - 1].double().mean(dim=1)  # entry i is the loss of token i + 1
        error = means.std().item() / len(means) ** 0.5
        rows.append({"from": begin, "to": end, "mean": means.mean().item(), "error": error, "sequences": len(means)})
    return pd.DataFrame(rows)


def fall(losses: torch.Tensor, early: tuple[int, int], late: tuple[int, int]) -> tuple[float, float]:
    """How much lower the loss is late in a document than early in it, with the standard error, in nats per token.

    Each sequence is compared with itself: that some files are harder than others, from their first token to their last,
    is no part of the error.

    Args:
        losses: (S, N - 1) of `token_losses`.
        early, late: positions (from, to) as `by_position` has them.

    Returns:
        Mean and standard error, over sequences, of the mean loss in `early` minus that in `late`.

    Raises:
        ValueError: as `by_position`.
    """
    for edges in (early, late):
        by_position(losses, edges)  # raises where they do not fit
    before, after = (losses[:, begin - 1 : end - 1].double().mean(dim=1) for begin, end in (early, late))
    lower = before - after
    return lower.mean().item(), lower.std().item() / len(lower) ** 0.5


def long_documents(texts: Iterable[str], tokenizer: Any, length: int) -> torch.Tensor:
    """The first `length` tokens of each document that has so many: int64 (S, length).

    Loss by position needs text of one document from its beginning: in packed sequences position 4,000 of a row may be
    the first line of a file.

    Args:
        texts: the documents.
        tokenizer: of `labutils.gpt2.data.train_tokenizer`, or any `tokenizers.Tokenizer`.
        length: in tokens.

    Raises:
        ValueError: no document is that long.
    """
    encoded = (encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False))
    rows = [ids[:length] for ids in encoded if len(ids) >= length]
    if not rows:
        raise ValueError(f"no document has {length:,} tokens: ask for fewer, or pass longer documents")
    return torch.tensor(rows, dtype=torch.int64)
