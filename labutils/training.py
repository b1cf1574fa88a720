"""The training loop, in one piece to read from top to bottom, and the memory cap that imitates a smaller GPU.

`train` runs a model over batches and returns what it measured. `try_step` trains a few steps and says whether they fit,
as a row of training.csv. `memory_cap` makes a large GPU behave like one with 16 GB.
"""

from __future__ import annotations

import gc
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from tqdm import tqdm

from labutils import runtime
from labutils.models import IMPL, language_model_loss
from labutils.offload import OffloadedAdamW, offloaded_checkpoint

if TYPE_CHECKING:
    import pandas as pd
    from transformers import GPT2LMHeadModel

    from labutils.checkpoints import Checkpoint

GIB = 2**30
"""Bytes in a GiB."""

COLUMNS = (
    "step", "loss", "tokens_per_s", "grad_norm", "peak_allocated_gib", "peak_reserved_gib", "loss_scale", "skipped",
)  # fmt: skip
"""Of the history; `History` says what they are."""


@dataclass
class History:
    """What `train` measured.

    Attributes:
        frame: one row per logged step, with the columns `COLUMNS`. `loss` in nats per token, `tokens_per_s` since the
            row before, `grad_norm` before clipping, peaks in GiB since the start (NaN on a CPU). `loss_scale` is the
            factor of float16's loss after the step (1 without scaling), `skipped` counts the steps so far that were
            left out because scaled gradients overflowed: `grad_norm` is infinite or NaN there.
        status: "done", "interrupted" (by the user) or "out of data" (the batches ended before the steps did).
        steps: optimizer steps that were finished.
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
    """Train a language model with AdamW, on the device that it is on.

    Interrupting it (the stop button, Ctrl-C) ends the loop after the operation at hand; the model keeps what it has
    learnt, and the history so far is returned, marked "interrupted".

    Args:
        model: a GPT-2 of `labutils.models.gpt2`.
        batches: int64 (B, N) each, on any device.
        steps: optimizer steps.
        lr: learning rate, reached over `warmup` steps and constant then, but for the last `decay`.
        warmup: steps of linear warm-up.
        decay: the last so many steps, over which the learning rate falls to 0 in a straight line.
        weight_decay: on matrices; biases and LayerNorm gains have none.
        clip: largest gradient norm.
        autocast_dtype: "auto" is the GPU's `runtime.dtype` and no autocast on a CPU; None and float32 are no autocast.
            float16 comes with loss scaling.
        checkpointing: recompute every block in the backward instead of keeping its activations; "offloaded" keeps
            even the blocks' inputs in the CPU's memory.
        chunked_loss: positions per chunk of the loss (`labutils.models.language_model_loss`), or None.
        end_of_text: keep packed documents apart (`labutils.models.language_model_loss`).
        optimizer: "adamw" with its state beside the model; "offloaded" with its state, and its work, on the CPU.
        log_every: steps per row of the history; the last step always has one.
        progress: show a progress bar.
        checkpoint: where the state of the run is kept, and where it goes on from; None keeps nothing. `steps` counts
            from the start of the run, and so does the history. Needs batches of `labutils.data.batches`.
        stop: asked before each step; True ends the loop between two steps, with a checkpoint, as "interrupted".
        on_row: given each row of the history when it is made.

    Returns:
        The history.

    Raises:
        ValueError: `steps` or `log_every` below 1, an unknown option, or batches that the model cannot take
            (`labutils.models.language_model_loss`).
        TypeError: a checkpoint, and batches that do not know their place; a model that is None.
        OSError: a checkpoint cannot be written.
        FloatingPointError: the loss is NaN or infinite at a logged step.
        torch.OutOfMemoryError: the step does not fit; see `try_step`.
    """
    import pandas as pd

    if steps < 1 or log_every < 1:
        raise ValueError(f"steps and log_every must be at least 1, got {steps} and {log_every}")
    device = _device_of(model)
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
    recorder = _Recorder(rows, scaler.get_scale(), device)
    with _as_in_training(model, checkpointing):
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
                loss = _loss(model, batch, dtype, chunked_loss, end_of_text)
                grad_norm = _backward_and_step(model, loss, chosen, scaler, clip)
                recorder.count(batch.numel(), scaler.get_scale())
                done += 1

                if done % log_every == 0 or done == steps:
                    row = recorder.row(done, loss, grad_norm)
                    if not math.isfinite(row["loss"]):
                        raise FloatingPointError(
                            f"the loss is {row['loss']} at step {done}: lower lr (now {lr}) or raise warmup ({warmup})"
                        )
                    on_row(row)
                    bar.set_postfix_str(_in_a_bar(row))
                if checkpoint is not None and done % checkpoint.every == 0:
                    with recorder.paused():  # writing is no part of tokens/s
                        checkpoint.save(model, chosen, scaler, source, done, rows)
                    kept = done
                bar.update()
            if checkpoint is not None and done > kept:
                checkpoint.save(model, chosen, scaler, source, done, rows)
        except KeyboardInterrupt:  # perhaps in the midst of a step: nothing is saved, the last checkpoint stands
            status = "interrupted"
            bar.close()
            print(f"Interrupted after {done} of {steps} steps.")  # whoever calls may show neither bar nor history
        finally:
            bar.close()
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    return History(frame, status, done, time.perf_counter() - start)


def _loss(
    model: GPT2LMHeadModel, tokens: torch.Tensor, dtype: torch.dtype | None, chunked_loss: int | None,
    end_of_text: int | None,
) -> torch.Tensor:  # fmt: skip
    """`language_model_loss` of tokens (B, N) on any device, under autocast to `dtype`; None is no autocast."""
    with torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
        return language_model_loss(model, tokens.to(model.device), chunked_loss=chunked_loss, end_of_text=end_of_text)


def _backward_and_step(
    model: GPT2LMHeadModel, loss: torch.Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
    clip: float,
) -> torch.Tensor:  # fmt: skip
    """Gradients, clipped, and one update with them; afterwards there are none. Returns their norm before clipping."""
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm


class _Recorder:
    """Makes the rows of a history, and counts for them what the steps since the last one did.

    Args:
        rows: those so far, of a run that goes on; each new one is appended.
        scale: of the loss, before the first step.
        device: where the steps run.
    """

    def __init__(self, rows: list[dict[str, float]], scale: float, device: torch.device):
        self._rows, self._scale, self._device = rows, scale, device
        self._skipped = int(rows[-1]["skipped"]) if rows else 0
        self._tokens, self._last = 0, time.perf_counter()

    def count(self, tokens: int, scale: float) -> None:
        """After a step on so many tokens, which left the loss with this scale."""
        self._tokens += tokens
        self._skipped += scale < self._scale  # it comes down where a gradient overflowed, and only there
        self._scale = scale

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time within is no part of tokens/s."""
        began = time.perf_counter()
        yield
        self._last += time.perf_counter() - began

    def row(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor) -> dict[str, float]:
        """The row after this step, with `COLUMNS`."""
        value = loss.item()  # waits for the GPU, so that the time below is the work's
        now = time.perf_counter()
        speed = self._tokens / (now - self._last)
        values = (step, value, speed, grad_norm.item(), *_peaks_gib(self._device), self._scale, self._skipped)
        self._rows.append(dict(zip(COLUMNS, values, strict=True)))
        self._last, self._tokens = now, 0
        return self._rows[-1]


def _in_a_bar(row: dict[str, float]) -> str:
    """What the progress bar shows of a row."""
    reserved = row["peak_reserved_gib"]
    memory = "" if math.isnan(reserved) else f", {reserved:.1f} GiB"
    return f"loss {row['loss']:.3f}, {row['tokens_per_s']:,.0f} tokens/s{memory}"


@contextmanager
def _as_in_training(model: GPT2LMHeadModel, checkpointing: bool | Literal["offloaded"]) -> Iterator[None]:
    """The model in training mode, with or without checkpointing; afterwards as it was, and without gradients."""
    was_training = model.training
    try:
        model.train()
        if checkpointing:
            set_checkpointing(model, checkpointing)
        yield
    finally:
        model.zero_grad(set_to_none=True)
        if checkpointing:
            set_checkpointing(model, False)
        model.train(was_training)


def _device_of(model: GPT2LMHeadModel | None) -> torch.device:
    """Where the model is. Notebooks set one to None to free its memory, and cells can be run in any order."""
    if model is None:
        raise TypeError("the model is None, which frees its memory: run the cell again that makes it, then this one")
    return model.device


def make_optimizer(
    model: GPT2LMHeadModel, kind: Literal["adamw", "offloaded"] = "adamw", *, lr: float, weight_decay: float = 0.1,
    fused: bool | None = None,
) -> torch.optim.Optimizer:  # fmt: skip
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) as `train` uses it: weight decay on matrices alone.

    Args:
        model: whose parameters are updated.
        kind: "adamw" with its state beside the model; "offloaded" with its state, and its work, on the CPU.
        lr: learning rate.
        weight_decay: of matrices; biases and LayerNorm gains have none.
        fused: one kernel for all parameters; None is that on a GPU, and one for each operation on a CPU. It has no
            part in "offloaded".

    Raises:
        ValueError: an unknown kind.
    """
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if kind == "adamw":
        fused = model.device.type == "cuda" if fused is None else fused
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused)
    if kind == "offloaded":
        return OffloadedAdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)  # fused: the CPU has such a kernel, too
    raise ValueError(f"optimizer must be 'adamw' or 'offloaded', got {kind!r}")


def set_checkpointing(model: GPT2LMHeadModel, on: bool | Literal["offloaded"]) -> None:
    """Switches the recomputation of blocks in the backward pass on or off (Chen et al. 2016, arXiv 1604.06174).

    Args:
        model: a GPT-2 of `labutils.models.gpt2`, which is changed.
        on: True keeps the input of each block alone; "offloaded" keeps it in the CPU's memory
            (`labutils.offload.offloaded_checkpoint`).

    Raises:
        ValueError: `on` is something else.
    """
    if on not in (True, False, "offloaded"):
        raise ValueError(f"checkpointing must be True, False or 'offloaded', got {on!r}")
    # transformers 5.23 calls "activation" what 5.17 calls "gradient" checkpointing; the old name warns there.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
        if on == "offloaded":
            for block in model.transformer.h:
                block._gradient_checkpointing_func = offloaded_checkpoint
    else:
        getattr(model, f"{name}_checkpointing_disable")()


def resolved_autocast(wanted: torch.dtype | Literal["auto"] | None, device: torch.device) -> torch.dtype | None:
    """What is asked for as `autocast_dtype`, on this device.

    Args:
        wanted: "auto" is the GPU's `runtime.dtype` and no autocast on a CPU; None and float32 are no autocast.
        device: where the model is.

    Returns:
        A 16-bit dtype, or None for no autocast.
    """
    if wanted == "auto":
        wanted = runtime.dtype if device.type == "cuda" else None
    return None if wanted == torch.float32 else wanted


@torch.no_grad()
def evaluate(
    model: GPT2LMHeadModel,
    batches: Iterable[torch.Tensor],
    *,
    autocast_dtype: torch.dtype | Literal["auto"] | None = "auto",
    chunked_loss: int | None = None,
    end_of_text: int | None = None,
) -> float:
    """Mean loss over all predictions of the batches, in nats per token; the model is left as it was.

    Args:
        model: as for `train`.
        batches: int64 (B, N) each, a finite number: `sequences.split(batch_size)`, for instance.
        autocast_dtype: as for `train`.
        chunked_loss: as for `train`.
        end_of_text: as for `train`.

    Raises:
        ValueError: there is no batch.
        TypeError: the model is None.
    """
    dtype = resolved_autocast(autocast_dtype, _device_of(model))
    was_training = model.training
    model.eval()
    total = predictions = 0
    try:
        for batch in batches:
            loss = _loss(model, batch, dtype, chunked_loss, end_of_text)
            count = batch.shape[0] * (batch.shape[1] - 1)
            if end_of_text is not None:  # no prediction across a border
                count -= int((batch[:, :-1] == end_of_text).sum())
            total += loss.item() * count
            predictions += count
    finally:
        model.train(was_training)
    if predictions == 0:
        raise ValueError("there is no batch to evaluate on: an iterator that was used before is empty")
    return total / predictions


@dataclass(frozen=True)
class Cap:
    """What `memory_cap` enforces, all in GiB.

    Attributes:
        cap_gib: the size of the imitated card: the smaller of what was asked for and what this card has.
        context_gib: memory of this GPU that is in use, but not by PyTorch's allocator.
        allocator_gib: what is left for PyTorch's allocator, `cap_gib - context_gib`: the enforced limit.
    """

    cap_gib: float
    context_gib: float
    allocator_gib: float

    def __str__(self) -> str:
        return (
            f"{self.cap_gib:.2f} GiB in all: {self.context_gib:.2f} GiB for the CUDA context, "
            f"{self.allocator_gib:.2f} GiB for tensors"
        )


@contextmanager
def memory_cap(gib: float) -> Iterator[Cap]:
    """Within this context, the GPU has `gib` GiB: what does not fit raises torch.OutOfMemoryError.

    The limit is set with `torch.cuda.set_per_process_memory_fraction`, which counts what PyTorch's allocator reserves
    and nothing else. A real card of that size also holds the CUDA context: the driver's own data, loaded kernels,
    cuBLAS. So the context is measured first, as the memory in use on the device (`torch.cuda.mem_get_info`) minus what
    the allocator holds, and taken off the limit. Other programs' memory on the same GPU is counted with it, which errs
    to the strict side. Kernels loaded later make the context grow: it is measured again at the end, and a warning says
    so if the sum went over the cap.

    A "16 GB" card has between 14.6 and 16.0 GiB (16e9 bytes are 14.9 GiB).

    Args:
        gib: size of the card to imitate. A card that is smaller than that is its own limit.

    Yields:
        The cap, its parts measured.

    Raises:
        RuntimeError: there is no CUDA GPU; a CPU's memory cannot be capped this way.
        ValueError: the context alone takes as much, or it and what is allocated now do.
    """
    if runtime.device.type != "cuda":
        raise RuntimeError(
            "memory_cap imitates a smaller GPU with PyTorch's CUDA allocator, and the lab runs on the CPU "
            "here. Ask for it where runtime.device.type == 'cuda' only"
        )
    free_memory()
    _load_libraries()
    before = torch.cuda.get_per_process_memory_fraction()
    _, total = torch.cuda.mem_get_info()
    cap = _plan_cap(gib, total_bytes=total, context_bytes=_context_bytes())
    held = torch.cuda.memory_allocated() / GIB
    if held >= cap.allocator_gib:
        raise ValueError(
            f"{held:.2f} GiB of tensors are alive already, and a cap of {cap.cap_gib:.2f} GiB leaves "
            f"{cap.allocator_gib:.2f} GiB for them: delete models of earlier cells, or raise the cap"
        )
    torch.cuda.set_per_process_memory_fraction(cap.allocator_gib * GIB / total)
    torch.cuda.reset_peak_memory_stats()
    try:
        yield cap
    finally:
        torch.cuda.set_per_process_memory_fraction(before)
        peak = (torch.cuda.max_memory_reserved() + _context_bytes()) / GIB
        if peak > cap.cap_gib:
            warnings.warn(
                f"the CUDA context grew under the cap: with it {peak:.2f} GiB were in use, over the "
                f"{cap.cap_gib:.2f} GiB asked for",
                RuntimeWarning,
                stacklevel=3,
            )


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
        impl: the name of the row; by default that of the model's attention in the tables (`labutils.models.IMPL`).
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
        "impl": impl or IMPL.get(attention, attention),
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


def attention_used(
    model: GPT2LMHeadModel,
    tokens: torch.Tensor,
    *,
    autocast_dtype: torch.dtype | Literal["auto"] | None = "auto",
    checkpointing: bool | Literal["offloaded"] = False,
    chunked_loss: int | None = None,
    end_of_text: int | None = None,
) -> dict[str, int]:
    """Which attention a training step of this model runs, found out by profiling one, forward and backward.

    The step changes nothing: gradients are thrown away, weights and random generators are left as they were.

    Args:
        model, autocast_dtype, checkpointing, chunked_loss, end_of_text: as for `train`.
        tokens: int64 (B, N), on any device.

    Returns:
        How often each ran: name -> calls, of "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "sdpa_math", "flash_attn",
        "triton_v2" and "naive" (softmax outside of all of them). Recomputation counts.

    Raises:
        TypeError: the model is None.
        ValueError: an unknown option, or tokens that the model cannot take.
        RuntimeError: no backend that `torch.nn.attention.sdpa_kernel` allows here can run the step.
    """
    from labutils.benchmark import torch_profiler

    device = _device_of(model)
    on_gpu = device.type == "cuda"
    dtype = resolved_autocast(autocast_dtype, device)
    activity = torch.profiler.ProfilerActivity
    with (
        _as_in_training(model, checkpointing),
        torch.random.fork_rng(devices=[torch.cuda.current_device()] if on_gpu else []),
        torch_profiler(activities=[activity.CPU, activity.CUDA] if on_gpu else [activity.CPU]) as profiler,
    ):
        _loss(model, tokens, dtype, chunked_loss, end_of_text).backward()
    calls = {event.key: event.count for event in profiler.key_averages()}
    return _attention_of(calls)


# The operator, or the autograd function, that each attention is, by the name that the profiler records: the one that
# ran, not the one that was asked for.
_OPERATORS = {
    "aten::_scaled_dot_product_flash_attention": "sdpa_flash",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "sdpa_flash",
    "aten::_scaled_dot_product_cudnn_attention": "sdpa_cudnn",
    "aten::_scaled_dot_product_efficient_attention": "sdpa_efficient",
    "aten::_scaled_dot_product_attention_math": "sdpa_math",
    "flash_attn::_flash_attn_forward": "flash_attn",
    "flash_attn::_flash_attn_varlen_forward": "flash_attn",
    "labutils::flash_attention": "triton_v2",
    "_FlashAttention": "triton_v2",  # the autograd function of `kernels.prepared`, which is no operator
}


def _attention_of(calls: dict[str, int]) -> dict[str, int]:
    """Calls of each attention, from those of each operator."""
    used: dict[str, int] = {}
    for operator, name in _OPERATORS.items():
        if calls.get(operator):
            used[name] = used.get(name, 0) + calls[operator]
    outside = calls.get("aten::_softmax", 0) - used.get("sdpa_math", 0)  # that one is made of ordinary operations
    if outside > 0:
        used["naive"] = outside
    return used


def _peaks_gib(device: torch.device) -> tuple[float, float]:
    """Peak allocated and reserved memory in GiB; NaN on a CPU, where nobody counts it."""
    if device.type != "cuda":
        return float("nan"), float("nan")
    return torch.cuda.max_memory_allocated(device) / GIB, torch.cuda.max_memory_reserved(device) / GIB


def _plan_cap(gib: float, *, total_bytes: int, context_bytes: int) -> Cap:
    """The parts of a cap of so many GiB on a GPU with `total_bytes`, of which `context_bytes` are not PyTorch's."""
    cap, context = min(gib, total_bytes / GIB), context_bytes / GIB
    if cap <= context:
        raise ValueError(
            f"a card of {cap:.2f} GiB has no room left: the CUDA context and other programs on this GPU take "
            f"{context:.2f} GiB. Raise the cap or close the other programs"
        )
    return Cap(cap_gib=cap, context_gib=context, allocator_gib=cap - context)


def _load_libraries() -> None:
    """Make the CUDA context as large as training makes it: cuBLAS loads its kernels at the first product."""
    for dtype in {torch.float32, runtime.dtype}:
        square = torch.ones(256, 256, dtype=dtype, device=runtime.device)
        square @ square
    torch.cuda.synchronize()
    del square
    torch.cuda.empty_cache()  # no more: collecting garbage takes a tenth of a second or more


def _context_bytes() -> int:
    """Memory in use on the GPU that PyTorch's allocator does not hold."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def free_memory() -> None:
    """Collects what nothing refers to any more, and gives the memory that PyTorch keeps for later back to the GPU."""
    gc.collect()
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()


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
