"""Does another attention train the same model? The yardstick is standard attention, summed in another order.

Two runs that differ in the order of their sums alone drift apart, a little at each step, since floating-point addition
is not associative. An attention that computes the same thing drifts from standard attention much as these do from each
other.

A run in 32 bits says more: all runs in 16 bits err, standard attention's as well, and the question is whether an
attention errs more than it. That is how `attention.reference.judge` judges a single result; here it is asked of a loss.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from labutils import training

if TYPE_CHECKING:
    import pandas as pd
    from transformers import GPT2LMHeadModel

OTHER_ORDERS = ("eager, keys reversed", "eager, dimensions reversed", "eager, in halves")
"""Runs of standard attention that differ from it in the order of their sums alone."""
EXACT = "eager, float32"
"""The run without autocast, from which the others' errors are counted."""


def implementation_of(name: str) -> str:
    """What transformers knows a run's attention as: "eager-keys-reversed" for "eager, keys reversed"."""
    return name.replace(", ", "-").replace(" ", "-")


def register_other_orders() -> None:
    """Registers with transformers the attentions of `OTHER_ORDERS`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    for name, attention in zip(OTHER_ORDERS, (_keys_reversed, _dimensions_reversed, _in_halves), strict=True):
        AttentionInterface.register(implementation_of(name), attention)
        AttentionMaskInterface.register(implementation_of(name), eager_mask)


def _keys_reversed(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Standard attention whose sums over keys, of the softmax and of P·V, begin with the last."""
    from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward

    mask = None if attention_mask is None else attention_mask.flip(-1)
    return eager_attention_forward(module, query, key.flip(2), value.flip(2), mask, scaling, dropout)


def _dimensions_reversed(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Standard attention whose sum of Q·K begins with the last dimension."""
    from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward

    return eager_attention_forward(module, query.flip(3), key.flip(3), value, attention_mask, scaling, dropout)


def _in_halves(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Standard attention whose products are sums of two, over half of the dimensions and half of the keys.

    Turning a sum round leaves the rounding to 16 bits, of scores and of probabilities, where it was; this moves it.
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
    """Losses of one training run with each attention: standard ("eager"), in other orders, those in question, and
    standard attention in float32 throughout.

    Args:
        make_model: from the name of an attention and a seed; with the same weights for each attention.
        make_batches: from a seed, `steps` batches, int64 (B, N) each; the same ones for each attention.
        attentions: those in question.
        steps: of each run.
        seeds: all runs are made once for each; at least one.
        options: of `labutils.training.train`.

    Returns:
        A row for each seed and step, a column for each run, in nats per token.

    Raises:
        ValueError: the batches ended before the steps did, or there is no seed.
        KeyboardInterrupt: a run was interrupted, and what it has is no measurement of all its steps.
    """
    import pandas as pd

    register_other_orders()
    parts = {}
    for seed in dict.fromkeys(seeds):
        columns = {}
        for name in (EXACT, "eager", *OTHER_ORDERS, *attentions):
            exact = {"autocast_dtype": None} if name == EXACT else {}
            model = make_model("eager" if exact else implementation_of(name), seed)
            history = training.train(model, make_batches(seed), steps=steps, **({"progress": False} | options | exact))
            if history.interrupted:
                raise KeyboardInterrupt
            if history.status != "done":
                raise ValueError(f"the batches ended after {history.steps} of {steps} steps: pass one for each step")
            columns[name] = history.frame.set_index("step")["loss"]
            del model
        parts[seed] = pd.DataFrame(columns)
    if not parts:
        raise ValueError("no seed is given: pass one or more, such as seeds=(0,)")
    return pd.concat(parts, names=["seed"])


def judge_parity(losses: pd.DataFrame, factor: float = 2.0) -> pd.DataFrame:
    """How far each run's losses are from those of standard attention, in nats per token, over all seeds and steps.

    Args:
        losses: of `loss_parity`, in nats per token.
        factor: how much more than standard attention's largest error, in any order, an attention may err.

    Returns:
        A row for each run but the one in float32: run; rms_from_eager, the root-mean-square distance from "eager" in
        nats per token; in_spread, whether that is no larger than the largest between two runs of standard attention in
        different orders; error, the median distance from the run in float32 in nats per token, which a single step that
        overshoots does not decide; and within, whether that is no larger than `factor` times the largest of standard
        attention's.
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
