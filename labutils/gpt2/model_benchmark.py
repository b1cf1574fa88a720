"""Measures a whole GPT-2 under each attention: the parts of a training step, prefill and decoding, as a table.

`measure_models` makes the table. A point that runs out of memory or cannot run is a row with its reason. With a folder
the rows are on disk as they come, and a later call measures only the missing ones. `side_by_side` shows the table, and
`benchmark.speedup` adds a column to it. `usable_attentions` says which attentions a model can be switched to here.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from tqdm import tqdm

from labutils.attention.backends import name_in_tables
from labutils.benchmark import SCHEMAS, Recorder, Unsupported, watch_interpreter
from labutils.benchmark.environment import environment
from labutils.benchmark.points import NOT_REACHED, is_out_of_memory
from labutils.benchmark.tables import KEYS
from labutils.benchmark.timing import INTERPRETED
from labutils.gpt2 import models
from labutils.gpt2.attention import register_attention, register_first_version
from labutils.machine import runtime
from labutils.machine.memory import free_memory, peaks_gib

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

TRAINING = ("forward", "backward", "step")
"""The parts of a training step. The forward pass includes the loss; `step` is all of it, with the optimizer."""
INFERENCE = ("prefill", "decode")
"""The pass over the prompt, up to the logits of its last token; and one more token for each sequence after it."""

_TABLE = "models"  # the name of the table among stored results
_FEWEST, _MOST = 2, 10  # repeats after the warm-up
_SECONDS = {"training": 0.3, "inference": 0.1}  # for the repeats of one point, if the fewest repeats take less
_WARM_UP_TOKENS, _DECODED = 3, 8  # decoded tokens before the timing begins, and timed ones
_LEFT_OVER = 128 * 2**20  # bytes that may stay: libraries keep their workspaces in PyTorch's memory


def measure_models(
    sizes: Iterable[str],
    attentions: Iterable[str],
    seqlens: Iterable[int],
    *,
    works: Sequence[str] = (*TRAINING, *INFERENCE),
    batch: int = 4,
    inference_batches: Iterable[int] = (1, 4),
    vocab_size: int = 50257,
    folder: str | Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Times and peak memory of GPT-2 with random weights, over sequence lengths, on this machine.

    Training: float32 weights, autocast to `runtime.dtype` on a GPU, fused AdamW, batch B, no checkpointing. Inference:
    weights in `runtime.dtype`, under no_grad, with transformers' own cache.

    Args:
        sizes: keys of `models.GPT2_SIZES`.
        attentions: names that transformers knows, such as "eager", "sdpa", "flash_attention_2", "labutils" and
            "labutils_v1" (see `register_first_version`).
        seqlens: N, measured in ascending order; for "decode" the number of tokens already in the cache.
        works: parts of `TRAINING` and `INFERENCE`. The parts of a training step are measured together.
        batch: B of training.
        inference_batches: B of prefill and decoding: 1 for the latency of one request, more for throughput.
        vocab_size: entries of the tokenizer.
        folder: `models.csv` is kept there, complete after each measurement. Rows that it holds are not measured again.
        progress: a progress bar on stdout.

    Returns:
        A row for each model, work, attention, batch and length, with the columns `benchmark.SCHEMAS["models"]`, among
        them

        - impl: the attention, by `backends.name_in_tables`;
        - ms: the median; for "decode", of one token;
        - tokens_per_s: of all sequences together;
        - peak_gib: allocated memory, with the weights; NaN on a CPU;
        - status and reason: ok, oom or unsupported, and why.

        `.attrs`: "machine" and "interrupted" (True after a KeyboardInterrupt: points that were not reached are then
        rows that say so).

    Once an attention has run out of memory, longer lengths are not tried: they become rows with status oom. An
    attention that runs in Triton's interpreter gets status unsupported and no time.

    Raises:
        ValueError: an unknown work or size, nothing to measure, or a folder with rows of another environment.
    """
    sizes, attentions, lengths = list(dict.fromkeys(sizes)), list(dict.fromkeys(attentions)), sorted(set(seqlens))
    unknown = [w for w in works if w not in (*TRAINING, *INFERENCE)]
    if unknown or not works:
        raise ValueError(f"works={tuple(works)}: name at least one of {', '.join((*TRAINING, *INFERENCE))}.")
    if not sizes or not attentions or not lengths or lengths[0] < 2:
        raise ValueError("nothing to measure: give at least one size, one attention and one length of 2 or more.")
    unknown = [size for size in sizes if size not in models.GPT2_SIZES]
    if unknown:
        raise ValueError(f"sizes={unknown} are not known: choose from {', '.join(models.GPT2_SIZES)}.")
    if "labutils" in attentions:
        register_attention()
    if "labutils_v1" in attentions:
        register_first_version()
    training, inference = ([work for work in works if work in those] for those in (TRAINING, INFERENCE))
    jobs = [("training", batch, training)] if training else []
    jobs += [("inference", b, inference) for b in dict.fromkeys(inference_batches)] if inference else []
    recorder = None if folder is None else Recorder(folder, environment(), table=_TABLE, resume=True)
    rows: dict[tuple, dict] = {} if recorder is None else recorder.rows
    total = len(sizes) * len(jobs) * len(attentions) * len(lengths)
    bar = tqdm(total=total, file=sys.stdout, disable=not progress, mininterval=0.5)
    interrupted = False
    try:
        for size in sizes:
            subject = _Subject(size, lengths[-1] + _WARM_UP_TOKENS + _DECODED, vocab_size)
            for job, b, named in jobs:
                for attention in attentions:
                    for _ in _measure_lengths(subject, rows, job, attention, b, lengths, named, bar):
                        if recorder is not None:
                            recorder.write()
            subject.let_go()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        bar.close()
    if interrupted:
        again = "for all of them" if folder is None else "to go on"
        print(f"Interrupted after {bar.n} of {total} points; the others say so. Run this cell again {again}.")
        for size, (_, b, named), attention, n in itertools.product(sizes, jobs, attentions, lengths):
            for point in _points(size, named, attention, b, n):
                rows.setdefault(point, NOT_REACHED)  # only in this table, not on disk: the next run measures it
    table = pd.DataFrame(
        [dict(zip(KEYS[_TABLE], point, strict=True)) | dict(row) for point, row in rows.items()],
        columns=list(SCHEMAS[_TABLE]),
    )
    wanted = {name_in_tables(attention) for attention in attentions}
    table = table[table["model"].isin(sizes) & table["impl"].isin(wanted) & table["work"].isin(works)]
    table = table[table["seqlen"].isin(lengths)].reset_index(drop=True)
    table.attrs.update(machine=runtime.machine, interrupted=interrupted)
    return table


def side_by_side(table: pd.DataFrame, work: str, value: str = "ms") -> pd.DataFrame:
    """One row for each model, batch and length, one column for each implementation; "OOM" and "–" if it did not run.

    Args:
        table: of `measure_models` or `benchmark.speedup`.
        work: of `TRAINING` or `INFERENCE`.
        value: the column to show, as text in its own unit: ms, tokens_per_s, peak_gib or speedup.

    Raises:
        ValueError: no row of that work.
    """
    rows = table[table["work"] == work]
    if rows.empty:
        raise ValueError(f"the table has no row of {work!r}; it has {', '.join(sorted(set(table['work'])))}.")
    digits = {"ms": ".1f", "tokens_per_s": ",.0f", "peak_gib": ".1f"}.get(value, ".2f")

    def text(row: Any) -> str:
        if row.status != "ok":
            return "OOM" if row.status == "oom" else "–"
        number = getattr(row, value)
        return "–" if pd.isna(number) else format(number, digits)

    shown = rows.assign(text=[text(row) for row in rows.itertuples()])
    columns = list(dict.fromkeys(rows["impl"]))
    return shown.pivot(index=["model", "batch", "seqlen"], columns="impl", values="text")[columns]


def usable_attentions(wanted: Iterable[str], make: Callable[[], GPT2LMHeadModel]) -> tuple[list[str], dict[str, str]]:
    """The attentions that a model can be switched to on this machine, and why it cannot be switched to the others.

    Args:
        wanted: names for `set_attn_implementation`; "labutils" must be registered.
        make: makes a small model on the lab's device.

    Returns:
        The names that work, in their order, and a dict with the reason for each of the other names.
    """
    model, usable, reasons = make(), [], {}
    for name in wanted:
        try:
            with _quiet():
                model.set_attn_implementation(name)
        except (ImportError, ValueError, OSError) as error:
            reasons[name] = _reason(error)
        else:
            usable.append(name)
    return usable, reasons


# ---------------------------------------------------------------------------------------------------------------------
# One measurement
# ---------------------------------------------------------------------------------------------------------------------


class _Subject:
    """The model of one size: made for its first measurement, and then used for all measurements of that size."""

    def __init__(self, size: str, positions: int, vocab_size: int) -> None:
        self.size, self.positions, self.vocab_size = size, positions, vocab_size
        self.model: GPT2LMHeadModel | None = None
        self.others = 0  # bytes on the GPU that are not the model's

    def attempt(self, job: str, attention: str, batch: int, n: int, works: Sequence[str]) -> dict[str, dict[str, Any]]:
        """`_attempt` with this model, after the memory of the point before is free again."""
        if self.model is None:
            self.model = _make(self.size, self.positions, self.vocab_size)
            self.others = _allocated() - _bytes_of(self.model)
        _free_the_last_point(self.model, self.others)
        return _attempt(self.model, job, attention, batch, n, works)

    def let_go(self) -> None:
        """Frees the model."""
        self.model = None
        free_memory()


def _points(size: str, works: Sequence[str], attention: str, batch: int, n: int) -> list[tuple]:
    """The keys (`KEYS["models"]`) of the rows that one measurement gives: a row for each work."""
    return [(size, work, name_in_tables(attention), batch, n) for work in works]


def _measure_lengths(
    subject: _Subject, rows: dict[tuple, dict], job: str, attention: str, batch: int,
    lengths: Sequence[int], works: Sequence[str], bar: tqdm,
) -> Iterator[None]:  # fmt: skip
    """Adds the missing rows of each length to `rows`, and yields after each addition; the bar counts the lengths."""
    exhausted: int | None = None
    refused: dict[str, dict[str, Any]] | None = None  # what cannot run at one length cannot run at another
    for n in lengths:
        bar.set_description_str(f"{subject.size} {job} {attention} B={batch} N={n:,}")
        points = _points(subject.size, works, attention, batch, n)
        if not all(point in rows for point in points):
            if exhausted is not None:
                reason = f"not tried: it ran out of memory at N = {exhausted:,}"
                found = dict.fromkeys(works, {"status": "oom", "reason": reason})
            elif refused is not None:
                found = refused
            else:
                found = subject.attempt(job, attention, batch, n, works)
                if found[works[0]]["status"] == "unsupported":
                    refused = found
            rows.update({point: found[work] for point, work in zip(points, works, strict=True)})
            yield
        if any(rows[point]["status"] == "oom" for point in points):
            exhausted = n if exhausted is None else exhausted
        bar.update()


def _make(size: str, positions: int, vocab_size: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    with torch.device(runtime.device):
        return models.gpt2(size, n_positions=positions, vocab_size=vocab_size, attention="eager")


def _bytes_of(model: GPT2LMHeadModel) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def _allocated() -> int:
    return torch.cuda.memory_allocated() if runtime.device.type == "cuda" else 0


def _free_the_last_point(model: GPT2LMHeadModel, others: int) -> None:
    """Frees the memory of the last point; `others` are the bytes on the GPU that are not the model's.

    Garbage collection takes 0.2 s, as long as many points, and only reference cycles need it. So it runs only if some
    memory is left over; otherwise PyTorch just returns its cached memory.
    """
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
        if _allocated() > others + _bytes_of(model) + _LEFT_OVER:
            free_memory()


def _attempt(
    model: Any, job: str, attention: str, batch: int, n: int, works: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """The values of a row for each work. Out of memory and unsupported are rows, too, with the reason."""
    interpreted = False

    def refuse(*_: Any) -> None:
        nonlocal interpreted
        interpreted = True
        raise Unsupported(INTERPRETED)

    try:
        with _quiet():
            model.set_attn_implementation(attention)
        with watch_interpreter(refuse):
            return _training(model, batch, n) if job == "training" else _inference(model, batch, n)
    except Exception as error:
        if interpreted:  # the exception of `refuse`, perhaps wrapped on its way through autograd or Triton
            status, reason = "unsupported", INTERPRETED
        else:
            status = "oom" if is_out_of_memory(error) else "unsupported"
            reason = _reason(error)
    # after the exception is gone: its traceback holds every tensor of the failed step
    model.zero_grad(set_to_none=True)
    free_memory()
    return dict.fromkeys(works, {"status": status, "reason": reason})


def _reason(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' warning that flash_attention_2 needs 16 bits: autocast or the weights provide them."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _training(model: Any, batch: int, n: int) -> dict[str, dict[str, Any]]:
    """Forward, backward and whole step: ms, tokens_per_s, peak_gib."""
    device = runtime.device
    model.float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
    # float16 overflows without a scaler. It is here for the time that it takes; the loss is thrown away.
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda" and runtime.dtype == torch.float16)
    ids = _tokens(model, batch, n)

    def step() -> dict[str, float]:
        marks = [_mark()]
        with torch.autocast(device.type, dtype=runtime.dtype, enabled=device.type == "cuda"):
            loss = model(ids, labels=ids, use_cache=False).loss
        marks.append(_mark())
        scaler.scale(loss).backward()
        marks.append(_mark())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        marks.append(_mark())
        return {
            "step": _between(marks[0], marks[3]),
            "forward": _between(*marks[:2]),
            "backward": _between(*marks[1:3]),
        }

    _reset_peak()
    try:
        found = _repeated(step, _SECONDS["training"])
        peak, _ = peaks_gib(device)
    finally:
        model.zero_grad(set_to_none=True)
    return {work: _row(statistics.median(ms[work] for ms in found), batch * n, peak) for work in TRAINING}


def _repeated(call: Callable[[], Any], seconds: float) -> list[Any]:
    """The results of `call`, repeated as often as fits in `seconds`, from `_FEWEST` to `_MOST` times, after a warm-up.

    The first call compiles, loads and allocates. If calls are short, the second belongs to the warm-up, too: in the
    first step PyTorch has not laid out its memory as in later ones.
    """
    call()
    began = time.perf_counter()
    results = [call()]
    repeats = min(int(seconds / (time.perf_counter() - began)), _MOST)
    if repeats > _FEWEST:
        results.clear()
    while len(results) < max(repeats, _FEWEST):
        results.append(call())
    return results


@torch.no_grad()
def _inference(model: Any, batch: int, n: int) -> dict[str, dict[str, Any]]:
    """Prefill, and one token of decoding behind it: ms, tokens_per_s, peak_gib."""
    model.to(runtime.dtype).eval()
    ids = _tokens(model, batch, n)
    output: Any = None

    def prefill() -> float:
        nonlocal output
        output = None  # one cache at a time
        start = _mark()
        output = model(ids, use_cache=True, logits_to_keep=1)
        return _between(start, _mark())

    _reset_peak()
    times = _repeated(prefill, _SECONDS["inference"])
    prefill_peak, _ = peaks_gib(runtime.device)
    _reset_peak()
    token, marks = output.logits[:, -1:].argmax(dim=-1), []
    for _ in range(_WARM_UP_TOKENS + _DECODED):
        marks.append(_mark())
        output = model(token, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(dim=-1)
    marks.append(_mark())
    each = [_between(*pair) for pair in itertools.pairwise(marks[_WARM_UP_TOKENS:])]
    decode_peak, _ = peaks_gib(runtime.device)
    return {
        "prefill": _row(statistics.median(times), batch * n, prefill_peak),
        "decode": _row(statistics.median(each), batch, decode_peak),
    }


def _row(ms: float, tokens: int, peak: float) -> dict[str, Any]:
    return {"ms": ms, "tokens_per_s": 1e3 * tokens / ms, "peak_gib": peak, "status": "ok", "reason": ""}


def _tokens(model: Any, batch: int, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch, n), generator=generator).to(runtime.device)


def _mark() -> torch.cuda.Event | float:
    if runtime.device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    """Milliseconds; on a GPU it waits for the end."""
    if isinstance(start, float):
        return 1e3 * (end - start)
    end.synchronize()
    return start.elapsed_time(end)


def _reset_peak() -> None:
    if runtime.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
