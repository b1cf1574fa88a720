"""The training loop: `train` trains a model and returns its history, `evaluate` gives its loss on other batches."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from tqdm import tqdm

from labutils.machine.memory import peaks_gib
from labutils.training.step import (
    as_in_training,
    backward_and_step,
    device_of,
    loss_of,
    make_optimizer,
    resolved_autocast,
)

if TYPE_CHECKING:
    import pandas as pd
    from transformers import GPT2LMHeadModel

    from labutils.training.checkpoints import Checkpoint

HISTORY_COLUMNS = (
    "step", "loss", "tokens_per_s", "grad_norm", "peak_allocated_gib", "peak_reserved_gib", "loss_scale", "skipped",
)  # fmt: skip
"""The columns of a history; `History` explains them."""


@dataclass
class History:
    """The measurements of `train`, step by step.

    Attributes:
        frame: one row per logged step, with the columns `HISTORY_COLUMNS`. `loss` in nats per token, `tokens_per_s`
            since the row before, `grad_norm` before clipping, peaks in GiB since the start (NaN on a CPU). `loss_scale`
            is the factor of float16's loss after the step (1 without scaling). `skipped` counts the steps so far that
            were skipped because scaled gradients overflowed; `grad_norm` is infinite or NaN in such a step.
        status: "done", "interrupted" (by the user) or "out of data" (the batches ended before the steps did).
        steps: number of finished optimizer steps.
        seconds: wall-clock time of the whole run.
    """

    frame: pd.DataFrame
    status: Literal["done", "interrupted", "out of data"]
    steps: int
    seconds: float

    @property
    def interrupted(self) -> bool:
        """Whether a KeyboardInterrupt ended the run."""
        return self.status == "interrupted"

    def require(self, steps: int) -> None:
        """Returns only if the run finished, for callers that cannot use a part of it.

        Args:
            steps: the number of steps that `train` was asked for.

        Raises:
            KeyboardInterrupt: the run was interrupted.
            ValueError: the batches ended before the steps did.
        """
        if self.interrupted:
            raise KeyboardInterrupt
        if self.status != "done":
            raise ValueError(f"the batches ended after {self.steps} of {steps} steps: pass one for each step")

    def __str__(self) -> str:
        text = f"{self.status} after {self.steps} steps, {self.seconds:.1f} s"
        if len(self.frame) == 0:
            return text
        first, last = self.frame.iloc[0], self.frame.iloc[-1]
        text += f": loss {first.loss:.3f} -> {last.loss:.3f}"
        text += f", {self.frame.tokens_per_s.median():,.0f} tokens/s"
        if not math.isnan(last.peak_reserved_gib):
            text += f", peak {last.peak_allocated_gib:.2f} GiB allocated"
            text += f", {last.peak_reserved_gib:.2f} GiB reserved"
        if last.skipped:
            text += f", {last.skipped:.0f} steps skipped"
        return text


def train(
    model: GPT2LMHeadModel,
    batches: Iterable[torch.Tensor],
    *,
    steps: int,
    lr: float = 6e-4,
    warmup: int = 0,
    decay: int = 0,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    autocast_dtype: torch.dtype | Literal["auto"] | None = "auto",
    checkpointing: bool | Literal["offloaded"] = False,
    chunked_loss: int | None = None,
    end_of_text: int | None = None,
    optimizer: Literal["adamw", "offloaded"] = "adamw",
    log_every: int = 1,
    progress: bool = True,
    checkpoint: Checkpoint | None = None,
    stop: Callable[[], bool] = lambda: False,
    on_row: Callable[[dict[str, float]], None] = lambda row: None,
) -> History:
    """Trains a language model with AdamW, on the model's device.

    An interrupt (the stop button, Ctrl-C) ends the loop after the current operation. The model keeps its progress, and
    the history so far is returned with the status "interrupted".

    Args:
        model: a GPT-2 of `labutils.gpt2.models.gpt2`.
        batches: int64 (B, N) each, on any device.
        steps: optimizer steps.
        lr: learning rate. It rises over `warmup` steps, stays constant, and falls over the last `decay` steps.
        warmup: steps of linear warm-up.
        decay: number of last steps in which the learning rate falls linearly to 0.
        weight_decay: on matrices; biases and LayerNorm gains have none.
        clip: largest gradient norm.
        autocast_dtype: "auto" is the GPU's `runtime.dtype`, and no autocast on a CPU; None and float32 are no autocast.
            float16 comes with loss scaling.
        checkpointing: recompute every block in the backward pass instead of keeping its activations; "offloaded" also
            keeps the blocks' inputs in the CPU's memory.
        chunked_loss: positions per chunk of the loss (`labutils.gpt2.loss.language_model_loss`), or None.
        end_of_text: keep packed documents apart (`labutils.gpt2.loss.language_model_loss`).
        optimizer: "adamw" keeps its state beside the model; "offloaded" keeps its state, and does its work, on the CPU.
        log_every: steps per row of the history; the last step always has a row.
        progress: show a progress bar.
        checkpoint: saves the state of the run, and continues from it; None saves nothing. `steps` and the history count
            from the start of the first run. Needs batches of `labutils.gpt2.packing.batches`.
        stop: called before each step; True ends the loop between two steps, with a checkpoint, as "interrupted".
        on_row: called with each new row of the history.

    Returns:
        The history.

    Raises:
        ValueError: `steps` or `log_every` below 1, an unknown option, or batches that the model cannot take
            (`labutils.gpt2.loss.language_model_loss`).
        TypeError: a checkpoint, and batches without `state_dict`; a model that is None.
        OSError: a checkpoint cannot be written.
        FloatingPointError: the loss is NaN or infinite at a logged step.
        torch.OutOfMemoryError: the step does not fit; see `try_step`.
    """
    import pandas as pd

    if steps < 1 or log_every < 1:
        raise ValueError(f"steps and log_every must be at least 1, got {steps} and {log_every}")
    device = device_of(model)
    dtype = resolved_autocast(autocast_dtype, device)
    chosen = make_optimizer(model, optimizer, lr=lr, weight_decay=weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    source = iter(batches)
    rows = [] if checkpoint is None else checkpoint.rows
    done = kept = 0 if checkpoint is None else checkpoint.load(model, chosen, scaler, source)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    status: Literal["done", "interrupted", "out of data"] = "done"
    start = time.perf_counter()
    row_maker = _RowMaker(rows, scaler.get_scale(), device)
    with as_in_training(model, checkpointing):
        bar = tqdm(total=steps, initial=done, file=sys.stdout, disable=not progress, unit="step", mininterval=0.5)
        try:
            while done < steps:
                if stop():
                    status = "interrupted"
                    break
                batch = next(source, None)
                if batch is None:
                    status = "out of data"
                    break
                for group in chosen.param_groups:
                    group["lr"] = lr * min(1.0, (done + 1) / max(warmup, 1), (steps - done) / max(decay, 1))
                loss = loss_of(model, batch, dtype, chunked_loss, end_of_text)
                grad_norm = backward_and_step(model, loss, chosen, scaler, clip)
                row_maker.count(batch.numel(), scaler.get_scale())
                done += 1

                if done % log_every == 0 or done == steps:
                    row = row_maker.row(done, loss, grad_norm)
                    if not math.isfinite(row["loss"]):
                        raise FloatingPointError(
                            f"the loss is {row['loss']} at step {done}: lower lr (now {lr}) or raise warmup ({warmup})"
                        )
                    on_row(row)
                    bar.set_postfix_str(_in_a_bar(row))
                if checkpoint is not None and done % checkpoint.every == 0:
                    with row_maker.paused():  # tokens/s leaves out the time for writing
                        checkpoint.save(model, chosen, scaler, source, done, rows)
                    kept = done
                bar.update()
            if checkpoint is not None and done > kept:
                checkpoint.save(model, chosen, scaler, source, done, rows)
        except KeyboardInterrupt:  # perhaps within a step: nothing is saved, and the last checkpoint stays
            status = "interrupted"
            bar.close()
            print(f"Interrupted after {done} of {steps} steps.")  # the caller may show neither bar nor history
        finally:
            bar.close()
    frame = pd.DataFrame(rows, columns=list(HISTORY_COLUMNS))
    return History(frame, status, done, time.perf_counter() - start)


class _RowMaker:
    """Makes the rows of a history: counts tokens and skipped steps, and times the steps since the last row.

    Args:
        rows: the rows so far, if the run continues another; each new row is appended.
        scale: the loss scale before the first step.
        device: the device of the model.
    """

    def __init__(self, rows: list[dict[str, float]], scale: float, device: torch.device):
        self._rows, self._scale, self._device = rows, scale, device
        self._skipped = int(rows[-1]["skipped"]) if rows else 0
        self._tokens, self._last = 0, time.perf_counter()

    def count(self, tokens: int, scale: float) -> None:
        """Counts a step on so many tokens; `scale` is the loss scale after it."""
        self._tokens += tokens
        self._skipped += scale < self._scale  # the scale decreases if and only if a gradient overflowed
        self._scale = scale

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time within this context out of tokens/s."""
        began = time.perf_counter()
        yield
        self._last += time.perf_counter() - began

    def row(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor) -> dict[str, float]:
        """Makes the row of this step, with `HISTORY_COLUMNS`, and appends it."""
        value = loss.item()  # waits for the GPU, so that the time below covers the work
        now = time.perf_counter()
        speed = self._tokens / (now - self._last)
        values = (step, value, speed, grad_norm.item(), *peaks_gib(self._device), self._scale, self._skipped)
        self._rows.append(dict(zip(HISTORY_COLUMNS, values, strict=True)))
        self._last, self._tokens = now, 0
        return self._rows[-1]


def _in_a_bar(row: dict[str, float]) -> str:
    """The text of a row for the progress bar."""
    reserved = row["peak_reserved_gib"]
    memory = "" if math.isnan(reserved) else f", {reserved:.1f} GiB"
    return f"loss {row['loss']:.3f}, {row['tokens_per_s']:,.0f} tokens/s{memory}"


@torch.no_grad()
def evaluate(
    model: GPT2LMHeadModel,
    batches: Iterable[torch.Tensor],
    *,
    autocast_dtype: torch.dtype | Literal["auto"] | None = "auto",
    chunked_loss: int | None = None,
    end_of_text: int | None = None,
) -> float:
    """Mean loss over all predictions of the batches. The model is left unchanged.

    Args:
        model, autocast_dtype, chunked_loss, end_of_text: as for `train`.
        batches: int64 (B, N) each, a finite number: `sequences.split(batch_size)`, for instance.

    Returns:
        Nats per token.

    Raises:
        ValueError: there is no batch.
        TypeError: the model is None.
    """
    dtype = resolved_autocast(autocast_dtype, device_of(model))
    was_training = model.training
    model.eval()
    total = predictions = 0
    try:
        for batch in batches:
            loss = loss_of(model, batch, dtype, chunked_loss, end_of_text)
            count = batch.shape[0] * (batch.shape[1] - 1)
            if end_of_text is not None:  # there is no prediction across a border
                count -= int((batch[:, :-1] == end_of_text).sum())
            total += loss.item() * count
            predictions += count
    finally:
        model.train(was_training)
    if predictions == 0:
        raise ValueError("there is no batch to evaluate on: an iterator that was used before is now empty")
    return total / predictions
