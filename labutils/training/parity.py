"""Whether another attention trains the same model: a comparison of its losses with standard attention.

Floating-point addition is not associative. So two runs of standard attention that sum in another order drift apart, a
little at each step. An attention that computes the same thing drifts from standard attention by about as much.

A run in 32 bits says more. All runs in 16 bits have errors, also those of standard attention. The question is whether
another attention has larger ones. `attention.reference.judge` compares single results in the same way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from labutils.training.loop import train

if TYPE_CHECKING:
    import pandas as pd
    from transformers import GPT2LMHeadModel

OTHER_ORDERS = ("eager, keys reversed", "eager, dimensions reversed", "eager, in halves")
"""Runs of standard attention that differ from it only in the order of their sums."""
EXACT = "eager, float32"
"""The run without autocast. The errors of the other runs are their distances from it."""


def implementation_of(name: str) -> str:
    """The name in transformers of a run's attention: "eager-keys-reversed" for "eager, keys reversed"."""
    return name.replace(", ", "-").replace(" ", "-")


def register_other_orders() -> None:
    """Registers the attentions of `OTHER_ORDERS` with transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    for name, attention in zip(OTHER_ORDERS, (_keys_reversed, _dimensions_reversed, _in_halves), strict=True):
        AttentionInterface.register(implementation_of(name), attention)
        AttentionMaskInterface.register(implementation_of(name), eager_mask)


def _keys_reversed(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Standard attention whose sums over keys, in the softmax and in P·V, begin with the last key."""
    from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward

    mask = None if attention_mask is None else attention_mask.flip(-1)
    return eager_attention_forward(module, query, key.flip(2), value.flip(2), mask, scaling, dropout)


def _dimensions_reversed(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Standard attention whose sum of Q·K begins with the last dimension."""
    from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward

    return eager_attention_forward(module, query.flip(3), key.flip(3), value, attention_mask, scaling, dropout)


def _in_halves(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Standard attention whose products are sums of two products, over halves of the dimensions and of the keys.

    Reversing a sum does not change where scores and probabilities are rounded to 16 bits; this does.
    """
    d, n = query.shape[-1] // 2, key.shape[2] // 2
    scores = query[..., :d] @ key[..., :d].transpose(2, 3) + query[..., d:] @ key[..., d:].transpose(2, 3)
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.nn.functional.softmax(scores, dim=-1).to(value.dtype)
    weights = torch.nn.functional.dropout(weights, dropout, module.training)
    out = weights[..., :n] @ value[:, :, :n] + weights[..., n:] @ value[:, :, n:]
    return out.transpose(1, 2).contiguous(), None


def loss_parity(
    make_model: Callable[[str, int], GPT2LMHeadModel],
    make_batches: Callable[[int], Iterable[torch.Tensor]],
    attentions: Iterable[str] = ("labutils",),
    *,
    steps: int,
    seeds: Iterable[int] = (0,),
    **options: Any,
) -> pd.DataFrame:
    """Losses of one training run with each attention: standard ("eager"), in other orders, in float32, and others.

    Args:
        make_model: makes a model from the name of an attention and a seed, with the same weights for each attention.
        make_batches: makes `steps` batches from a seed, int64 (B, N) each, the same for each attention.
        attentions: the attentions to compare with standard attention.
        steps: steps of each run.
        seeds: at least one; each seed repeats all runs.
        options: of `labutils.training.train`.

    Returns:
        A row for each seed and step, a column for each run, in nats per token.

    Raises:
        ValueError: the batches ended before the steps did, or there is no seed.
        KeyboardInterrupt: a run was interrupted, so its losses are incomplete.
    """
    import pandas as pd

    register_other_orders()
    parts = {}
    for seed in dict.fromkeys(seeds):
        columns = {}
        for name in (EXACT, "eager", *OTHER_ORDERS, *attentions):
            exact = {"autocast_dtype": None} if name == EXACT else {}
            model = make_model("eager" if exact else implementation_of(name), seed)
            history = train(model, make_batches(seed), steps=steps, **({"progress": False} | options | exact))
            history.require(steps)
            columns[name] = history.frame.set_index("step")["loss"]
            del model
        parts[seed] = pd.DataFrame(columns)
    if not parts:
        raise ValueError("no seed is given: pass one or more, such as seeds=(0,)")
    return pd.concat(parts, names=["seed"])


def judge_parity(losses: pd.DataFrame, factor: float = 2.0) -> pd.DataFrame:
    """How far each run's losses are from those of standard attention, over all seeds and steps.

    Args:
        losses: of `loss_parity`, in nats per token.
        factor: the limit of an error, as a multiple of the largest error of standard attention in any order.

    Returns:
        A row for each run except the one in float32, with the columns

        - run;
        - rms_from_eager: the root-mean-square distance from "eager", in nats per token;
        - in_spread: whether that is at most the largest distance between two runs of standard attention;
        - error: the median distance from the run in float32, in nats per token. A median, so that a single step that
          overshoots does not decide;
        - within: whether the error is at most `factor` times the largest error of standard attention.
    """
    import pandas as pd

    def rms(a: str, b: str) -> float:
        return ((losses[a] - losses[b]) ** 2).mean() ** 0.5

    def error(a: str) -> float:
        return (losses[a] - losses[EXACT]).abs().median()

    standard = ["eager", *OTHER_ORDERS]
    spread = max(rms(a, b) for a, b in itertools.combinations(standard, 2))
    allowed = factor * max(error(name) for name in standard)
    rows = [
        {"run": name, "rms_from_eager": rms(name, "eager"), "in_spread": rms(name, "eager") <= spread,
         "error": error(name), "within": error(name) <= allowed}
        for name in losses.columns if name != EXACT
    ]  # fmt: skip
    return pd.DataFrame(rows)
