"""Whether a training step fits into memory: `try_step` trains a few steps and gives a row of training.csv."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch

from labutils.attention.backends import name_in_tables
from labutils.machine import runtime
from labutils.machine.memory import free_memory, memory_cap
from labutils.training.loop import History, train

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel


def try_step(
    model_factory: Callable[[], GPT2LMHeadModel],
    seqlen: int,
    batch: int = 1,
    *,
    cap_gib: float | None = None,
    batches: Iterable[torch.Tensor] | None = None,
    steps: int = 3,
    impl: str | None = None,
    checkpointing: bool | Literal["offloaded"] = False,
    chunked_loss: int | None = None,
    **train_options: Any,
) -> dict[str, Any]:
    """Trains a few steps and reports whether they fit: a row of training.csv.

    The model is made (on the GPU, if there is one), trained and deleted here. So running out of memory is a row and not
    the end: afterwards the memory is free again, and the next call starts afresh.

    Args:
        model_factory: makes the model: `lambda: gpt2("124M", n_positions=8192, attention="eager")`.
        seqlen: N.
        batch: B.
        cap_gib: train under `memory_cap(cap_gib)`; None sets no cap.
        batches: int64 (batch, seqlen) each, at least `steps` of them. None draws random tokens, which take the same
            time and memory as text (only their loss means nothing).
        steps: 2 or more for the peak, because the optimizer's state does not exist in the first step; 3 or more for the
            speed, because the first two steps are slower.
        impl: the column `impl`; by default `backends.name_in_tables` of the model's attention.
        checkpointing, chunked_loss: as for `train`.
        train_options: further arguments of `train`.

    Returns:
        The columns of training.csv: model, impl, checkpointing, chunked_loss, seqlen, batch, cap_gib, and

        - peak_gib, reserved_gib: peaks of allocated and reserved memory;
        - tokens_per_s: median from the third step on; of fewer steps, the last;
        - loss: of the last step;
        - status: "ok", or "oom" with NaN for everything that was not measured.

    Raises:
        ValueError: the batches have another shape, or end before `steps`.
        KeyboardInterrupt: the run was interrupted, so there is no measurement.
    """
    row: dict[str, Any] = {
        "model": None, "impl": impl, "checkpointing": bool(checkpointing), "chunked_loss": chunked_loss is not None,
        "seqlen": seqlen, "batch": batch, "peak_gib": math.nan, "reserved_gib": math.nan,
        "cap_gib": math.nan if cap_gib is None else cap_gib, "tokens_per_s": math.nan, "loss": math.nan,
        "status": "oom",
    }  # fmt: skip
    model = history = None
    if cap_gib is None:
        free_memory()  # memory_cap does the same
    with memory_cap(cap_gib) if cap_gib is not None else nullcontext():
        try:
            with torch.device(runtime.device):  # drawing a large model's weights on the CPU takes longer than its steps
                model = model_factory()
            row |= _names(model, impl)
            model.to(runtime.device)
            free_memory()  # memory that only the making of the model needed
            if batches is None:
                batches = _random_batches(model.config.vocab_size, (batch, seqlen))
            history = train(
                model,
                _checked(batches, (batch, seqlen)),
                steps=steps,
                checkpointing=checkpointing,
                chunked_loss=chunked_loss,
                **({"progress": False} | train_options),
            )
        except torch.OutOfMemoryError:
            # Nothing may keep the exception, because its traceback holds every tensor of the failed step. At the end of
            # this block it is gone, and the memory can be freed.
            pass
        del model
        free_memory()
    return row if history is None else row | _measured(history, steps)


def _names(model: GPT2LMHeadModel, impl: str | None) -> dict[str, str]:
    """The names of the model and of its attention in the tables; `impl` replaces the second if given."""
    return {
        "model": getattr(model.config, "lab_size", type(model).__name__),
        "impl": impl or name_in_tables(model.config._attn_implementation),
    }


def _measured(history: History, steps: int) -> dict[str, Any]:
    """The measured columns of a row of training.csv; raises the errors of `try_step` if the run did not finish."""
    history.require(steps)
    last = history.frame.iloc[-1].to_dict()
    return {
        "peak_gib": last["peak_allocated_gib"],
        "reserved_gib": last["peak_reserved_gib"],
        "tokens_per_s": history.frame["tokens_per_s"].iloc[min(2, len(history.frame) - 1) :].median(),
        "loss": last["loss"],
        "status": "ok",
    }


def _random_batches(vocab_size: int, shape: tuple[int, int]) -> Iterator[torch.Tensor]:
    """Random batches without end, the same in each call."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(vocab_size, shape, generator=generator)


def _checked(batches: Iterable[torch.Tensor], shape: tuple[int, int]) -> Iterator[torch.Tensor]:
    """The batches, with a check that each has the shape that the row of training.csv states."""
    for batch in batches:
        if tuple(batch.shape) != shape:
            raise ValueError(f"batches must be (batch, seqlen) = {shape}, got {tuple(batch.shape)}")
        yield batch
