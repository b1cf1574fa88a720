"""The ladder: the longest sequence that trains on a card of a given size, with more and more remedies.

A remedy is an option that saves memory, and a rung is a set of remedies. `longest` searches the longest sequence that
trains under a memory cap. Each try makes a new model, trains it for a few steps and deletes it
(`labutils.training.try_step`), so running out of memory is an answer and not the end. The search starts at the
prediction of the rehearsal (`labutils.training.rehearsal`), which the row keeps beside the measurement.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from labutils.gpt2 import models
from labutils.machine import files, runtime
from labutils.machine.memory import GIB, memory_cap
from labutils.training import choice, ledger, rehearsal
from labutils.training.fits import try_step

if TYPE_CHECKING:
    import pandas as pd

STEP = 1024
"""Lengths are tried in multiples of this many tokens."""

USABLE = 0.88
"""The share of the allocator's memory that tensors fill when the longest sequence trains; the rest is fragmented.
A guess that is right to an eighth takes two tries: one length that fits and one that does not."""


@dataclass(frozen=True)
class Rung:
    """One step of the ladder.

    Attributes:
        name: the remedy that is new on this rung.
        attention: for `models.gpt2`; "flash" is our kernel, or PyTorch's if Triton uses no tensor cores on this GPU.
        low: True: 16-bit products (the GPU's `runtime.dtype`); False: float32 throughout.
        options: options of `training.train`: checkpointing, chunked_loss, optimizer.
        model: further fields of the model's config.
    """

    name: str
    attention: str = "flash"
    low: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


_CHECKPOINTED = {"checkpointing": True}
_BOTH = _CHECKPOINTED | {"chunked_loss": 2048}
_PARKED = {"checkpointing": "offloaded", "chunked_loss": 2048}
RUNGS: tuple[Rung, ...] = (
    Rung("eager, float32", attention="eager", low=False),
    Rung("flash attention, float32", low=False),
    Rung("+ 16 bits"),
    Rung("+ checkpointing", options=_CHECKPOINTED),
    Rung("+ chunked loss", options=_BOTH),
    Rung("+ GELU in one operation", options=_BOTH, model=models.ONE_GELU),
    Rung("+ checkpoints offloaded", options=_PARKED, model=models.ONE_GELU),
    Rung("+ optimizer offloaded", options=_PARKED | {"optimizer": "offloaded"}, model=models.ONE_GELU),
)
"""From the third on, each rung adds a remedy to the rung before."""


@functools.lru_cache(maxsize=128)
def _rehearsed(size: str, seqlen: int, **options: Any) -> dict[str, float]:
    """`rehearse_by_kind`, cached: it takes seconds, and a search may end at a length that was rehearsed before."""
    return rehearsal.rehearse_by_kind(size, seqlen, **options)


def predict_by_kind(size: str, rung: Rung, seqlen: int, *, vocab_size: int = 50257) -> dict[str, float]:
    """Predicted GiB of each kind at the peak of a training step, by `labutils.training.rehearsal`.

    Args:
        size, vocab_size: as for `labutils.gpt2.models.gpt2`.
        rung: the remedies.
        seqlen: N, of one sequence.

    Returns:
        GiB by `labutils.training.ledger.KINDS`; kinds without memory are left out.

    Raises:
        ValueError: an unknown size.
    """
    attention = "eager" if rung.attention == "eager" else "labutils"
    dtype = torch.bfloat16 if rung.low else None  # float16 takes as much
    kinds = _rehearsed(
        size, seqlen, vocab_size=vocab_size, attention=attention, autocast_dtype=dtype, **rung.options, **rung.model
    )
    return dict(kinds)


def predict(size: str, rung: Rung, seqlen: int, *, vocab_size: int = 50257) -> float:
    """Predicted GiB at the peak: the sum of `predict_by_kind`, which takes the same arguments."""
    return sum(predict_by_kind(size, rung, seqlen, vocab_size=vocab_size).values())


def predicted_longest(size: str, rung: Rung, gib: float, *, most: int = 2**17, vocab_size: int = 50257) -> int:
    """The longest sequence whose predicted peak stays below `gib`.

    The peak is a constant plus a part that grows with N and, only for eager attention, a part that grows with N². Two
    lengths are rehearsed, three for eager attention, and the line or parabola through them is solved for `gib`.

    With a chunked loss the longest rehearsed length is `most`; if its peak stays below `gib`, it is the answer. The
    next is half of it. From some length on, the peak lies in the backward pass of a block, and a line through shorter
    lengths would miss that.

    Args:
        size, rung, vocab_size: as for `predict_by_kind`.
        gib: GiB that the allocator may use.
        most: with a chunked loss, the longest sequence that is rehearsed, and the largest answer.

    Returns:
        N, a multiple of `STEP`; 0 if no length fits.

    Raises:
        ValueError: an unknown size.
    """
    lengths = [2 * STEP, 8 * STEP, 16 * STEP] if rung.attention == "eager" else [8 * STEP, 32 * STEP]
    if "chunked_loss" in rung.options:
        if most < 2 * STEP or predict(size, rung, most, vocab_size=vocab_size) < gib:
            return most // STEP * STEP
        lengths = [most // 4, most // 2, most] if rung.attention == "eager" else [most // 2, most]
    peaks = [predict(size, rung, n, vocab_size=vocab_size) for n in lengths]
    (a, b), (x, y) = peaks[:2], lengths[:2]
    slope = (b - a) / (y - x)
    square = 0.0
    if rung.attention == "eager":
        square = ((peaks[2] - b) / (lengths[2] - y) - slope) / (lengths[2] - x)
    linear = slope - square * (x + y)
    constant = a - linear * x - square * x * x
    if constant >= gib:
        return 0
    if square * (64 * STEP) ** 2 < 0.01 * gib:  # a straight line, apart from rounding
        return int((gib - constant) / slope) // STEP * STEP
    root = (-linear + math.sqrt(linear * linear + 4 * square * (gib - constant))) / (2 * square)
    return int(root) // STEP * STEP


def search(
    fits: Callable[[int], bool], guess: int, *, most: int, tolerance: float = 1 / 16
) -> Iterator[tuple[int, bool]]:
    """Searches the largest length that fits, by trying.

    It first goes outward from the guess, until one length fits and one does not. Then it bisects, until the two are at
    most `STEP` apart, or at most the share `tolerance` of the shorter one.

    Args:
        fits: tells whether a length trains.
        guess: the first length to try.
        most: no longer length is tried.
        tolerance: the precision, as a share of the longest length that fits.

    Yields:
        Each length that was tried, and whether it fits.

    Raises:
        ValueError: `most` below `STEP`, or a tolerance that is not positive.
    """
    if most < STEP or not tolerance > 0:
        raise ValueError(f"most must be {STEP} or more and tolerance positive, got {most} and {tolerance}")

    def whole(length: float) -> int:
        return min(max(round(length / STEP) * STEP, STEP), most // STEP * STEP)

    low, high, n, factor = 0, None, whole(guess), 1 + tolerance
    while True:
        answer = fits(n)
        yield n, answer
        if answer:
            low = max(low, n)
        else:
            high = n if high is None else min(high, n)
        if low == most // STEP * STEP or high == STEP:
            return
        if high is None:
            n, factor = whole(max(low * factor, low + STEP)), factor**2
        elif low == 0:
            n, factor = whole(min(high / factor, high - STEP)), factor**2
        elif high - low <= max(STEP, tolerance * low):
            return
        else:
            n = min(max(whole((low + high) / 2), low + STEP), high - STEP)


def longest(
    size: str, rung: Rung, cap_gib: float, *, most: int = 2**17, steps: int = 2, tolerance: float = 1 / 16,
    guess: int | None = None, on_try: Callable[[int, bool], None] = lambda n, fits: None,
) -> dict[str, Any]:  # fmt: skip
    """The longest sequence that a model trains with the remedies of a rung, on a card of `cap_gib`.

    Args:
        size: a key of `models.GPT2_SIZES`.
        rung: the remedies; one of `RUNGS`, for instance.
        cap_gib: GiB of the card, with the CUDA context (`training.memory_cap`).
        most: the longest sequence to try, in tokens.
        steps: steps of each try; 2 or more, because the optimizer's state does not exist in the first step.
        tolerance: the precision of the search, as a share of the longest length that fits.
        guess: the first length to try; None asks the rehearsal.
        on_try: called after each try with the length and whether it fits.

    Returns:
        A row of training.csv for the longest length that fits (or the shortest tried, with status "oom"). Further
        columns are rung, predicted_gib (by the rehearsal, for that length), bound (the shortest length that did not
        fit; NaN if every length fitted, up to `most`), tries, and the prediction for each of `ledger.KINDS`.

    Raises:
        RuntimeError: there is no GPU whose memory could be capped.
        ValueError: an unknown size, `most` below `STEP`, or a tolerance that is not positive.
        KeyboardInterrupt: a try was interrupted.
    """
    if guess is None:
        with memory_cap(cap_gib) as cap:
            room = cap.allocator_gib
        guess = predicted_longest(size, rung, USABLE * room, most=most) or STEP
    best: dict[str, Any] | None = None
    failed: list[int] = []
    row: dict[str, Any] = {}

    def fits(n: int) -> bool:
        nonlocal best, row
        attention = rung.attention
        if attention == "flash":
            attention = choice.for_capability(runtime.capability).attention
        row = try_step(
            lambda: models.gpt2(size, n_positions=n, attention=attention, **rung.model),
            n,
            cap_gib=cap_gib,
            steps=steps,
            autocast_dtype="auto" if rung.low else None,
            **rung.options,
        )
        if row["status"] == "ok":
            if best is None or n > best["seqlen"]:
                best = row
            return True
        failed.append(n)
        return False

    tries = 0
    for n, answer in search(fits, guess, most=most, tolerance=tolerance):
        tries += 1
        on_try(n, answer)
    chosen = best or row
    kinds = predict_by_kind(size, rung, chosen["seqlen"])
    return chosen | {
        "rung": rung.name,
        "predicted_gib": sum(kinds.values()),
        "bound": float(min(failed)) if failed else math.nan,
        "tries": tries,
        **{kind: kinds.get(kind, 0.0) for kind in ledger.KINDS},
    }


def ladder(
    sizes: Sequence[str] = ("124M",),
    cap_gib: float = 16e9 / GIB,
    *,
    rungs: Sequence[Rung] = RUNGS,
    folder: str | Path | None = None,
    progress: bool = True,
    find: Callable[..., dict[str, Any]] = longest,
    **options: Any,
) -> pd.DataFrame:
    """`longest` for each rung of each model, a row at a time.

    Args:
        sizes: keys of `models.GPT2_SIZES`.
        cap_gib: GiB of the card.
        rungs: the rungs, in this order.
        folder: rows are kept there, in `ladder.json`, each as soon as it is known. A later call with the same cap and
            options finds only the missing rows. None keeps nothing.
        progress: a bar that names the current try.
        find: the function that finds a row.
        options: options of `find`.

    Returns:
        A row for each model and rung, with the columns of training.csv and the further columns of `longest`. After an
        interrupt the rows so far, with `.attrs["interrupted"]` set.

    Raises:
        ValueError: the folder holds rows of another cap, machine or options.
        RuntimeError: as `longest`.
    """
    import pandas as pd

    path = None if folder is None else Path(folder) / "ladder.json"
    made_by = {"cap_gib": round(cap_gib, 6), "machine": runtime.machine, "torch": torch.__version__} | {
        name: value for name, value in options.items() if not callable(value)
    }
    rows: dict[tuple[str, str], dict[str, Any]] = {}  # by model and rung; the file may hold more than are asked for
    if path is not None and path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["made_by"] != made_by:
            raise ValueError(
                f"{path} holds rows made by {stored['made_by']}, and now it is {made_by}: name another folder, or "
                "delete the file"
            )
        rows = {(row["model"], row["rung"]): row for row in stored["rows"]}
    asked = [(size, rung) for size in sizes for rung in rungs]
    missing = [(size, rung) for size, rung in asked if (size, rung.name) not in rows]
    known = len(asked) - len(missing)
    bar = tqdm(total=len(asked), initial=known, file=sys.stdout, disable=not progress, unit="rung")
    interrupted = False
    try:
        for size, rung in missing:

            def told(n: int, fits: bool, size: str = size, rung: Rung = rung) -> None:
                bar.set_postfix_str(f"{size}, {rung.name}: {n:,} {'fits' if fits else 'does not fit'}")

            rows[size, rung.name] = find(size, rung, cap_gib, on_try=told, **options) | {"model": size}
            bar.update()
            if path is not None:
                files.replace(path, json.dumps({"made_by": made_by, "rows": list(rows.values())}, indent=1))
    except KeyboardInterrupt:
        interrupted = True
    finally:
        bar.close()
    found = [rows[size, rung.name] for size, rung in asked if (size, rung.name) in rows]
    if interrupted:
        again = "run this cell again to go on" if path is not None else "the table has only those"
        print(f"Interrupted after {len(found)} of {len(asked)} rungs: {again}.")
    frame = pd.DataFrame(found)
    frame.attrs["interrupted"] = interrupted
    return frame
