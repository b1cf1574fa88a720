"""Measures a whole GPT-2 under each attention: training steps in their parts, prefill and decoding, as a table.

`sweep` is the one function that measures. What runs out of memory or cannot run is a row with its reason; with a folder
the rows are on disk as they come, and a later call measures what is missing. `speedup` sets the rows against one
implementation, `side_by_side` shows them, and `attention_names` says beforehand what a model can be switched to.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from tqdm import tqdm

from labutils.attention.backends import name_in_tables
from labutils.attention.kernels import flash_v1, flash_v2_backward
from labutils.attention.kernels.options import Options
from labutils.benchmark import SCHEMAS, read_results, save_results, watch_interpreter
from labutils.benchmark.environment import differences, environment
from labutils.benchmark.points import NOT_REACHED, is_out_of_memory
from labutils.benchmark.timing import INTERPRETED
from labutils.gpt2 import models
from labutils.machine import runtime
from labutils.machine.memory import free_memory

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

TABLE = "models"
"""The name of the table among stored results."""
COLUMNS = SCHEMAS[TABLE]
"""Its columns."""
KEY = ("model", "work", "impl", "batch", "seqlen")
"""What a row is the measurement of; no two rows have the same."""

TRAINING = ("forward", "backward", "step")
"""Parts of a training step: loss included in the forward pass; `step` is all of it, the optimizer included."""
INFERENCE = ("prefill", "decode")
"""The pass over the prompt, up to the logits of its last token; and one more token for each sequence after it."""

_FEWEST, _MOST = 2, 10  # repeats after the warm-up
_SECONDS = {"training": 0.3, "inference": 0.1}  # for the repeats of one point, where the fewest take less
_WARM_UP_TOKENS, _DECODED = 3, 8  # tokens before those that are timed, and those
_LEFT_OVER = 128 * 2**20  # bytes that are no sign of a leak: the workspaces of libraries lie in PyTorch's memory


class _FirstVersion(torch.autograd.Function):
    """FlashAttention-1 forward. The backward is `flash_v2_backward`: it wants the log-sum-exp, whoever made it."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, softmax_scale: float, causal: bool) -> Any:
        out, lse = flash_v1.forward(q, k, v, softmax_scale, causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = Options(softmax_scale, window_right=0 if causal else None)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Any) -> tuple:
        q, k, v, out, lse = ctx.saved_tensors
        return *flash_v2_backward.backward(dout, q, k, v, out, lse, ctx.options), None, None


def _first_version(module, query, key, value, attention_mask, *, scaling=None, dropout=0.0, is_causal=None, **kwargs):
    if attention_mask is not None or dropout:
        raise NotImplementedError("labutils_v1 is for measurements: no padding, no dropout. Use 'labutils'")
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    causal = module.is_causal if is_causal is None else is_causal
    return _FirstVersion.apply(q, k, v, scaling or q.shape[-1] ** -0.5, bool(causal)), None


def register_first_version() -> str:
    """Registers FlashAttention-1's forward kernel with transformers as "labutils_v1", for measurements alone.

    Its backward pass is that of `labutils.flash_attn_func`. Padding and dropout raise NotImplementedError.

    Returns:
        The name, for `attn_implementation`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("labutils_v1", _first_version)
    AttentionMaskInterface.register("labutils_v1", models.padding_mask)
    return "labutils_v1"


def sweep(
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
        attentions: names that transformers knows, among them "eager", "sdpa", "flash_attention_2", "labutils" and
            "labutils_v1" (see `register_first_version`).
        seqlens: N, measured in ascending order; of "decode" the tokens that the cache holds before.
        works: of `TRAINING` and `INFERENCE`. The parts of a training step are measured together.
        batch: B of training.
        inference_batches: B of prefill and decoding: 1 for the latency of one request, more for throughput.
        vocab_size: entries of the tokenizer.
        folder: `models.csv` is kept there, complete after each measurement, and what it holds is not measured again.
        progress: a progress bar on stdout.

    Returns:
        A row for each model, work, attention, batch and length, with `COLUMNS`: `impl` (see `name_in_tables`), `ms`
        (median; "decode": of one token), `tokens_per_s` (all sequences together), `peak_gib` (allocated, with the
        weights; NaN on a CPU), `status` ok, oom or unsupported, and the `reason`. `.attrs`: "machine" and "interrupted"
        (True after a KeyboardInterrupt: points that were not reached are then rows that say so).

    Once an attention has run out of memory, longer lengths are rows with status oom that were not tried. What runs in
    Triton's interpreter gets status unsupported and no time.

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
        models.register_attention()
    if "labutils_v1" in attentions:
        register_first_version()
    training, inference = ([work for work in works if work in those] for those in (TRAINING, INFERENCE))
    jobs = [("training", batch, training)] if training else []
    jobs += [("inference", b, inference) for b in dict.fromkeys(inference_batches)] if inference else []
    rows = _Rows(folder)
    total = len(sizes) * len(jobs) * len(attentions) * len(lengths)
    bar = tqdm(total=total, file=sys.stdout, disable=not progress, mininterval=0.5)
    interrupted = False
    try:
        for size in sizes:
            subject = _Subject(size, lengths[-1] + _WARM_UP_TOKENS + _DECODED, vocab_size)
            for job, b, named in jobs:
                for attention in attentions:
                    _measure_lengths(subject, rows, job, attention, b, lengths, named, bar)
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
                rows.found.setdefault(point, NOT_REACHED)  # in this table alone: the next run measures it
    table = rows.table()
    wanted = {name_in_tables(a) for a in attentions}
    table = table[table["model"].isin(sizes) & table["impl"].isin(wanted) & table["work"].isin(works)]
    table = table[table["seqlen"].isin(lengths)].reset_index(drop=True)
    table.attrs.update(machine=runtime.machine, interrupted=interrupted)
    return table


def speedup(table: pd.DataFrame, over: str = "naive") -> pd.DataFrame:
    """The table with a column `speedup`: time of `over` by time of the row; NaN where either did not run.

    Args:
        table: of `sweep`.
        over: the implementation that counts as 1, as in the column `impl`.

    Raises:
        ValueError: `over` is not among the implementations.
    """
    if over not in set(table["impl"]):
        raise ValueError(f"over={over!r} is not in the table, which has {', '.join(sorted(set(table['impl'])))}.")
    keys = [name for name in KEY if name != "impl"]
    base = table.loc[table["impl"] == over, [*keys, "ms"]].rename(columns={"ms": "base_ms"})
    merged = table.merge(base, on=keys, how="left")
    result = merged.drop(columns="base_ms").assign(speedup=merged["base_ms"] / merged["ms"])
    result.attrs.update(table.attrs)
    return result


def side_by_side(table: pd.DataFrame, work: str, value: str = "ms") -> pd.DataFrame:
    """One row for each model, batch and length, one column for each implementation; "OOM" and "–" where it did not run.

    Args:
        table: of `sweep` or `speedup`.
        work: of `TRAINING` or `INFERENCE`.
        value: the column shown, as text in its own unit: ms, tokens_per_s, peak_gib or speedup.

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


def attention_names(wanted: Iterable[str], make: Callable[[], GPT2LMHeadModel]) -> tuple[list[str], dict[str, str]]:
    """Which attentions a model can be switched to here, and why not to the others.

    Args:
        wanted: names for `set_attn_implementation`; "labutils" must be registered.
        make: makes a small model on the lab's device.

    Returns:
        The names of those that it can be switched to, in their order, and name -> reason of the others.
    """
    model, can, reasons = make(), [], {}
    for name in wanted:
        try:
            with _quiet():
                model.set_attn_implementation(name)
        except (ImportError, ValueError, OSError) as error:
            reasons[name] = _reason(error)
        else:
            can.append(name)
    return can, reasons


# ---------------------------------------------------------------------------------------------------------------------
# One measurement
# ---------------------------------------------------------------------------------------------------------------------


class _Subject:
    """The model of one size: made when something has to be measured, and then used for all of that size."""

    def __init__(self, size: str, positions: int, vocab_size: int) -> None:
        self.size, self.positions, self.vocab_size = size, positions, vocab_size
        self.model: GPT2LMHeadModel | None = None
        self.others = 0  # bytes on the GPU that are not the model's

    def attempt(self, job: str, attention: str, batch: int, n: int, works: Sequence[str]) -> dict[str, dict[str, Any]]:
        """`_attempt` of this model, with the memory that was free before the last point."""
        if self.model is None:
            self.model = _make(self.size, self.positions, self.vocab_size)
            self.others = _allocated() - _bytes_of(self.model)
        _let_go_of_the_last_point(self.model, self.others)
        return _attempt(self.model, job, attention, batch, n, works)

    def let_go(self) -> None:
        """Frees the model."""
        self.model = None
        free_memory()


def _points(size: str, works: Sequence[str], attention: str, batch: int, n: int) -> list[tuple]:
    """The keys of what one measurement gives: `KEY`, for each work."""
    return [(size, work, name_in_tables(attention), batch, n) for work in works]


def _measure_lengths(
    subject: _Subject, rows: _Rows, job: str, attention: str, batch: int, lengths: Sequence[int], works: Sequence[str],
    bar: tqdm,
) -> None:  # fmt: skip
    """Puts a row for each work and length into `rows`, of those that it lacks; the bar moves by one for each length."""
    exhausted: int | None = None
    refused: dict[str, dict[str, Any]] | None = None  # what cannot run at one length cannot at another
    for n in lengths:
        bar.set_description_str(f"{subject.size} {job} {attention} B={batch} N={n:,}")
        points = _points(subject.size, works, attention, batch, n)
        if not all(point in rows.found for point in points):
            if exhausted is not None:
                reason = f"not tried: it ran out of memory at N = {exhausted:,}"
                found = dict.fromkeys(works, {"status": "oom", "reason": reason})
            elif refused is not None:
                found = refused
            else:
                found = subject.attempt(job, attention, batch, n, works)
                if found[works[0]]["status"] == "unsupported":
                    refused = found
            rows.add({point: found[work] for point, work in zip(points, works, strict=True)})
        if any(rows.found[point]["status"] == "oom" for point in points):
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


def _let_go_of_the_last_point(model: GPT2LMHeadModel, others: int) -> None:
    """Memory as it was before it, `others` being the bytes that are not the model's.

    Collecting garbage takes 0.2 s, as long as many a point, and only cycles wait for it: where nothing is left over,
    what PyTorch keeps for later is given back, and no more.
    """
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
        if _allocated() > others + _bytes_of(model) + _LEFT_OVER:
            free_memory()


def _attempt(
    model: Any, job: str, attention: str, batch: int, n: int, works: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """A row's values for each work; whatever goes wrong for want of memory or of support is said there."""
    launched: list[str] = []
    try:
        with _quiet():
            model.set_attn_implementation(attention)
        with watch_interpreter(lambda executor, args, kwargs: _stop(launched, executor)):
            return _training(model, batch, n) if job == "training" else _inference(model, batch, n)
    except Exception as error:
        if launched:  # the exception of `_stop`, perhaps wrapped on its way through autograd or Triton
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
    """Without transformers' warning that flash_attention_2 wants 16 bits: autocast, or the weights, give them."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


class _Interpreted(RuntimeError):
    """A kernel was about to run in the interpreter, where nothing is timed."""


def _stop(launched: list[str], executor: Any) -> None:
    launched.append(executor.fn.__name__)
    raise _Interpreted(launched[-1])


def _training(model: Any, batch: int, n: int) -> dict[str, dict[str, Any]]:
    """Forward, backward and whole step: ms, tokens_per_s, peak_gib."""
    device = runtime.device
    model.float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
    # float16 overflows without a scaler; here for its time, and the loss is thrown away
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
        peak = _peak_gib()
    finally:
        model.zero_grad(set_to_none=True)
    return {work: _row(statistics.median(ms[work] for ms in found), batch * n, peak) for work in TRAINING}


def _repeated(call: Callable[[], Any], seconds: float) -> list[Any]:
    """What `call` returns, as often as it fits in `seconds`, from `_FEWEST` to `_MOST` times; a warm-up not counted.

    The first call compiles, loads and allocates. A second one is part of the warm-up where calls are short, since the
    memory of the first step is not yet laid out as that of the others is.
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
    peaks = [_peak_gib()]
    _reset_peak()
    token, marks = output.logits[:, -1:].argmax(dim=-1), []
    for _ in range(_WARM_UP_TOKENS + _DECODED):
        marks.append(_mark())
        output = model(token, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(dim=-1)
    marks.append(_mark())
    each = [_between(*pair) for pair in itertools.pairwise(marks[_WARM_UP_TOKENS:])]
    peaks.append(_peak_gib())
    return {
        "prefill": _row(statistics.median(times), batch * n, peaks[0]),
        "decode": _row(statistics.median(each), batch, peaks[1]),
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


def _peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if runtime.device.type == "cuda" else float("nan")


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


class _Rows:
    """The rows of a sweep, on disk after each measurement where there is a folder."""

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.found: dict[tuple, Mapping[str, Any]] = {}
        if self.folder is None:
            return
        self.environment = environment().as_dict()
        path = self.folder / f"{TABLE}.csv"
        if path.exists():
            stored = read_results(self.folder, TABLE)
            changes = differences(stored.attrs["environment"], self.environment)
            if changes:
                raise ValueError(
                    f"{path.name} was measured in another environment ({'; '.join(changes)}), and one table must not "
                    "mix two: name another folder, or delete that file."
                )
            self.found = dict(self._read(stored))

    @staticmethod
    def _read(stored: pd.DataFrame) -> Iterator[tuple[tuple, dict]]:
        for record in stored.to_dict("records"):
            yield tuple(record[name] for name in KEY), {k: v for k, v in record.items() if k not in KEY}

    def add(self, rows: Mapping[tuple, Mapping[str, Any]]) -> None:
        self.found.update(rows)
        if self.folder is not None:
            save_results(self.table(), self.folder, self.environment, table=TABLE)

    def table(self) -> pd.DataFrame:
        rows = [dict(zip(KEY, point, strict=True)) | dict(row) for point, row in self.found.items()]
        return pd.DataFrame(rows, columns=list(COLUMNS))
