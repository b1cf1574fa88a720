"""Predicts the time of attention at shapes that nobody ran: FLOPs, exponentials, bytes, waves over SMs, overhead.

A kernel of the flash family gives each program a block of rows. The model says of its time

    t = overhead + c_bytes * bytes
      + fill * (c_products * products + c_exponentials * exponentials + c_programs * programs)

`products`, `exponentials` and `bytes` are what a shape asks for, divided by what the GPU can do (its ceilings), so that
c = 1 would be a kernel at that ceiling; c_programs is the time in microseconds that a program takes beside its tiles,
and `fill` says how much longer the SM that has the most to do works than the average one. They are added, since the
kernels of this lab overlap little of it; where a kernel does overlap, its constants come out smaller.

The constants are fitted, for each implementation, pass, dtype and mask, on measured times; what they are multiplied
with comes from the shape and from the GPU, which is why a fit of one GPU says something about another.
"""

from __future__ import annotations

import itertools
import math
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from labutils.analysis.roofline import Ceilings, measure_ceilings, stored_ceilings
from labutils.attention.backends import BACKENDS
from labutils.benchmark import RESULTS, Point, attention_flops, reference_results
from labutils.machine import chips, runtime

EXPONENTIALS_PER_CLOCK = 16
"""Results of ex2 that an SM delivers in a clock, compute capability 7.5 to 10.0 (CUDA C++ Programming Guide, table
"Throughput of Native Arithmetic Instructions")."""

GROUP = ("impl", "pass", "dtype", "causal")
"""One fit for each of these."""


@dataclass(frozen=True)
class Gpu:
    """What the model must know of a GPU.

    Attributes:
        name: of the machine.
        tflops: of a large matrix product. gb_per_s: of a large copy. Both as `measure_ceilings` finds them.
        processors: streaming multiprocessors (SMs).
        mhz: highest clock of an SM, for the exponentials.
    """

    name: str
    tflops: float
    gb_per_s: float
    processors: int
    mhz: float

    @property
    def exponentials_per_s(self) -> float:
        """ex2 results that all SMs deliver a second, at most."""
        return EXPONENTIALS_PER_CLOCK * self.processors * self.mhz * 1e6

    @classmethod
    def of_this_machine(cls, ceilings: Ceilings) -> Gpu:
        """This machine's GPU, with ceilings measured on it.

        Args:
            ceilings: of `measure_ceilings`.

        Raises:
            RuntimeError: no GPU, or nvidia-smi does not say its highest clock.
        """
        if runtime.device.type != "cuda":
            raise RuntimeError("this machine has no GPU: Gpu.stored() is the H200 of the stored results.")
        properties = torch.cuda.get_device_properties(runtime.device)
        mhz = _highest_clock_mhz()
        return cls(ceilings.machine, ceilings.tflops, ceilings.gb_per_s, properties.multi_processor_count, mhz)

    @classmethod
    def stored(cls, gpu: str = "nvidia_h200") -> Gpu:
        """A GPU of which ceilings are stored.

        Args:
            gpu: a folder under labutils/results.

        Raises:
            ValueError: its number of SMs and its clock are not known here.
            FileNotFoundError: its ceilings are not stored.
        """
        if gpu not in _CARDS:
            raise ValueError(f"gpu={gpu!r} is not known: {', '.join(_CARDS)}, or Gpu.of_this_machine(ceilings).")
        ceilings, card = stored_ceilings(gpu), _CARDS[gpu]
        assert card.mhz is not None  # a card of the table whose clock the lab knows
        return cls(ceilings.machine, ceilings.tflops, ceilings.gb_per_s, card.processors, card.mhz)


def gpu_for(folder: Path) -> Gpu:
    """The GPU whose results a folder holds: with the stored ceilings where these are its own, else this machine's.

    What is stored must follow from what is stored beside it, so that anybody can compute it again.

    Args:
        folder: of tables, such as labutils/results/nvidia_h200.

    Raises:
        RuntimeError: the stored ceilings are not its own, and this machine has no GPU.
    """
    if folder.resolve().parent == RESULTS.resolve() and folder.name in _CARDS and (folder / "ceilings.json").exists():
        return Gpu.stored(folder.name)
    return Gpu.of_this_machine(measure_ceilings())


_CARDS = {"nvidia_h200": chips.CARDS["H200"]}  # has the SMs and the highest clock, which stored results do not hold


def _highest_clock_mhz() -> float:
    asked = [
        "nvidia-smi",
        "--query-gpu=clocks.max.sm",
        "--format=csv,noheader,nounits",
        f"--id={runtime.device.index or 0}",
    ]
    try:
        done = subprocess.run(asked, capture_output=True, text=True)
        return float(done.stdout.split()[0])
    except OSError as error:
        said = str(error)
    except (ValueError, IndexError):  # "[N/A]", or nothing
        said = f"{done.stdout.strip()} {done.stderr.strip()}".strip() or "it prints nothing"
    raise RuntimeError(
        f"nvidia-smi does not say the highest clock of an SM ({said}): install NVIDIA's driver with its tools, or give "
        "the clock as Gpu(..., mhz=...)."
    )


# ------------------------------------------------------------------------------------------------------------
# What a shape asks for
# ------------------------------------------------------------------------------------------------------------

_PRODUCTS = {"fwd": 2, "bwd": 5}  # matrix products of N x N x D
_TENSORS = {"fwd": 4, "bwd": 8}  # q, k, v, o; in the backward pass dout, dq, dk and dv as well

FITTED = ("overhead", "bytes", "products", "exponentials", "programs")
"""The terms of the model, in the order of `Fit.constants`."""


def padded(head_dim: int) -> int:
    """The head dimension that a kernel is taken to compute with: the next multiple of 32."""
    return -(-head_dim // 32) * 32


def terms(row: Mapping[str, Any], gpu: Gpu, block: int, resident: float, slowdown: float) -> dict[str, float]:
    """What a shape asks for, in milliseconds at the ceilings of a GPU.

    Args:
        row: pass, dtype, head_dim, causal, batch, heads, seqlen.
        gpu: whose ceilings count.
        block: rows and columns of a tile.
        resident: programs that an SM holds at once.
        slowdown: how much longer a program takes alone on an SM than its share of an SM that is full.

    Returns:
        A value for each of `FITTED` ("overhead" is 1; products, exponentials and programs have `fill` in them) and
        `fill` itself.
    """
    n, d = int(row["seqlen"]), int(row["head_dim"])
    heads = int(row["batch"]) * int(row["heads"])
    blocks = math.ceil(n / block)
    tiles = blocks * (blocks + 1) // 2 if row["causal"] else blocks**2
    pairs = heads * tiles * block * block  # scores computed, those that a mask takes away within a tile included
    programs = heads * blocks
    even = programs / gpu.processors
    if row["causal"]:  # unequal programs, the longest first, fill each other's gaps, but the longest must end
        waves = max(even, slowdown * blocks**2 / tiles)
    else:  # equal programs come in waves
        most = math.ceil(even)
        waves = max(most, slowdown * math.ceil(most / resident))
    fill = waves / even
    itemsize = getattr(torch, row["dtype"]).itemsize
    return {
        "overhead": 1.0,
        "bytes": _TENSORS[row["pass"]] * heads * n * d * itemsize / gpu.gb_per_s / 1e6,
        "products": fill * 2 * _PRODUCTS[row["pass"]] * pairs * padded(d) / gpu.tflops / 1e9,
        "exponentials": fill * pairs / gpu.exponentials_per_s * 1e3,
        "programs": fill * even * 1e-3,  # a microsecond each
        "fill": fill,
    }


# ------------------------------------------------------------------------------------------------------------
# Fit and prediction
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """The constants of one implementation, pass, dtype and mask.

    Attributes:
        constants: by the names of `FITTED`: milliseconds of overhead; how many times as long as at the ceiling bytes,
            products and exponentials take; microseconds of a program.
        block, resident, slowdown: as for `terms`.
        rows: how many measurements it was fitted on.
    """

    constants: dict[str, float]
    block: int
    resident: float
    slowdown: float
    rows: int

    def parts(self, row: Mapping[str, Any], gpu: Gpu) -> dict[str, float]:
        """Milliseconds of a shape (a row as `terms` takes it) on a GPU, by the terms of the model; their sum is the
        prediction."""
        asked = terms(row, gpu, self.block, self.resident, self.slowdown)
        return {name: self.constants[name] * asked[name] for name in FITTED}

    def predict(self, row: Mapping[str, Any], gpu: Gpu) -> float:
        """Milliseconds of a shape (a row as `terms` takes it) on a GPU."""
        return sum(self.parts(row, gpu).values())


_BLOCKS = (64, 128)
_RESIDENT = (1, 2, 3, 4)
_SLOWDOWN = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)


def _not_negative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Least squares with all constants 0 or more: which of them are 0 is tried out, few zeros first.

    Where the others come out as 0 or more, and none of those at 0 would lower the error by growing, there is no better
    choice (the conditions of Karush, Kuhn and Tucker).
    """
    best, best_error = np.zeros(a.shape[1]), math.inf
    for size in range(a.shape[1], 0, -1):
        for chosen in itertools.combinations(range(a.shape[1]), size):
            x = np.zeros(a.shape[1])
            x[list(chosen)] = np.linalg.lstsq(a[:, chosen], b, rcond=None)[0]
            if (x < 0).any():
                continue
            left = b - a @ x
            error = float((left**2).sum())
            if error < best_error:
                best, best_error = x, error
            slope = a.T @ left / np.linalg.norm(a, axis=0).clip(min=1e-300)
            if (slope <= 1e-9 * np.linalg.norm(b)).all():
                return x
    return best


def fit_one(rows: Sequence[Mapping[str, Any]], gpu: Gpu) -> Fit:
    """The constants with the least squares of relative errors, over `rows` of one implementation, pass, dtype and mask.

    Which block, how many resident programs and what slowdown is tried out. Where all rows fill the GPU several times
    over, as a sweep of a fixed number of tokens does, the last two make no difference, and the smallest are taken; nor
    can such a sweep tell bytes, which are then all the same, from overhead.

    Args:
        rows: shapes as `terms` takes them, with `ms`.
        gpu: that measured them.

    Raises:
        ValueError: fewer rows than constants.
    """
    if len(rows) < len(FITTED):
        raise ValueError(f"{len(rows)} measurements cannot say {len(FITTED)} constants: measure more shapes.")
    best: Fit | None = None
    best_error = math.inf
    ms = np.array([row["ms"] for row in rows])
    for block, resident, slowdown in itertools.product(_BLOCKS, _RESIDENT, _SLOWDOWN):
        if slowdown > resident:  # alone, a program has all that the resident ones share, and no more
            continue
        asked = [terms(row, gpu, block, resident, slowdown) for row in rows]
        a = np.array([[one[name] for name in FITTED] for one in asked]) / ms[:, None]
        constants = _not_negative(a, np.ones(len(ms)))
        error = float(((a @ constants - 1) ** 2).sum())
        if error < best_error * (1 - 1e-6):
            named = dict(zip(FITTED, constants.tolist(), strict=True))
            best, best_error = Fit(named, block, resident, slowdown, len(rows)), error
    assert best is not None
    return best


def predictable() -> list[str]:
    """The backends that the model is for: one kernel, or a few in the backward pass, with programs of their own rows.

    Not naive attention, whose operations run one after another, and not v1, which has one program for each head.
    """
    return [backend.name for backend in BACKENDS.values() if backend.row_programs]


def fit(measured: pd.DataFrame, gpu: Gpu) -> dict[tuple, Fit]:
    """One `Fit` for each implementation, pass, dtype and mask in a table of measurements; failures are left out.

    Args:
        measured: a table such as attention.csv, with the columns of `GROUP`, the shape and `ms`.
        gpu: that measured it.

    Raises:
        ValueError: too few rows of one group.
    """
    ok = measured[measured["ms"].notna() & measured["impl"].isin(predictable())]
    return {key: fit_one(rows.to_dict("records"), gpu) for key, rows in ok.groupby(list(GROUP))}


def predict(fits: Mapping[tuple, Fit], shapes: pd.DataFrame, gpu: Gpu) -> pd.DataFrame:
    """The table of shapes with a column `predicted_ms`; rows of a group that has no fit are left out.

    Args:
        fits: a `Fit` for each group, the values of the columns `GROUP`.
        shapes: rows with the columns of a measured table; times are not read.
        gpu: whose time is predicted.
    """
    known = [tuple(row[name] for name in GROUP) in fits for row in shapes.to_dict("records")]
    found = shapes[known].copy()
    found["predicted_ms"] = [
        fits[tuple(row[name] for name in GROUP)].predict(row, gpu) for row in found.to_dict("records")
    ]
    return found


def errors(predicted: pd.DataFrame) -> pd.Series:
    """|predicted / measured - 1| of each row."""
    return (predicted["predicted_ms"] / predicted["ms"] - 1).abs().rename("error")


def judged(predicted: pd.DataFrame, by: Iterable[str] = ("impl", "pass")) -> pd.DataFrame:
    """Median, 90th percentile and largest of the absolute relative errors, for each group of rows and for all.

    Args:
        predicted: with `ms` and `predicted_ms`.
        by: the columns that make the groups.

    Returns:
        Rows by the names of the groups and "all"; columns shapes (how many), median, 90 % and largest.
    """
    parts = {" ".join(map(str, key)): rows for key, rows in predicted.groupby(list(by), sort=False)}
    table = {
        name: [len(rows), errors(rows).median(), errors(rows).quantile(0.9), errors(rows).max()]
        for name, rows in (parts | {"all": predicted}).items()
    }
    return pd.DataFrame.from_dict(table, orient="index", columns=["shapes", "median", "90 %", "largest"])


def each_length_in_turn(measured: pd.DataFrame, gpu: Gpu) -> pd.DataFrame:
    """The table with `predicted_ms`, each row from a fit of the rows of all other lengths.

    Args:
        measured: as for `fit`.
        gpu: that measured it.

    Raises:
        ValueError: too few rows remain of one group.
    """
    parts = [
        predict(fit(measured[measured["seqlen"] != n], gpu), measured[measured["seqlen"] == n], gpu)
        for n in sorted(set(measured["seqlen"]))
    ]
    return pd.concat(parts)


def by_head_dim(
    fits: Mapping[tuple, Fit], held_out: pd.DataFrame, gpu: Gpu, instead: Mapping[int, int]
) -> pd.DataFrame:
    """The median error, with its sign, for each implementation, pass and head dimension.

    Args:
        fits, gpu: as for `predict`.
        held_out: measurements.
        instead: head dimensions -> others that are put into the model as well, such as {96: 128}: a kernel that
            computes with 128 columns where 96 were asked for is predicted as if 128 had been.

    Returns:
        Rows by implementation and pass; columns "D = 64" and so on, and "D = 96 as 128".
    """
    columns = {}
    for d, rows in held_out.groupby("head_dim"):
        for taken in (d, instead.get(d)):
            if taken is not None:
                guess = predict(fits, rows.assign(head_dim=taken), gpu)
                error = (guess["predicted_ms"] / guess["ms"] - 1).groupby([guess["impl"], guess["pass"]], sort=False)
                columns[f"D = {d}" if taken == d else f"D = {d} as {taken}"] = error.median()
    return pd.DataFrame(columns)


# ------------------------------------------------------------------------------------------------------------
# Shapes to be measured for it
# ------------------------------------------------------------------------------------------------------------

MEASURED = ("triton_v2", "sdpa_flash", "sdpa_cudnn")
_LEAST_FLOPS, _MOST_FLOPS = 4e10, 4e12  # of a forward pass: below, launching counts; above, it takes long
_FIT_LENGTHS, _FIT_HEADS = (1024, 2048, 4096, 8192, 16384), (1, 4, 12, 32, 128, 512)  # heads of all sequences


def fit_shapes() -> list[dict]:
    """Shapes for the fit: N a power of two, D 64 and 128, and from few programs to many.

    Each is {"batch", "heads", "seqlen", "head_dim", "causal"}. Those with 16,384 tokens and H * D = 2,048 are in the
    stored sweep (attention.csv) as well.
    """
    shapes = [
        {"batch": max(1, total // 32), "heads": min(total, 32), "seqlen": n, "head_dim": d, "causal": causal}
        for d, n, total, causal in itertools.product((64, 128), _FIT_LENGTHS, _FIT_HEADS, (False, True))
    ]
    return [shape for shape in shapes if _LEAST_FLOPS <= _flops(shape) <= _MOST_FLOPS]


def held_out_shapes(count: int = 60) -> list[dict]:
    """Shapes for the judgement: N no power of two, batches and heads of all kinds, D 64, 96 and 128; always the same.

    The model never sees one of these lengths in its fit.

    Args:
        count: how many; fewer are the first of more.
    """
    generator = np.random.default_rng(0)
    shapes: dict[tuple, dict] = {}
    while len(shapes) < count:
        shape = {
            "batch": int(generator.choice([1, 2, 3, 5, 8])),
            "heads": int(generator.choice([1, 3, 6, 10, 16, 24, 40])),
            "seqlen": int(8 * generator.integers(700 // 8, 14000 // 8)),
            "head_dim": int(generator.choice([64, 64, 96, 128, 128])),
            "causal": bool(generator.integers(2)),
        }
        power_of_two = shape["seqlen"] & (shape["seqlen"] - 1) == 0
        if _LEAST_FLOPS <= _flops(shape) <= _MOST_FLOPS and not power_of_two:
            shapes[tuple(shape.values())] = shape
    return list(shapes.values())


def _flops(shape: Mapping[str, Any]) -> float:
    return attention_flops(
        batch=shape["batch"], heads=shape["heads"], seqlen_q=shape["seqlen"], head_dim=shape["head_dim"],
        causal=shape["causal"],
    )  # fmt: skip


def points_to_measure(
    impls: Iterable[str] = MEASURED, passes: Iterable[str] = ("fwd", "bwd"), dtype: str = "bfloat16"
) -> dict[Point, str]:
    """Every point of `fit_shapes` and `held_out_shapes` -> its split, "fit" or "held_out"; points of one shape follow
    each other.

    Args:
        impls, passes, dtype: as in a `Point`, of which there is one for each of them at each shape.
    """
    impls, passes = list(impls), list(passes)
    return {
        Point(impl, which, dtype, s["head_dim"], s["causal"], s["batch"], s["heads"], s["seqlen"]): split
        for split, shapes in (("fit", fit_shapes()), ("held_out", held_out_shapes()))
        for s in shapes
        for impl in impls
        for which in passes
    }


def stored_predictions(gpu: str = "nvidia_h200") -> pd.DataFrame:
    """The stored measurements to fit and to judge on, with their predictions: the columns of `SCHEMAS["prediction"]`.

    Args:
        gpu: a folder under labutils/results.

    Raises:
        FileNotFoundError: none is stored: `python tools/study.py shapes` measures one.
    """
    return reference_results(gpu, "prediction", dtype=None)


def predicted_table(measured: pd.DataFrame, gpu: Gpu) -> pd.DataFrame:
    """The table with `predicted_ms`: all rows, by a fit of those with split "fit".

    Args:
        measured: as for `fit`, with `split`.
        gpu: that measured it.

    Raises:
        ValueError: too few rows to fit.
    """
    return predict(fit(measured[measured["split"] == "fit"], gpu), measured, gpu)
