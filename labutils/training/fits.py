"""`try_step`: whether a step fits, found out by training a few, as a row of training.csv."""

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
    """Train a few steps and report whether they fit: a row of training.csv.

    The model is made (on the GPU, where there is one), trained and thrown away here, so that out-of-memory is a row
    and not an end: afterwards its memory is free again and the next call starts from nothing.

    Args:
        model_factory: makes the model: `lambda: gpt2("124M", n_positions=8192, attention="eager")`.
        seqlen: N.
        batch: B.
        cap_gib: train under `memory_cap(cap_gib)`; None sets no cap.
        batches: int64 (batch, seqlen) each, `steps` of them at least; None draws random tokens, which take the same
            time and memory as text (their loss says nothing).
        steps: 2 or more for the peak, since the optimizer's state is not there in the first; 3 or more for the speed,
            since the first two are slower.
        impl: the name of the row; None: what tables call the model's attention (`backends.name_in_tables`).
        checkpointing: as for `train`.
        chunked_loss: as for `train`.
        train_options: further arguments of `train`.

    Returns:
        model, impl, checkpointing, chunked_loss, seqlen, batch, peak_gib (allocated), reserved_gib, cap_gib,
        tokens_per_s (the median of the steps from the third on; the last step's where there are fewer), loss (the last
        step's), status: "ok", or "oom" with NaN for what was not measured.

    Raises:
        ValueError: the batches have another shape, or end before `steps`.
        KeyboardInterrupt: the run was interrupted; half a measurement is none.
    """
    row: dict[str, Any] = {
        "model": None, "impl": impl, "checkpointing": bool(checkpointing), "chunked_loss": chunked_loss is not None,
        "seqlen": seqlen, "batch": batch, "peak_gib": math.nan, "reserved_gib": math.nan,
        "cap_gib": math.nan if cap_gib is None else cap_gib, "tokens_per_s": math.nan, "loss": math.nan,
        "status": "oom",
    }  # fmt: skip
    model = history = None
    if cap_gib is None:
        free_memory()  # a cap begins with this, too
    with memory_cap(cap_gib) if cap_gib is not None else nullcontext():
        try:
            with torch.device(runtime.device):  # drawing a large model's weights on the CPU takes longer than its steps
                model = model_factory()
            row |= _names(model, impl)
            model.to(runtime.device)
            free_memory()  # what making it took, and is no part of a step
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
            # Nothing may keep the exception: its traceback holds every tensor of the failed step. It is gone
            # at the end of this block, and the memory can be freed after it.
            pass
        del model
        free_memory()
    return row if history is None else row | _measured(history, steps)


def _names(model: GPT2LMHeadModel, impl: str | None) -> dict[str, str]:
    """What the tables call the model and its attention; `impl` is the latter's name where it is given."""
    attention = model.config._attn_implementation
    return {
        "model": getattr(model.config, "lab_size", type(model).__name__),
        "impl": impl or name_in_tables(attention),
    }


def _measured(history: History, steps: int) -> dict[str, Any]:
    """What a row of training.csv has from a run of so many steps; raises as `try_step` where it did not finish."""
    if history.interrupted:
        raise KeyboardInterrupt
    if history.status != "done":
        raise ValueError(f"the batches ended after {history.steps} of {steps} steps: pass one for each step")
    last = history.frame.iloc[-1].to_dict()
    return {
        "peak_gib": last["peak_allocated_gib"],
        "reserved_gib": last["peak_reserved_gib"],
        "tokens_per_s": history.frame["tokens_per_s"].iloc[min(2, len(history.frame) - 1) :].median(),
        "loss": last["loss"],
        "status": "ok",
    }


def _random_batches(vocab_size: int, shape: tuple[int, int]) -> Iterator[torch.Tensor]:
    """The same random tokens on each call, without end."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(vocab_size, shape, generator=generator)


def _checked(batches: Iterable[torch.Tensor], shape: tuple[int, int]) -> Iterator[torch.Tensor]:
    """The batches, each of which must have this shape: a row of training.csv says so."""
    for batch in batches:
        if tuple(batch.shape) != shape:
            raise ValueError(f"batches must be (batch, seqlen) = {shape}, got {tuple(batch.shape)}")
        yield batch
