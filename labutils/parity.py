"""Does another attention train the same model? The yardstick is standard attention, summed in another order.

Two runs that differ in the order of their sums alone drift apart, a little at each step, since floating-point addition
is not associative. An attention that computes the same thing drifts as far from standard attention as these do from
each other, and no further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from labutils import training

if TYPE_CHECKING:
    import pandas as pd
    from transformers import GPT2LMHeadModel

OTHER_ORDERS = ("eager, keys reversed", "eager, dimensions reversed")


def implementation_of(name: str) -> str:
    """What transformers knows a run's attention as: "eager-keys-reversed" for "eager, keys reversed"."""
    return name.replace(", ", "-").replace(" ", "-")


def register_other_orders() -> None:
    """Registers with transformers the attentions of `OTHER_ORDERS`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    for name, (keys, dimensions) in {
        "eager-keys-reversed": (True, False),
        "eager-dimensions-reversed": (False, True),
    }.items():

        def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, keys=keys,
                      dimensions=dimensions, **kwargs):  # fmt: skip
            from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward

            if keys:  # the sums over keys, of the softmax and of P·V, begin with the last
                key, value = key.flip(2), value.flip(2)
                attention_mask = None if attention_mask is None else attention_mask.flip(-1)
            if dimensions:  # the sum of Q·K begins with the last dimension
                query, key = query.flip(3), key.flip(3)
            return eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout)

        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, eager_mask)


def loss_parity(
    make_model: Callable[[str], GPT2LMHeadModel],
    make_batches: Callable[[], Iterable[torch.Tensor]],
    attentions: Iterable[str] = ("labutils",),
    *,
    steps: int,
    **options: Any,
) -> pd.DataFrame:
    """Losses of one training run with each attention: standard ("eager"), in other orders, and those in question.

    Args:
        make_model: from the name of an attention; with the same weights for each.
        make_batches: the same batches at each call.
        attentions: those in question.
        steps: of each run.
        options: of `training.train`.

    Returns:
        A row for each step, a column for each run, in nats per token.
    """
    import pandas as pd

    register_other_orders()
    columns = {}
    for name in ("eager", *OTHER_ORDERS, *attentions):
        model = make_model(implementation_of(name))
        history = training.train(model, make_batches(), steps=steps, **({"progress": False} | options))
        if history.interrupted:
            raise KeyboardInterrupt
        columns[name] = history.frame.set_index("step")["loss"]
        del model
    return pd.DataFrame(columns)


def judge_parity(losses: pd.DataFrame) -> pd.DataFrame:
    """The largest and the root-mean-square distance of each run from "eager", in nats per token.

    Returns:
        A row for each run: run, largest, rms, and `within`: whether its rms is no larger than the largest that any
        pair of standard runs in different orders has. For those runs themselves it is True by definition.
    """
    import itertools

    import pandas as pd

    standard = ["eager", *OTHER_ORDERS]
    rms = lambda a, b: ((losses[a] - losses[b]) ** 2).mean() ** 0.5  # noqa: E731
    spread = max(rms(a, b) for a, b in itertools.combinations(standard, 2))
    rows = [
        {"run": name, "largest": (losses[name] - losses["eager"]).abs().max(), "rms": rms(name, "eager"),
         "within": rms(name, "eager") <= spread}
        for name in losses.columns if name != "eager"
    ]  # fmt: skip
    return pd.DataFrame(rows)
