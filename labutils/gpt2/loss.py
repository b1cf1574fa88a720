"""The loss of a language model: for training, whole or in chunks, and token by token, by its position.

`language_model_loss` is the mean over a batch, the quantity that training lowers. `token_losses` keeps the loss of each
token apart. `by_position` and `fall` then show what a model gains from the text far back in its context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from labutils.gpt2.packing import document_borders, document_positions
from labutils.machine import runtime

if TYPE_CHECKING:
    import pandas as pd
    from transformers import GPT2LMHeadModel

_IGNORED = -100  # PyTorch's cross-entropy leaves out predictions with this target


def language_model_loss(
    model: GPT2LMHeadModel,
    tokens: torch.Tensor,
    *,
    chunked_loss: int | None = None,
    end_of_text: int | None = None,
) -> torch.Tensor:
    """Mean cross-entropy, in nats, of each token given the tokens before it.

    The logits are the largest tensor in the training of a small model on a long sequence: N x vocabulary, in float32,
    several copies at a time. With `chunked_loss` they exist for only that many positions at once. The backward pass
    computes them again. Loss and gradients are the same up to rounding, for one more product with the output matrix.

    Args:
        model: a GPT-2 language model.
        tokens: int64 (B, N), input and target at once; position i predicts token i + 1.
        chunked_loss: positions per chunk, counted over the batch, or None for the model's own loss.
        end_of_text: the token that ends a document in packed sequences. If given, documents are kept apart: attention
            stays within a document, positions begin at 0 in each, and no document's first token is predicted from the
            document before. Our attention gets the borders ("varlen"); the others get a mask of N x N bits.

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
    """Arguments for a call of the model that keep packed documents apart: no document sees another.

    Args:
        model: a GPT-2 of `labutils.gpt2.models.gpt2`; only its attention matters here.
        tokens: int64 (B, N), rows of `labutils.gpt2.packing.pack`.
        end_of_text: the token that ends a document.

    Returns:
        Keyword arguments for the model: `position_ids`, int64 (B, N), from 0 in each document. For our attention also
        the borders, `cu_seq_lens_q` and `cu_seq_lens_k`, int32 (documents + 1,), over the B * N tokens.

    Raises:
        ValueError: tokens that are not (B, N).
    """
    positions = document_positions(tokens, end_of_text)
    if model.config._attn_implementation != "labutils":
        return {"position_ids": positions}  # transformers makes a mask from positions that restart
    borders = document_borders(tokens, end_of_text)
    longest = int(borders.diff().max())
    return {
        "position_ids": positions,
        # Nothing is padded. With this mask of ones, transformers does not make its own mask from the positions.
        "attention_mask": torch.ones_like(tokens, dtype=torch.bool),
        "cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip


def _chunk_loss(lm_head: torch.nn.Module, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The sum of the losses of some positions, in float32; hidden: (n, C), target: int64 (n,)."""
    return F.cross_entropy(lm_head(hidden).float(), target, reduction="sum")


# ------------------------------------------------------------------------------------------------------------
# Loss by position
# ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def token_losses(
    model: GPT2LMHeadModel, tokens: torch.Tensor, *, context: int | None = None, chunk: int = 2048
) -> torch.Tensor:
    """The loss of each token of each sequence, in nats.

    Args:
        model: a GPT-2 language model, on any device; it is left unchanged.
        tokens: int64 (S, N): S sequences.
        context: the longest context of a token. The sequence is read in windows of this many tokens. Each window begins
            in the middle of the one before, so from the second window on a token has between half of the context and
            all of it before it. None: the whole sequence.
        chunk: number of positions whose logits exist at a time.

    Returns:
        float32 (S, N - 1) on the CPU; entry i is the loss of token i + 1.

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
                        losses = F.cross_entropy(logits, wanted, reduction="none").cpu()
                        fresh = max(known - (start + i), 0)  # skips tokens that the window before has done
                        row[start + i + fresh : start + i + len(losses)] = losses[fresh:]
                known = min(start + context, length) - 1
                if known == length - 1:
                    break
    finally:
        model.train(was_training)
    return result


def by_position(losses: torch.Tensor, edges: Sequence[int]) -> pd.DataFrame:
    """Mean loss of the tokens between two positions, over sequences, with the standard error of that mean.

    Tokens of one text resemble each other, so a sequence counts as one observation. The error is the standard deviation
    of the sequences' means, divided by the square root of the number of sequences.

    Args:
        losses: (S, N - 1) of `token_losses`, or the difference of two such tensors.
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

    Each sequence is compared with itself. So the error leaves out that some files are harder throughout.

    Args:
        losses: (S, N - 1) of `token_losses`.
        early, late: positions (from, to), as in `by_position`.

    Returns:
        Mean and standard error, over sequences, of the mean loss in `early` minus the mean loss in `late`.

    Raises:
        ValueError: as `by_position`.
    """
    for edges in (early, late):
        by_position(losses, edges)  # raises if they do not fit
    before, after = (losses[:, begin - 1 : end - 1].double().mean(dim=1) for begin, end in (early, late))
    lower = before - after
    return lower.mean().item(), lower.std().item() / len(lower) ** 0.5
